"""HuggingFaceH4/ultrafeedback_binarized: messages and scores, and what may be odd about them."""

from typing import Any

import pytest

from pipeline.errors import UserError
from tests.data.adapters.support import assistant, read, user


def row(
    *, replies: tuple[str, str] = ("Yes.", "No."), scores: tuple[Any, Any] = (8.5, 6.0), **changes
) -> dict[str, Any]:
    chosen, rejected = replies
    made = {
        "prompt": "Is it so?",
        "prompt_id": "0f3a",
        "chosen": [user("Is it so?"), assistant(chosen)],
        "rejected": [user("Is it so?"), assistant(rejected)],
        "messages": [user("Is it so?"), assistant(chosen)],
        "score_chosen": scores[0],
        "score_rejected": scores[1],
    }
    return made | changes


@pytest.mark.parametrize("name", ["foreign.jsonl", "foreign.parquet"])
def test_the_margin_is_the_difference_of_the_scores(tmp_path, name):
    rows, dropped = read(tmp_path, [row()], "ultrafeedback", "preferences", name=name)
    assert rows == [
        {
            "prompt": [user("Is it so?")],
            "chosen": [assistant("Yes.")],
            "rejected": [assistant("No.")],
            "margin": 2.5,
            "group": "is it so",
        }
    ]
    assert not dropped


def test_the_chosen_conversation_gives_every_other_type(tmp_path):
    prompt, reply = [user("Is it so?")], assistant("Yes.")
    assert read(tmp_path, [row()], "ultrafeedback", "text")[0][0]["messages"] == [*prompt, reply]
    (instruction,) = read(tmp_path, [row()], "ultrafeedback", "instructions")[0]
    assert (instruction["prompt"], instruction["completion"]) == (prompt, [reply])
    assert read(tmp_path, [row()], "ultrafeedback", "prompts")[0][0]["prompt"] == prompt


@pytest.mark.parametrize(
    ("odd", "reason"),
    [
        (row(replies=("No.", "No.")), "chosen and rejected are the same text"),
        (row(scores=(7, 7)), "the chosen reply scores no higher than the rejected one"),
        (row(scores=(3.0, 7.5)), "the chosen reply scores no higher than the rejected one"),
        (row(replies=("", "No.")), "no final reply"),
        (row(replies=("Yes.", " \n")), "no final reply"),
        (row(rejected=[user("Is it so?")]), "no final reply"),
        (row(chosen=[]), "no final reply"),
        (row(rejected=[user("What?"), assistant("No.")]), "chosen and rejected answer different"),
        (row(chosen=[user(""), assistant("a")]), "an empty turn"),
        (
            row(chosen=[{"role": "tool", "content": "4"}, assistant("a")]),
            "a turn of another speaker than user, assistant, system",
        ),
    ],
)
def test_a_row_without_a_usable_pair_is_dropped(tmp_path, odd, reason):
    rows, dropped = read(tmp_path, [row(), odd], "ultrafeedback", "preferences")
    assert len(rows) == 1
    ((why, count),) = dropped.items()
    assert why.startswith(reason)
    assert count == 1


def test_a_system_message_stays_and_an_empty_one_is_none(tmp_path):
    system, empty = ({"role": "system", "content": text} for text in ("Be brief.", ""))
    rows, _ = read(
        tmp_path,
        [
            row(chosen=[one, user("q"), assistant("a")], rejected=[one, user("q"), assistant("b")])
            for one in (system, empty)
        ],
        "ultrafeedback",
        "preferences",
    )
    assert [one["prompt"] for one in rows] == [[system, user("q")], [user("q")]]


@pytest.mark.parametrize("scores", [(None, None), (8.0, None), (float("nan"), 1.0)])
def test_without_both_scores_there_is_no_margin(tmp_path, scores):
    (made,) = read(tmp_path, [row(scores=scores)], "ultrafeedback", "preferences")[0]
    assert made["margin"] is None


def test_rows_of_that_schema_without_scores_are_read_too(tmp_path):
    bare = {name: value for name, value in row().items() if not name.startswith("score")}
    (made,) = read(tmp_path, [bare], "ultrafeedback", "preferences")[0]
    assert made["margin"] is None


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"prompt": "p", "chosen": "a", "rejected": "b"}, "chosen must be a list of turns"),
        ({"chosen": [user("q"), assistant("a")]}, "rejected is missing"),
        (row(chosen=[{"from": "human", "value": "q"}]), "a turn of chosen needs role and content"),
        (row(scores=("high", 1)), "score_chosen must be a number, got str"),
    ],
)
def test_a_file_of_another_schema_is_refused(tmp_path, wrong, message):
    with pytest.raises(UserError) as caught:
        read(tmp_path, [wrong], "ultrafeedback", "preferences")
    assert f"foreign.jsonl line 1: {message}" in str(caught.value)
    assert "ultrafeedback needs chosen and rejected, lists of messages" in str(caught.value)
