"""Rows of JSON Lines files: what is read back, and which line is named when it is damaged."""

import pytest

from pipeline.errors import UserError
from pipeline.storage import read_jsonl


def test_rows_of_a_missing_file_are_none(tmp_path):
    assert read_jsonl(tmp_path / "metrics.jsonl") == []


def test_a_damaged_line_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": \n')
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 2: not JSON"):
        read_jsonl(path)
