"""Alpaca: instructions with and without an input, and the empty cells that it is known for."""

import pytest

from pipeline.errors import UserError
from tests.data.adapters.support import assistant, read, user

PLAIN = {"instruction": "Name a colour.", "input": "", "output": "Blue."}
ABOUT = {"instruction": "Translate.", "input": "bonjour\nmonde", "output": "hello\nworld"}


def test_the_input_stands_below_the_instruction(tmp_path):
    rows, dropped = read(tmp_path, [PLAIN, ABOUT | {"text": "left out"}], "alpaca", "instructions")
    assert [row["prompt"] for row in rows] == [
        [user("Name a colour.")],
        [user("Translate.\n\nbonjour\nmonde")],
    ]
    assert rows[1]["completion"] == [assistant("hello\nworld")]
    assert [row["group"] for row in rows] == ["name a colour", "translate bonjour monde"]
    assert not dropped


@pytest.mark.parametrize("row_type", ["text", "prompts"])
def test_the_other_types(tmp_path, row_type):
    (row,) = read(tmp_path, [PLAIN], "alpaca", row_type)[0]
    messages = [user("Name a colour."), assistant("Blue.")]
    assert (
        row
        == {
            "text": {"messages": messages, "group": "name a colour"},
            "prompts": {"prompt": messages[:1], "group": "name a colour"},
        }[row_type]
    )


@pytest.mark.parametrize("nothing", ["<noinput>", "<No input>", None, " "])
def test_an_input_that_is_none(tmp_path, nothing):
    (row,) = read(tmp_path, [PLAIN | {"input": nothing}], "alpaca", "instructions")[0]
    assert row["prompt"] == [user("Name a colour.")]


def test_empty_cells_of_a_csv_file(tmp_path):
    path = tmp_path / "alpaca.csv"
    path.write_text('instruction,input,output\nName a colour.,,Blue.\nSay it.,"a,b",\n')
    from pipeline.data.files import OwnRows
    from tests.data.own import read_own

    rows, source = read_own(OwnRows(path=str(path), schema="alpaca"), "instructions")
    assert [row["prompt"] for row in rows] == [[user("Name a colour.")]]
    assert source.dropped == {"no final reply": 1}


@pytest.mark.parametrize(
    ("odd", "reason"),
    [
        (PLAIN | {"output": ""}, "no final reply"),
        (PLAIN | {"output": None}, "no final reply"),
        (PLAIN | {"instruction": "\n"}, "an empty instruction"),
    ],
)
def test_an_empty_text_is_dropped(tmp_path, odd, reason):
    rows, dropped = read(tmp_path, [PLAIN, odd], "alpaca", "instructions")
    assert len(rows) == 1
    assert dropped == {reason: 1}


def test_a_file_of_another_schema_is_refused(tmp_path):
    for wrong, message in (
        ({"prompt": "p", "completion": "c"}, "instruction is missing"),
        ({"instruction": "p"}, "output is missing"),
        ({"instruction": ["p"], "output": "c"}, "instruction must be a text, got list"),
    ):
        with pytest.raises(UserError) as caught:
            read(tmp_path, [wrong], "alpaca", "instructions")
        assert f"foreign.jsonl line 1: {message}; alpaca needs instruction" in str(caught.value)


def test_it_holds_no_preferences(tmp_path):
    with pytest.raises(UserError, match=r"preferences\.schema: alpaca holds no preferences, only"):
        read(tmp_path, [PLAIN], "alpaca", "preferences")
