"""Every planted difference is named; equal folders have none."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from pyarrow import parquet
from safetensors.torch import save_file

from benchmarks.crash.compare import differences, rows_difference

STATES = ["optimizer.pt", "rng_state.pth"]
ROWS = [{"step": step, "loss": 1.0 / step} for step in range(1, 6)]


def write_rows(path: Path, rows: list) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def edit_json(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def write_point(folder: Path, step: int) -> None:
    point = folder / "checkpoints" / f"step-{step}"
    point.mkdir(parents=True)
    state = {"state": {0: {"exp_avg": torch.arange(6.0) + step}}, "lr": [0.1]}
    torch.save(state, point / "optimizer.pt")
    generators = {"cpu": torch.arange(4, dtype=torch.uint8), "numpy": np.arange(3, dtype=np.uint32)}
    torch.save(generators, point / "rng_state.pth")
    logs = {"metrics.jsonl": {"size": 10}, "timings.jsonl": {"size": 20}}
    record = {"step": step, "elapsed_seconds": 1.5, "logs": logs, "sha256": "of all this"}
    (point / "point.json").write_text(json.dumps(record))


@pytest.fixture
def straight(tmp_path: Path) -> Path:
    """A finished stage's folder of every kind of file, with two resume points."""
    folder = tmp_path / "straight"
    folder.mkdir()
    save_file({"a": torch.zeros(4), "b": torch.ones(2, 3)}, folder / "model.safetensors")
    write_rows(folder / "metrics.jsonl", ROWS)
    write_rows(folder / "timings.jsonl", [{"step": row["step"], "seconds": 0.1} for row in ROWS])
    parquet.write_table(pa.Table.from_pylist(ROWS), folder / "rows.parquet")
    (folder / "page.html").write_text("<p>one</p>")
    manifest = {"content": {"files": {"a": 1}}, "circumstances": {"host": "here"}}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    for step in (4, 8):
        write_point(folder, step)
    return folder


@pytest.fixture
def found(straight: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(straight, tmp_path / "found"))


def test_equal_folders_have_no_difference(found, straight):
    assert differences(found, straight) == []


def test_clocks_and_circumstances_may_differ(found, straight):
    rows = [{"step": row["step"], "seconds": 9.0} for row in ROWS]
    write_rows(found / "timings.jsonl", rows)
    edit_json(found / "manifest.json", circumstances={"host": "there"})
    logs = {"metrics.jsonl": {"size": 10}, "timings.jsonl": {"size": 21}}
    changed = {"elapsed_seconds": 7, "logs": logs, "sha256": "of this"}
    edit_json(found / "checkpoints" / "step-8" / "point.json", **changed)
    assert differences(found, straight) == []


def test_what_a_point_says_of_its_logs_is_compared(found, straight):
    logs = {"metrics.jsonl": {"size": 11}, "timings.jsonl": {"size": 20}}
    edit_json(found / "checkpoints" / "step-8" / "point.json", logs=logs)
    assert differences(found, straight) == [
        "checkpoints/step-8/point.json: logs/metrics.jsonl/size: 11 instead of 10"
    ]


@pytest.mark.parametrize(
    "name",
    ["page.html", "model.safetensors", "rows.parquet", "metrics.jsonl"]
    + [f"checkpoints/step-{step}/{name}" for step in (4, 8) for name in STATES],
)
def test_any_changed_byte_is_a_difference(found, straight, name):
    content = bytearray((found / name).read_bytes())
    content[-len(content) // 2] ^= 1
    (found / name).write_bytes(content)
    line = differences(found, straight)
    assert len(line) == 1
    assert line[0].startswith(f"{name}: ")


def test_the_first_tensor_that_differs_is_named(found, straight):
    changed = torch.ones(2, 3)
    changed[1, 1] += 1e-7
    save_file({"a": torch.zeros(4), "b": changed}, found / "model.safetensors")
    assert differences(found, straight) == [
        (
            "model.safetensors: b: 1 of 6 numbers differ, number 4 first: "
            "1.0000001192092896 instead of 1.0"
        )
    ]


def test_a_tensor_of_another_size_is_named(found, straight):
    save_file({"a": torch.zeros(5), "b": torch.ones(2, 3)}, found / "model.safetensors")
    assert differences(found, straight) == [
        "model.safetensors: a: ('torch.float32', (5,)) instead of ('torch.float32', (4,))"
    ]


def test_states_inside_a_resume_point_are_compared(found, straight):
    point = found / "checkpoints" / "step-8"
    state = {"state": {0: {"exp_avg": torch.arange(6.0) + 8}}, "lr": [0.2]}
    torch.save(state, point / "optimizer.pt")
    generators = {"cpu": torch.arange(4, dtype=torch.uint8), "numpy": np.zeros(3, dtype=np.uint32)}
    torch.save(generators, point / "rng_state.pth")
    assert differences(found, straight) == [
        "checkpoints/step-8/optimizer.pt: lr/0: 0.2 instead of 0.1",
        (
            "checkpoints/step-8/rng_state.pth: numpy: 2 of 3 numbers differ, number 1 first: "
            "0 instead of 1"
        ),
    ]


@pytest.mark.parametrize(
    ("rows", "line"),
    [
        ([*ROWS[:3], ROWS[2], *ROWS[3:]], "row 4 is row 3 again"),
        ([*ROWS, ROWS[4]], "6 rows instead of 5, row 5 again"),
        ([*ROWS[:2], *ROWS[3:]], "row 3 is missing: row 4 stands there"),
        (ROWS[:4], "4 rows instead of 5"),
        ([*ROWS[:1], {"step": 2, "loss": 0.25}, *ROWS[2:]], "row 2, loss: 0.25 instead of 0.5"),
        ([*ROWS[:1], {"step": 2}, *ROWS[2:]], "row 2, names ['loss']"),
    ],
)
def test_doubled_missing_and_changed_rows_are_told_apart(found, straight, rows, line):
    write_rows(found / "metrics.jsonl", rows)
    assert differences(found, straight) == [f"metrics.jsonl: {line}"]


def test_not_a_number_is_itself():
    assert rows_difference([{"loss": float("nan")}], [{"loss": float("nan")}]) is None


def test_a_doubled_step_of_the_clocks_is_a_difference(found, straight):
    rows = [{"step": row["step"], "seconds": 0.3} for row in [*ROWS[:2], *ROWS[1:]]]
    write_rows(found / "timings.jsonl", rows)
    assert differences(found, straight) == ["timings.jsonl, steps: row 3 is row 2 again"]


def test_the_same_values_in_other_bytes_are_no_equality(found, straight):
    (found / "metrics.jsonl").write_text("".join(json.dumps(row) + " \n" for row in ROWS))
    assert differences(found, straight) == ["metrics.jsonl: the same values in other bytes"]


def test_what_is_missing_or_left_over_is_named(found, straight):
    (found / "page.html").unlink()
    (found / ".manifest.json.tmp").touch()
    (found / ".trainer").mkdir()
    (found / "checkpoints" / ".step-9.tmp").mkdir()
    assert differences(found, straight) == [
        "page.html is missing",
        ".manifest.json.tmp was left over",
        ".trainer/ was left over, empty",
        "checkpoints/.step-9.tmp/ was left over, empty",
        "checkpoints/.step-9.tmp was left over",
    ]


def test_another_content_is_a_difference(found, straight):
    edit_json(found / "manifest.json", content={"files": {"a": 2}})
    assert differences(found, straight) == ["manifest.json, content: files/a: 2 instead of 1"]


def test_the_resume_points_are_counted(found, straight):
    write_point(found, 6)
    assert differences(found, straight) == ["3 resume points instead of 2"]


def test_a_point_of_its_own_in_the_place_of_another_is_allowed(found, straight):
    shutil.rmtree(found / "checkpoints" / "step-4")
    write_point(found, 7)
    assert differences(found, straight) == []


def test_the_newest_resume_point_must_be_the_same(found, straight):
    shutil.rmtree(found / "checkpoints" / "step-8")
    assert differences(found, straight) == ["the newest resume point is step-4 instead of step-8"]


def test_a_half_removed_point_is_left_over(found, straight):
    write_point(found, 2)
    (found / "checkpoints" / "step-2" / "point.json").unlink()
    assert differences(found, straight) == ["checkpoints/step-2 was left over"]
