"""Resume points on disk: published beside the training, verified, rotated, never lost."""

import errno
import json
import os
import threading
from pathlib import Path

import pytest

from pipeline import points as module
from pipeline.errors import UserError
from pipeline.points import Points, fault_of

IDENTITY = {"key": "k", "config": {"seed": 1}, "parents": {}}


def points_of(folder: Path, *, keep: int = 2, **identity) -> Points:
    return Points("sft", folder, IDENTITY | identity, keep)


def write(text: str):
    return lambda folder: (folder / "weights").write_text(text, encoding="utf-8")


def saved(folder: Path, *steps: int, keep: int = 2) -> Points:
    """Points with a log of one row a step."""
    points = points_of(folder, keep=keep)
    for step in steps:
        with (folder / "metrics.jsonl").open("a", encoding="utf-8") as log:
            log.write(json.dumps({"step": step}) + "\n")
        points.save(step, write(f"at {step}"), seconds=float(step))
    points.wait()
    return points


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def test_a_point_is_published_while_the_stage_goes_on(tmp_path, monkeypatch):
    go_on, digest = threading.Event(), module.files_of

    def slow(folder):
        go_on.wait(10)
        return digest(folder)

    monkeypatch.setattr(module, "files_of", slow)
    points = points_of(tmp_path)
    points.save(1, write("1"), seconds=0.0)
    assert names(tmp_path) == [".step-1.tmp"]  # saved and handed over, not yet named
    go_on.set()
    assert points.latest() == (1, tmp_path / "checkpoints" / "step-1")
    points.close()


def test_rows_logged_while_a_point_is_published_are_not_part_of_it(tmp_path, monkeypatch):
    digest = module.files_of

    def and_log(folder):
        with (tmp_path / "metrics.jsonl").open("a", encoding="utf-8") as log:
            log.write("later\n")
        return digest(folder)

    monkeypatch.setattr(module, "files_of", and_log)
    points = saved(tmp_path, 1)
    monkeypatch.undo()
    record = points.newest_good()
    assert module.log_sizes(record)["metrics.jsonl"] == len('{"step": 1}\n')


def test_rotation_keeps_the_newest_ones(tmp_path):
    saved(tmp_path, 1, 2, 3, 10, keep=3)
    assert names(tmp_path) == ["step-10", "step-2", "step-3"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_trouble_while_writing_leaves_the_last_good_point_alone(tmp_path, number):
    points = saved(tmp_path, 1, keep=1)

    def full(folder):
        (folder / "weights").write_text("half", encoding="utf-8")
        raise OSError(number, os.strerror(number), str(folder))

    with pytest.raises(OSError, match=os.strerror(number)):
        points.save(2, full, seconds=2.0)
    assert names(tmp_path) == ["step-1"]
    assert points.newest_good()["step"] == 1


def test_trouble_while_publishing_is_told_at_the_next_turn_and_loses_nothing(tmp_path, monkeypatch):
    points = saved(tmp_path, 1, keep=1)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(module, "settle", full)
        points.save(2, write("2"), seconds=2.0)
        with pytest.raises(OSError, match="No space left"):
            points.wait()
    assert names(tmp_path) == ["step-1"]
    assert points.newest_good()["step"] == 1


def test_a_killed_publication_leaves_the_point_before(tmp_path):
    points = saved(tmp_path, 1)
    half = tmp_path / "checkpoints" / ".step-2.tmp"
    half.mkdir()
    (half / "weights").write_text("2", encoding="utf-8")
    assert points.newest_good()["step"] == 1
    assert saved(tmp_path, 2).newest_good()["step"] == 2
    assert names(tmp_path) == ["step-1", "step-2"]


def test_what_a_killed_process_left_in_pieces_is_removed(tmp_path, monkeypatch):
    saved(tmp_path, 1, 2, 3, keep=3)
    folder = tmp_path / "checkpoints"

    class Killed(Exception):
        """Stands for the end of the process."""

    def half_removed(path):
        (path / "weights").unlink()
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(module.shutil, "rmtree", half_removed)
        with pytest.raises(Killed):
            points_of(tmp_path, keep=1).newest_good()
    (folder / ".step-7.tmp").mkdir()
    points = points_of(tmp_path, keep=2)
    assert points.newest_good()["step"] == 3
    assert names(tmp_path) == ["step-2", "step-3"]


def test_the_only_good_point_is_never_rotated_away(tmp_path):
    saved(tmp_path, 1, 2, 3, keep=3)
    for step in (2, 3):
        (tmp_path / "checkpoints" / f"step-{step}" / "weights").write_text("", encoding="utf-8")
    assert points_of(tmp_path, keep=1).newest_good()["step"] == 1
    assert names(tmp_path) == ["step-1"]


def flip_a_bit(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(bytes(data))


def test_any_flipped_bit_of_a_point_is_seen(tmp_path):
    points = saved(tmp_path, 1)
    folder = tmp_path / "checkpoints" / "step-1"
    for path in (folder / "weights", folder / "point.json"):
        for place in range(path.stat().st_size):
            flip_a_bit(path, place)
            if path.read_bytes()[place : place + 1] not in b" \n\r\t":  # white space says nothing
                assert fault_of(folder) is not None, f"{path.name} at {place}"
            flip_a_bit(path, place)
    assert fault_of(folder) is None
    assert points.newest_good()["step"] == 1


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "metrics.jsonl is shorter than it was then"),
        ('{"step": 2}\n', "metrics.jsonl was altered"),
    ],
)
def test_a_point_without_its_logs_is_not_used(tmp_path, caplog, text, reason):
    points = saved(tmp_path, 1)
    (tmp_path / "metrics.jsonl").write_text(text, encoding="utf-8")
    assert points.newest_good() is None
    assert reason in caplog.text


def test_rows_after_a_point_do_not_matter(tmp_path):
    points = saved(tmp_path, 1)
    with (tmp_path / "metrics.jsonl").open("a", encoding="utf-8") as log:
        log.write("half a ro")
    assert points.newest_good()["step"] == 1


def test_a_damaged_file_is_named_and_the_point_before_taken(tmp_path, caplog):
    points = saved(tmp_path, 1, 2)
    (tmp_path / "checkpoints" / "step-2" / "weights").write_text("", encoding="utf-8")
    assert points.newest_good()["step"] == 1
    assert "step-2 is not used: a file is missing, damaged or foreign (weights)" in caplog.text


def test_a_point_of_an_unknown_format_is_not_used(tmp_path, caplog):
    points = saved(tmp_path, 1)
    path = tmp_path / "checkpoints" / "step-1" / "point.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format_version": 99}))
    assert points.newest_good() is None
    assert "its format 99 is unknown here" in caplog.text


def test_other_settings_are_told_and_refused(tmp_path):
    saved(tmp_path, 1)
    other = points_of(tmp_path, key="other", config={"seed": 2})
    with pytest.raises(UserError, match="seed: 1 there, 2 here.*FORCE=1 to begin sft anew"):
        other.newest_good()
    assert names(tmp_path) == ["step-1"]
