"""Made-up documents in every foreign schema, a bad row among them: the texts are ours.

Replies end well or badly, and the people who chose prefer those that end well, so that a reward
model has something to learn.
"""

import random
from collections.abc import Callable, Iterator
from typing import Any

Foreign = dict[str, Any]

THINGS = ("tea", "rain", "chess", "soup", "maps", "trains", "snow", "bread", "cats", "boats")
PLACES = ("home", "town", "school", "the lake", "the park", "the hills")
GOOD, BAD = ("great", "lovely", "nice"), ("awful", "sad", "boring")


def documents(schema: str, *, count: int, seed: int) -> list[Foreign]:
    """Returns rows of that many documents in one of the schemas."""
    generator = random.Random(f"{schema} {seed}")
    return [row for number in range(count) for row in MAKERS[schema](generator, number)]


def _question(generator: random.Random, number: int) -> str:
    return f"number {number}: how is {generator.choice(THINGS)} at {generator.choice(PLACES)}?"


def _reply(generator: random.Random, words: tuple[str, ...]) -> str:
    return f"i think {generator.choice(THINGS)} is\n{generator.choice(words)}"


def _exchange(generator: random.Random, number: int) -> tuple[str, str, str]:
    """A question, a good reply and a bad one; the same one for one document in ten."""
    good, bad = _reply(generator, GOOD), _reply(generator, BAD)
    return _question(generator, number), good, good if number % 10 == 3 else bad


def _hh(generator: random.Random, number: int) -> Iterator[Foreign]:
    """A conversation that grows: a second row goes on after the first one's chosen reply."""
    first, good, bad = _exchange(generator, number)
    opening = f"\n\nHuman: {first}"
    yield {
        "chosen": f"{opening}\n\nAssistant: {good}",
        "rejected": f"{opening}\n\nAssistant: {bad}",
    }
    second, better, worse = _exchange(generator, number)
    longer = f"{opening}\n\nAssistant: {good}\n\nHuman: {second}"
    yield {
        "chosen": f"{longer}\n\nAssistant: {better}",
        "rejected": f"{longer}\n\nAssistant: {worse}",
    }


def _tldr(generator: random.Random, number: int) -> Iterator[Foreign]:
    """One post, compared by two workers."""
    post, good, bad = _exchange(generator, number)
    info = {"id": f"t3_{number:05x}", "subreddit": "tea", "title": "hello", "post": post}
    for worker in ("w1", "w2"):
        choice = generator.randrange(2)
        texts = (bad, good) if choice else (good, bad)
        yield {
            "info": info | {"site": None, "article": None},
            "summaries": [{"text": f" {text}", "policy": "sup1", "note": None} for text in texts],
            "choice": choice,
            "worker": worker,
            "batch": "batch0",
            "split": "train",
            "extra": {"confidence": None},
        }


def _ultrafeedback(generator: random.Random, number: int) -> Iterator[Foreign]:
    question, good, bad = _exchange(generator, number)
    asked = {"role": "user", "content": question}
    chosen, rejected = ([asked, {"role": "assistant", "content": reply}] for reply in (good, bad))
    yield {
        "prompt": question,
        "prompt_id": f"{number:064x}",
        "chosen": chosen,
        "rejected": rejected,
        "messages": chosen,
        "score_chosen": 8.0,
        "score_rejected": 4.5,
    }


def _sharegpt(generator: random.Random, number: int) -> Iterator[Foreign]:
    """A conversation cut into two pieces; an empty turn in one document of ten."""
    for piece in (0, 4):
        turns = []
        for _ in range(2):
            question, good, bad = _exchange(generator, number)
            turns += [("human", question), ("gpt", "" if good == bad else good)]
        conversations = [{"from": speaker, "value": text} for speaker, text in turns]
        yield {"id": f"Zq{number:05d}_{piece}", "conversations": conversations}


def _alpaca(generator: random.Random, number: int) -> Iterator[Foreign]:
    question, good, bad = _exchange(generator, number)
    given = generator.choice(("", "<noinput>", "about tea"))
    yield {"instruction": question, "input": given, "output": "" if good == bad else good}


def _oasst(generator: random.Random, number: int) -> Iterator[Foreign]:
    """The messages of one tree: a question, two ranked replies, a question back, its reply."""
    question, good, bad = _exchange(generator, number)
    back, better, worse = _exchange(generator, number)
    messages = (
        ("p0", None, question, None),
        ("a0", "p0", good, 0),
        ("a1", "p0", bad if bad != good else "deleted", 1),
        ("p1", "a0", back, None),
        ("a2", "p1", better, 0),
        ("a3", "p1", f"{worse} indeed", 1),
    )
    for key, parent, text, rank in messages:
        yield {
            "message_id": f"{number}-{key}",
            "parent_id": f"{number}-{parent}" if parent else None,
            "message_tree_id": f"{number}-p0",
            "tree_state": "ready_for_export",
            "text": text,
            "role": "prompter" if key[0] == "p" else "assistant",
            "lang": "en",
            "rank": rank,
            "deleted": text == "deleted",
            "review_result": True,
            "synthetic": False,
        }


MAKERS: dict[str, Callable[[random.Random, int], Iterator[Foreign]]] = {
    "hh": _hh,
    "tldr": _tldr,
    "ultrafeedback": _ultrafeedback,
    "sharegpt": _sharegpt,
    "alpaca": _alpaca,
    "oasst": _oasst,
}
