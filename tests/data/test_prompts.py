"""Prompts: distinct within a split, unseen in the splits before."""

from pipeline.data.prompts import prompts_of


def rows(*prompts: str):
    return [{"prompt": prompt, "completion": "c", "group": "g"} for prompt in prompts]


def turn(text: str):
    return {"messages": [{"role": "user", "content": text}], "group": "g"}


def test_prompts_are_distinct_and_unseen():
    prompts, dropped = prompts_of(
        {
            "train": rows("How are you?", "how are you", "a"),
            "validation": rows("HOW ARE YOU", "b"),
            "test": rows("how are you!", "b", "c", "said in training", "d", "D"),
        },
        texts={"train": [turn("Said in training.")], "test": [turn("c")]},
    )
    assert {split: [row["prompt"] for row in kept] for split, kept in prompts.items()} == {
        "train": ["How are you?", "a"],
        "validation": ["b"],
        "test": ["c", "d"],
    }
    assert dropped == {
        "a train prompt is a repetition": 1,
        "a validation prompt occurs in an earlier split": 1,
        "a test prompt occurs in an earlier split": 3,
        "a test prompt is a repetition": 1,
    }
    assert prompts["train"][0] == {"prompt": "How are you?", "group": "g"}


def test_prompts_of_several_messages():
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    row = {"prompt": [*messages, {"role": "user", "content": "c"}], "group": "g"}
    prompts, dropped = prompts_of({"train": [row], "test": [row]}, texts={})
    assert prompts["train"] == [row]
    assert dropped == {"a test prompt occurs in an earlier split": 1}
