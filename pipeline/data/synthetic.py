"""Made-up chats and ratings in the raw formats of the real sources: small, instant, no network.

Replies carry sentiment by their words, and ratings follow those words, so that a reward model
has something to learn. The texts are ours.
"""

import json
import random

from pipeline.data.ratings import SETS

GOOD = ("love", "great", "happy", "wonderful", "fun", "best", "nice", "awesome", "good", "amazing")
BAD = ("hate", "awful", "sad", "terrible", "boring", "worst", "bad", "horrible", "ugly", "angry")
TOPICS = (
    *(
        "music",
        "books",
        "films",
        "football",
        "cooking",
        "hiking",
        "school",
        "work",
        "coffee",
        "tea",
    ),
    *("cats", "dogs", "winter", "summer", "games", "trains", "boats", "maths", "painting", "rain"),
    *("dancing", "sleep", "bread", "soup", "snow", "chess", "guitars", "bikes", "gardens", "maps"),
)
PLACES = (
    *("home", "town", "school", "work", "the lake"),
    *("the park", "the beach", "the city", "the shop", "the hills"),
)
TIMES = ("today", "tonight", "tomorrow", "this week", "last month", "every day", "at noon")
QUESTIONS = (
    "do you like {topic} at {place} {time}?",
    "what did you think of {topic} {time}?",
    "how was {topic} at {place}?",
    "i am going to {place} for {topic} {time}",
    "my friend talks about {topic} {time}",
)
REPLIES = (
    "i think {topic} is {word} {time}",
    "{topic} was so {word} at {place}",
    "it was a {word} day with {topic} and {other}",
    "yes, {word} {topic}, and {other} too",
    "that sounds {word} to me, what about {other}?",
    "{word}! really {word} {topic} at {place}",
)
NUM_RATERS = 15


def chats(*, conversations: int, seed: int) -> bytes:
    """Returns a `dataset.json` of the given number of conversations, some of one turn only."""
    generator = random.Random(f"chats {seed}")
    content = {
        f"chat-{number:05d}": {"messages": _blocks(generator, turns=generator.randint(1, 9))}
        for number in range(conversations)
    }
    return json.dumps(content).encode()


def ratings(name: str, *, texts: int, seed: int) -> tuple[bytes, bytes]:
    """Returns a set's file of texts and file of ratings, `texts` lines each."""
    generator = random.Random(f"ratings {name} {seed}")
    per_document = 8 if SETS.index(name) >= 2 else 0
    texts_lines, ratings_lines = [], []
    for number in range(texts):
        key = f"{number // per_document}_{number % per_document}" if per_document else str(number)
        sign = generator.choice((-1, 0, 1))
        text = _sentence(generator, sign=sign)
        given = [_rating(generator, sign=sign) for _ in range(NUM_RATERS)]
        mean = sum(given) / NUM_RATERS
        texts_lines.append(f"{key}\t{mean}\t{text}\n")
        ratings_lines.append(f"{key}\t{mean}\t1.0\t{json.dumps(given)}\n")
    return "".join(texts_lines).encode(), "\ufeff".encode() + "".join(ratings_lines).encode()


def _blocks(generator: random.Random, *, turns: int) -> list[list[dict[str, str]]]:
    """Alternates questions and replies; one in six turns is two messages long."""
    blocks = []
    for turn in range(turns):
        sign = generator.choice((-1, 0, 1))
        texts = [_question(generator) if turn % 2 == 0 else _sentence(generator, sign=sign)]
        if generator.random() < 1 / 6:
            texts.append(_question(generator))
        blocks.append([{"text": text, "sender": str(turn % 2)} for text in texts])
    return blocks


def _question(generator: random.Random) -> str:
    return _fill(generator, generator.choice(QUESTIONS), word="")


def _sentence(generator: random.Random, *, sign: int) -> str:
    words = {1: GOOD, -1: BAD, 0: ("usual", "plain", "long", "new", "old")}[sign]
    return _fill(generator, generator.choice(REPLIES), word=generator.choice(words))


def _fill(generator: random.Random, template: str, *, word: str) -> str:
    return template.format(
        topic=generator.choice(TOPICS),
        other=generator.choice(TOPICS),
        place=generator.choice(PLACES),
        time=generator.choice(TIMES),
        word=word,
    )


def _rating(generator: random.Random, *, sign: int) -> int:
    return max(-4, min(4, round(generator.gauss(2.2 * sign, 0.9))))
