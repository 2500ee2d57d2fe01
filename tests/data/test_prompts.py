"""Prompts: distinct within a split, unseen in the splits before."""

from itertools import compress

from pipeline.data.prompts import kept_prompts, prompt_row


def rows(*prompts: str):
    return [{"prompt": prompt, "completion": "c", "group": "g"} for prompt in prompts]


def turn(text: str):
    return {"messages": [{"role": "user", "content": text}], "group": "g"}


def test_prompts_are_distinct_and_unseen():
    given = {
        "train": rows("How are you?", "how are you", "a"),
        "validation": rows("HOW ARE YOU", "b"),
        "test": rows("how are you!", "b", "c", "said in training", "d", "D"),
    }
    kept, dropped = kept_prompts(
        given, texts={"train": [turn("Said in training.")], "test": [turn("c")]}
    )
    prompts = {split: compress(given[split], mask) for split, mask in kept.items()}
    assert {split: [row["prompt"] for row in some] for split, some in prompts.items()} == {
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
    assert prompt_row(given["train"][0]) == {"prompt": "How are you?", "group": "g"}


def test_prompts_of_several_messages():
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    row = {"prompt": [*messages, {"role": "user", "content": "c"}], "group": "g"}
    kept, dropped = kept_prompts({"train": [row], "test": [row]}, texts={})
    assert kept["train"].tolist() == [True]
    assert dropped == {"a test prompt occurs in an earlier split": 1}
