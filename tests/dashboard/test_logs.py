"""Logs as they grow: half-written and damaged lines, resumed stages, long runs."""

import json

import numpy as np
import pytest

from pipeline.dashboard.logs import LONGEST_LINE, Log, newest_rows, row_of, thinned


def append(path, *rows):
    """Appends rows as a stage does, or raw bytes."""
    with path.open("ab") as file:
        for row in rows:
            file.write(row if isinstance(row, bytes) else json.dumps(row).encode() + b"\n")


def curves(log, most=100):
    """The curves of a log and what is said of it."""
    found, remarks = log.points(most=most)
    return {name: list(zip(*points, strict=True)) for name, points in found.items()}, remarks


def test_a_log_is_read_as_it_grows(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = Log(path)
    assert curves(log) == ({}, [])
    append(path, {"step": 1, "a": 2.0, "of": 9, "at": 1e9, "text": "x", "flag": True})
    assert curves(log) == ({"a": [(1, 2.0)]}, [])
    append(path, {"step": 2, "a": 3, "b": 1.0})
    assert curves(log) == ({"a": [(1, 2.0), (2, 3.0)], "b": [(2, 1.0)]}, [])


def test_a_line_is_taken_when_it_is_whole(tmp_path):
    path = tmp_path / "metrics.jsonl"
    append(path, {"step": 1, "a": 2.0}, b'{"step": 2, "a"')
    log = Log(path)
    assert curves(log) == ({"a": [(1, 2.0)]}, [])
    append(path, b": 3.0}\n")
    assert curves(log) == ({"a": [(1, 2.0), (2, 3.0)]}, [])


def test_a_stage_that_goes_on_has_shortened_its_log(tmp_path):
    path = tmp_path / "timings.jsonl"
    append(path, {"step": 1, "a": 1.0}, {"step": 2, "a": 2.0}, {"step": 3, "a": 3.0})
    log = Log(path)
    curves(log)
    path.write_bytes(path.read_bytes().splitlines(keepends=True)[0])
    assert curves(log)[0] == {"a": [(1, 1.0)]}
    path.write_bytes(b"")  # shortened and longer than before when it is looked at again
    append(path, {"step": 1, "a": 1.0}, *({"step": step, "a": 9.0} for step in range(2, 9)))
    assert curves(log)[0] == {"a": [(1, 1.0), *((step, 9.0) for step in range(2, 9))]}
    path.unlink()
    assert curves(log) == ({}, [])


def test_what_is_damaged_is_left_out_and_said(tmp_path):
    path = tmp_path / "metrics.jsonl"
    bad = [b"\xff\xfe\n", b"[1]\n", b'{"a": 1}\n', b"[" * 10**5 + b"\n", b'{"step": NaN}\n']
    append(path, {"step": 1, "a": 1.0}, *bad, b'{"step": 2, "a": Infinity, "b": NaN}\n')
    append(path, b'{"step": 3, "a": 1' + b"0" * 400 + b"}\n", {"step": 4, "a": 2.0})
    found, remarks = curves(Log(path))
    assert found == {"a": [(1, 1.0), (4, 2.0)]}
    assert remarks == [
        "metrics.jsonl: line 2 and 4 more damaged, left out",
        "metrics.jsonl: 3 values not finite, left out",
    ]


def test_a_line_without_end_is_not_waited_for(tmp_path):
    path = tmp_path / "metrics.jsonl"
    append(path, b"x" * (LONGEST_LINE + 10), b"\n", {"step": 1, "a": 1.0})
    found, remarks = curves(Log(path))
    assert found == {"a": [(1, 1.0)]}
    assert remarks == ["metrics.jsonl: line 1 and 1 more damaged, left out"]


@pytest.mark.parametrize(("count", "most"), [(5, 10), (10, 10), (1000, 10), (1001, 100)])
def test_thinning_keeps_ends_and_extremes(count, most):
    values = np.random.default_rng(0).normal(size=count).round(3)
    values[count // 3], values[count // 2] = 99.0, -99.0
    steps = np.arange(count, dtype=float)
    x, y = thinned(steps, values, most=most)
    assert len(x) == len(y) <= most
    assert len(x) >= min(count, most // 2)
    assert x == sorted(set(x))
    assert (x[0], x[-1]) == (0, count - 1)
    assert {99.0, -99.0} <= set(y)
    assert all(values[int(step)] == value for step, value in zip(x, y, strict=True))


def test_the_newest_rows_are_whole_ones_at_the_end(tmp_path):
    path = tmp_path / "timings.jsonl"
    assert newest_rows(path) == []
    append(path, *({"step": step} for step in range(100)), b"broken\n", b'{"step": 1')
    assert newest_rows(path) == [{"step": step} for step in range(100)]
    assert newest_rows(path, size=40) == [{"step": 99}]  # the end of row 98 is no row


def test_a_row_has_a_step():
    assert row_of(b'{"step": 2.5, "a": null}') == {"step": 2.5, "a": None}
    for line in (b'{"step": true}', b'{"step": "1"}', b"{}", b"1", b"", b'{"step": 1' + b"0" * 400):
        assert row_of(line) is None
