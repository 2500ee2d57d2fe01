"""OASST: the two exports of the same trees, ranks, and messages that must not be read."""

import copy
from typing import Any

import pytest

from pipeline.errors import UserError
from tests.data.adapters.support import assistant, read, user

TREE = "6ab24d72"


def node(key: str, text: str | None, *replies: dict[str, Any], **changes) -> dict[str, Any]:
    """A message as the export of trees holds it; the first letter of its key is its role."""
    made = {
        "message_id": key,
        "parent_id": None,
        "user_id": "u",
        "text": text,
        "role": {"p": "prompter", "a": "assistant"}[key[0]],
        "lang": "en",
        "review_count": 3,
        "review_result": True,
        "deleted": False,
        "rank": None,
        "synthetic": False,
        "replies": list(replies),
    }
    for reply in replies:
        reply["parent_id"] = key
    return made | changes


def tree(root: dict[str, Any] | None, *, key: str = TREE, state: str = "ready_for_export") -> Any:
    return {"message_tree_id": key, "tree_state": state, "prompt": root}


def flat(of: dict[str, Any]) -> list[dict[str, Any]]:
    """The same tree as the export of messages holds it, the first message last."""
    rows: list[dict[str, Any]] = []
    todo = [of["prompt"]]
    while todo:
        message = copy.deepcopy(todo.pop())
        todo += message.pop("replies")
        rows.append(
            message | {"message_tree_id": of["message_tree_id"], "tree_state": of["tree_state"]}
        )
    return rows[::-1]


def good() -> dict[str, Any]:
    """A question with three ranked replies; the best is asked back, which has one reply."""
    back = node("p2", "Cold?", node("a4", "Very cold."))
    return tree(
        node(
            "p1",
            "What is a fjord?",
            node("a1", "No idea.", rank=2),
            node("a2", "A long bay.\n\nBetween cliffs.", back, rank=0),
            node("a3", "A bay.", rank=1),
        )
    )


QUESTION = [user("What is a fjord?")]
BEST = assistant("A long bay.\n\nBetween cliffs.")
BACK = [*QUESTION, BEST, user("Cold?")]
FORMS = {
    "trees.jsonl": lambda of: [of],
    "messages.jsonl": flat,
    "messages.parquet": flat,
}


@pytest.mark.parametrize("name", FORMS)
def test_ranked_replies_are_a_ranking_the_best_one_first(tmp_path, name):
    rows, dropped = read(tmp_path, FORMS[name](good()), "oasst", "preferences", name=name)
    assert rows == [
        {
            "prompts": [QUESTION],
            "set": "oasst",
            "ids": ["a2", "a3", "a1"],
            "responses": [BEST["content"], "A bay.", "No idea."],
            "scores": [0.0, -1.0, -2.0],
            "ratings": [[], [], []],
            "group": TREE,
        }
    ]
    assert not dropped


@pytest.mark.parametrize("name", FORMS)
def test_the_best_reply_to_every_question_is_an_instruction(tmp_path, name):
    rows, dropped = read(tmp_path, FORMS[name](good()), "oasst", "instructions", name=name)
    assert rows == [
        {"prompt": QUESTION, "completion": [BEST], "group": TREE},
        {"prompt": BACK, "completion": [assistant("Very cold.")], "group": TREE},
    ]
    assert not dropped


@pytest.mark.parametrize("name", FORMS)
def test_every_question_is_a_prompt_and_the_best_way_is_the_text(tmp_path, name):
    rows = FORMS[name](good())
    prompts, _ = read(tmp_path, rows, "oasst", "prompts", name=name)
    assert [row["prompt"] for row in prompts] == [QUESTION, BACK]
    (text,) = read(tmp_path, rows, "oasst", "text", name=name)[0]
    assert text == {"messages": [*BACK, assistant("Very cold.")], "group": TREE}


def changed(place: str, **changes) -> dict[str, Any]:
    """The good tree with one of its messages changed."""
    made = good()
    todo = [made["prompt"]]
    while todo:
        message = todo.pop()
        if message["message_id"] == place:
            message.update(changes)
        todo += message["replies"]
    return made


@pytest.mark.parametrize(
    ("odd", "reason", "best"),
    [
        (changed("a2", deleted=True), "messages: deleted", "A bay."),
        (changed("a2", review_result=False), "messages: refused in review", "A bay."),
        (changed("a2", text=" "), "messages: an empty turn", "A bay."),
        (changed("a2", text=None), "messages: an empty turn", "A bay."),
        (changed("a2", role="prompter"), "messages: of the role that they answer", "A bay."),
    ],
)
def test_a_message_is_left_out_with_all_that_answers_it(tmp_path, odd, reason, best):
    rows, dropped = read(tmp_path, [odd], "oasst", "instructions")
    assert [row["completion"] for row in rows] == [[assistant(best)]]
    assert dropped == {reason: 1}


def test_a_message_without_a_parent_is_left_out(tmp_path):
    rows = [row for row in flat(good()) if row["message_id"] != "a2"]
    made, dropped = read(tmp_path, rows, "oasst", "prompts")
    assert [row["prompt"] for row in made] == [QUESTION]
    assert dropped == {"messages: the one they answer is missing": 1}


@pytest.mark.parametrize(
    ("odd", "reason"),
    [
        (tree(node("p1", "q", node("a1", "a")), state="growing"), "trees: not ready_for_export"),
        (tree(None), "trees: without their first message"),
        (tree(node("p1", "q", deleted=True)), "messages: deleted"),
        (tree(node("a1", "a")), "messages: of the role that they answer"),
        (
            tree(node("p1", "q", node("a1", "a"), node("a2", "b"))),
            "questions: several replies without a rank",
        ),
    ],
)
@pytest.mark.parametrize("row_type", ["instructions", "preferences"])
def test_a_tree_without_a_usable_question_is_dropped(tmp_path, odd, reason, row_type):
    rows, dropped = read(tmp_path, [good(), odd], "oasst", row_type)
    assert {row["group"] for row in rows} == {TREE}
    assert dropped == {reason: 1}


def test_a_message_without_an_id_is_nobody_s_parent(tmp_path):
    messages = flat(good())
    messages.append(messages[0] | {"message_id": "", "parent_id": "p1", "role": "assistant"})
    rows, _ = read(tmp_path, messages, "oasst", "prompts", name="messages.jsonl")
    assert [row["prompt"] for row in rows] == [QUESTION, BACK]


def test_messages_without_the_first_one_are_no_tree(tmp_path):
    rest = [row | {"message_tree_id": "other"} for row in flat(good()) if row["message_id"] != "p1"]
    _, dropped = read(tmp_path, [*flat(good()), *rest], "oasst", "prompts")
    assert dropped == {
        "messages: the one they answer is missing": 3,
        "trees: without their first message": 1,
    }


def test_equal_replies_are_one(tmp_path):
    twice = tree(
        node("p1", "q", node("a1", "a", rank=0), node("a2", " a", rank=1), node("a3", "b", rank=2))
    )
    (row,), dropped = read(tmp_path, [twice], "oasst", "preferences")
    assert (row["responses"], row["scores"]) == (["a", "b"], [0.0, -2.0])
    assert dropped == {"replies: the text of a better ranked one": 1}
    same = tree(node("p1", "q", node("a1", "a", rank=0), node("a2", "a", rank=1)), key="same")
    rows, dropped = read(tmp_path, [good(), same], "oasst", "preferences")
    assert len(rows) == 1
    assert dropped == {"replies: the text of a better ranked one": 1}


def test_a_missing_rank_may_be_nan(tmp_path):
    odd = tree(node("p1", "q", node("a1", "a", rank=float("nan")), node("a2", "b", rank=1.0)))
    (row,) = read(tmp_path, [odd], "oasst", "instructions")[0]
    assert row["completion"] == [assistant("b")]


@pytest.mark.parametrize("name", FORMS)
def test_languages(tmp_path, name):
    german = tree(node("p1", "Was?", node("a1", "Das."), lang="de"), key="german")
    rows = [*FORMS[name](good()), *FORMS[name](german)]
    made, dropped = read(tmp_path, rows, "oasst", "instructions", name=name, languages=("de",))
    assert [row["prompt"] for row in made] == [[user("Was?")]]
    assert dropped == {"documents in another language": 1}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"text": "a"}, "message_tree_id is missing"),
        ({"message_tree_id": "t"}, "prompt is missing"),
        (tree("q"), "prompt must be the first message, got str"),
        (tree(node("p1", "q", role="system")), "role must be prompter or assistant, got 'system'"),
        (tree(node("p1", "q") | {"replies": {}}), None),
        (tree(node("p1", "q") | {"replies": ["a"]}), "replies must be a list of messages"),
        (tree(node("p1", "q", deleted="False")), "deleted must be true or false, got str"),
        (tree(node("p1", "q", rank="0")), "rank must be a number, got str"),
        ({"message_id": "a", "text": "q"}, "message_tree_id is missing"),
        ({"message_id": "a", "message_tree_id": "t"}, "parent_id is missing"),
    ],
)
def test_a_file_of_another_schema_is_refused(tmp_path, wrong, message):
    if message is None:  # an empty object is as good as an empty list
        assert read(tmp_path, [wrong], "oasst", "prompts")[0][0]["prompt"] == [user("q")]
        return
    with pytest.raises(UserError) as caught:
        read(tmp_path, [good(), wrong], "oasst", "prompts")
    assert f"foreign.jsonl line 2: {message}; oasst needs message_id, parent_id," in str(
        caught.value
    )
