"""Files on disk: rows that are read back, what is named when it is damaged, nested names."""

import pytest

from pipeline.errors import UserError
from pipeline.storage import faults, files_of, flatten, read_jsonl


def test_rows_of_a_missing_file_are_none(tmp_path):
    assert read_jsonl(tmp_path / "metrics.jsonl") == []


def test_a_damaged_line_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": \n')
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 2: not JSON"):
        read_jsonl(path)


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
