"""Anthropic/hh-rlhf: transcripts of several turns, and everything that may be odd about them."""

import pytest

from pipeline.errors import UserError
from tests.data.adapters.support import assistant, read, user

FIRST = "\n\nHuman: May I ask?\n\nAssistant: Please do.\n\nHuman: What is a fjord?"
GOOD = {
    "chosen": f"{FIRST}\n\nAssistant: A long bay.\n\nIt lies between cliffs.",
    "rejected": f"{FIRST}\n\nAssistant: No idea.",
}
PROMPT = [user("May I ask?"), assistant("Please do."), user("What is a fjord?")]
REPLY = assistant("A long bay.\n\nIt lies between cliffs.")
GROUP = "may i ask"


def pair(chosen: str, rejected: str = "\n\nHuman: q\n\nAssistant: bad") -> dict[str, str]:
    return {"chosen": chosen, "rejected": rejected}


@pytest.mark.parametrize("name", ["hh.jsonl", "hh.parquet"])
def test_a_pair_answers_the_conversation_before_it(tmp_path, name):
    rows, dropped = read(tmp_path, [GOOD], "hh", "preferences", name=name)
    assert rows == [
        {
            "prompt": PROMPT,
            "chosen": [REPLY],
            "rejected": [assistant("No idea.")],
            "group": GROUP,
            "margin": None,
        }
    ]
    assert not dropped


@pytest.mark.parametrize(
    ("row_type", "expected"),
    [
        ("text", {"messages": [*PROMPT, REPLY], "group": GROUP}),
        ("instructions", {"prompt": PROMPT, "completion": [REPLY], "group": GROUP}),
        ("prompts", {"prompt": PROMPT, "group": GROUP}),
    ],
)
def test_the_chosen_transcript_gives_every_other_type(tmp_path, row_type, expected):
    assert read(tmp_path, [GOOD], "hh", row_type) == ([expected], {})


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (pair("\n\nHuman: q\n\nAssistant: bad"), "chosen and rejected are the same text"),
        (pair("\n\nHuman: q\n\nAssistant:"), "no final reply"),
        (pair("\n\nHuman: q\n\nAssistant: \n"), "no final reply"),
        (pair("\n\nHuman: q"), "no final reply"),
        (pair("\n\nHuman: q\n\nAssistant: a", "\n\nHuman: q"), "no final reply"),
        (pair("\n\nHuman: \n\nAssistant: a"), "an empty turn"),
        (
            pair("\n\nHuman: q\n\nAssistant:\n\nHuman: and?\n\nAssistant: a"),
            "an empty turn",
        ),
        (pair("\n\nAssistant: a"), "no turn of the user before the reply"),
        (pair("\n\nHuman: other\n\nAssistant: a"), "chosen and rejected answer different prompts"),
        (
            pair("\n\nHuman: q\n\nAssistant: x\n\nHuman: y\n\nAssistant: a"),
            "chosen and rejected answer different prompts",
        ),
    ],
)
def test_a_row_without_a_usable_pair_is_dropped(tmp_path, row, reason):
    rows, dropped = read(tmp_path, [GOOD, row], "hh", "preferences")
    assert len(rows) == 1
    assert dropped == {reason: 1}


def test_what_is_odd_about_the_rejected_reply_does_not_cost_an_instruction(tmp_path):
    broken = pair("\n\nHuman: q\n\nAssistant: a", "\n\nHuman: q")
    rows, dropped = read(tmp_path, [broken], "hh", "instructions")
    assert [row["completion"][0]["content"] for row in rows] == ["a"]
    assert not dropped


def test_a_prompt_needs_no_reply(tmp_path):
    rows, dropped = read(tmp_path, [pair("\n\nHuman: q\n\nAssistant:")], "hh", "prompts")
    assert rows == [{"prompt": [user("q")], "group": "q"}]
    assert not dropped


def test_turns_of_one_speaker_become_one(tmp_path):
    twice = pair(
        "\n\nHuman: q\n\nHuman: r\n\nAssistant: a", "\n\nHuman: q\n\nHuman: r\n\nAssistant: b"
    )
    rows, _ = read(tmp_path, [twice], "hh", "preferences")
    assert rows[0]["prompt"] == [user("q\n\nr")]


def test_a_speakers_name_within_a_line_begins_no_turn(tmp_path):
    row = pair(
        "\n\nHuman: q\n\nAssistant: See: Human: is a word", "\n\nHuman: q\n\nAssistant: b\nHuman: c"
    )
    rows, _ = read(tmp_path, [row], "hh", "preferences")
    assert rows[0]["chosen"] == [assistant("See: Human: is a word")]
    assert rows[0]["rejected"] == [assistant("b\nHuman: c")]


def test_conversations_that_begin_alike_are_one_document(tmp_path):
    shorter = pair(
        "\n\nHuman: may i ask\n\nAssistant: Yes.", "\n\nHuman: may i ask\n\nAssistant: No"
    )
    rows, _ = read(tmp_path, [GOOD, shorter], "hh", "preferences")
    assert [row["group"] for row in rows] == [GROUP, GROUP]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "p"}, "chosen is missing"),
        ({"chosen": "\n\nHuman: a\n\nAssistant: b"}, "rejected is missing"),
        (pair("Hello."), "chosen does not begin with 'Human:' or 'Assistant:'"),
        ({"chosen": [user("a")], "rejected": []}, "chosen must be a text, got list"),
    ],
)
def test_a_file_of_another_schema_is_refused(tmp_path, row, message):
    with pytest.raises(UserError) as caught:
        read(tmp_path, [GOOD, row], "hh", "preferences")
    assert f"foreign.jsonl line 2: {message}; hh needs chosen and rejected" in str(caught.value)


def test_null_is_an_empty_transcript(tmp_path):
    with pytest.raises(UserError, match="chosen does not begin with"):
        read(tmp_path, [{"chosen": None, "rejected": None}], "hh", "preferences")
