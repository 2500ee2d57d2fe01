"""TL;DR in its three published forms: comparisons, filtered posts, and prompts that are written."""

from typing import Any

import pytest

from pipeline.errors import UserError
from tests.data.adapters.support import assistant, read, user

POST = {
    "id": "t3_abc12",
    "subreddit": "tea",
    "title": "Which cup?",
    "post": "I broke my cup.\n\nNow what?",
}
PROMPT = "SUBREDDIT: r/tea\n\nTITLE: Which cup?\n\nPOST: I broke my cup.\n\nNow what?\n\nTL;DR:"


def comparison(
    texts: tuple[Any, ...] = (" Bad cup.", " My cup broke."), **changes
) -> dict[str, Any]:
    made = {
        "info": {**POST, "site": None, "article": None},
        "summaries": [{"text": text, "policy": "sup2", "note": None} for text in texts],
        "choice": 1,
        "worker": "w1",
        "batch": "batch3",
        "split": "train",
        "extra": {"confidence": 7},
    }
    return made | changes


def filtered(**changes) -> dict[str, Any]:
    return POST | {"summary": "Cup broke; advice?"} | changes


@pytest.mark.parametrize("name", ["foreign.jsonl", "foreign.parquet"])
def test_the_choice_says_which_summary_is_better(tmp_path, name):
    first = comparison(("One.", "Two."), choice=0)
    rows, dropped = read(tmp_path, [comparison(), first], "tldr", "preferences", name=name)
    assert [row["prompt"] for row in rows] == [[user(PROMPT)]] * 2
    assert [row["chosen"][0]["content"] for row in rows] == ["My cup broke.", "One."]
    assert [row["rejected"][0]["content"] for row in rows] == ["Bad cup.", "Two."]
    assert [row["group"] for row in rows] == ["t3_abc12"] * 2
    assert not dropped


def test_the_three_forms_write_the_same_prompt(tmp_path):
    written = {"prompt": PROMPT, "completion": " Cup broke; advice?"}
    prompts = [
        read(tmp_path, [row], "tldr", "instructions")[0][0]["prompt"]
        for row in (comparison(), filtered(), written)
    ]
    assert prompts == [[user(PROMPT)]] * 3


def test_a_post_gives_an_instruction_a_text_and_a_prompt(tmp_path):
    reply = assistant("Cup broke; advice?")
    assert read(tmp_path, [filtered()], "tldr", "instructions")[0][0]["completion"] == [reply]
    assert read(tmp_path, [filtered()], "tldr", "text")[0][0]["messages"] == [user(PROMPT), reply]
    assert read(tmp_path, [filtered()], "tldr", "prompts")[0] == [
        {"prompt": [user(PROMPT)], "group": "t3_abc12"}
    ]


def test_written_prompts_are_their_own_document(tmp_path):
    pair = {"prompt": PROMPT, "chosen": " A.", "rejected": " B."}
    (row,) = read(tmp_path, [pair], "tldr", "preferences")[0]
    assert (row["chosen"], row["rejected"]) == ([assistant("A.")], [assistant("B.")])
    assert row["group"].startswith("subreddit r tea title which cup")


@pytest.mark.parametrize(
    ("odd", "reason"),
    [
        (comparison(("Same.", " Same. ")), "chosen and rejected are the same text"),
        (comparison(("One.", "")), "no final reply"),
        (comparison(("One.", None)), "no final reply"),
        (comparison(("One.",)), "no choice between two summaries"),
        (comparison(choice=None), "no choice between two summaries"),
        (comparison(choice=-1), "no choice between two summaries"),
        (
            comparison(info={"id": "x", "post": None, "title": "t", "article": "News.",
                             "subreddit": None}),
            "no post of Reddit (a news article)",
        ),
        (comparison(info=POST | {"post": " "}), "an empty post"),
        ({"prompt": " ", "chosen": "a", "rejected": "b"}, "an empty turn"),
    ],
)  # fmt: skip
def test_a_comparison_that_compares_nothing_is_dropped(tmp_path, odd, reason):
    rows, dropped = read(tmp_path, [comparison(), odd], "tldr", "preferences")
    assert len(rows) == 1
    assert dropped == {reason: 1}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"text": "a"}, "post is missing"),
        (filtered(), "a row with one summary is no comparison"),
        (comparison(info="t3_abc12"), "info must be an object {id, subreddit, title, post}"),
        (comparison(summaries=["One.", "Two."]), "summaries must be a list of two summaries"),
        (comparison(choice="left"), "choice must be 0 or 1, got str"),
        ({"info": POST, "summary": {"text": "a"}}, "summary must be a text, got dict"),
        ({"prompt": "p"}, "summary is missing"),
    ],
)
def test_a_file_of_another_schema_is_refused(tmp_path, wrong, message):
    with pytest.raises(UserError) as caught:
        read(tmp_path, [wrong], "tldr", "preferences")
    assert f"foreign.jsonl line 1: {message}" in str(caught.value)
    assert "tldr needs info, summaries and choice (comparisons); or post" in str(caught.value)
