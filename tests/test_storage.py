"""Files on disk: rows that are read back, and the disk's own troubles told as such."""

import errno
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from pipeline.errors import UserError
from pipeline.points import Points
from pipeline.storage import (
    faults,
    files_of,
    flatten,
    make_folder,
    read_jsonl,
    telling_disk_trouble,
)
from stages import data


def test_rows_of_a_missing_file_are_none(tmp_path):
    assert read_jsonl(tmp_path / "metrics.jsonl") == []


def test_a_damaged_line_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": \n')
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 2: not JSON"):
        read_jsonl(path)


def test_a_folder_that_cannot_be_made_is_one_line(caplog):
    told = "/proc/x: no folder can be made there. Choose another one with RUN="
    with pytest.raises(UserError, match=told):
        make_folder(Path("/proc/x"))
    assert data.main(["--recipe=smoke", "--run=/proc/x", "--tracking=none"]) == 2
    assert caplog.records[-1].getMessage() == f"data: {told}"


def test_torch_on_a_full_disk_is_told_as_the_disks_error(tmp_path):
    with (
        pytest.raises(OSError, match="No space left on device") as caught,
        telling_disk_trouble(tmp_path),
    ):
        torch.save({"weights": torch.zeros(1_000_000)}, "/dev/full")
    assert caught.value.errno == errno.ENOSPC


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_safetensors_trouble_is_told_with_the_systems_number(tmp_path, number):
    text = f"Error while serializing: I/O error: what it says (os error {number})"
    with pytest.raises(OSError, match=str(tmp_path)) as caught, telling_disk_trouble(tmp_path):
        raise SafetensorError(text)
    assert caught.value.errno == number


def test_other_errors_are_left_alone(tmp_path):
    with pytest.raises(RuntimeError, match="shapes"), telling_disk_trouble(tmp_path):
        raise RuntimeError("shapes do not fit")
    with pytest.raises(SafetensorError, match="header"), telling_disk_trouble(tmp_path):
        raise SafetensorError("invalid header")


@pytest.fixture
def tiny_disk(tmp_path):
    """A file system of 2 MB, where this machine lets us make one."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(words, capture_output=True).returncode:
        pytest.skip("only root may make a file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_fills_up_in_the_middle_of_a_save_keeps_the_last_good_point(tiny_disk):
    def write(size):
        return lambda path: torch.save(torch.zeros(size), path / "state.pt")

    points = Points("sft", tiny_disk, {"key": "k", "config": {}, "parents": {}}, keep=2)
    points.save(1, write(200_000), seconds=1.0)
    points.wait()
    with pytest.raises(OSError, match="No space left"), telling_disk_trouble(tiny_disk):
        points.save(2, write(400_000), seconds=2.0)
    assert [path.name for path in (tiny_disk / "checkpoints").iterdir()] == ["step-1"]
    assert points.newest_good()["step"] == 1


def test_faults_are_named_by_file_whatever_their_number(tmp_path):
    for number in range(40):
        (tmp_path / f"{number:02d}").write_text(f"file {number}")
    recorded = files_of(tmp_path)
    assert faults(tmp_path, recorded) == {}
    (tmp_path / "07").write_text("File 7")  # of the same size
    (tmp_path / "21").write_text("file 21 and more")
    (tmp_path / "33").unlink()
    assert faults(tmp_path, recorded) == {
        "07": "was altered",
        "21": "was altered",
        "33": "is missing",
    }


def test_nested_names_become_dotted_ones():
    assert flatten({"a": {"b": 1, "c": {"d": 2}}, "e": 3}) == {"a.b": 1, "a.c.d": 2, "e": 3}
