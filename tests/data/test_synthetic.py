"""Made-up data: the raw formats of the real sources, and ratings that follow the words."""

import pytest

from pipeline.data import synthetic
from pipeline.data.chitchat import parse_conversations
from pipeline.data.ratings import SETS, parse_ratings


def test_chats_parse_and_repeat():
    raw = synthetic.chats(conversations=50, seed=1)
    conversations = parse_conversations(raw)
    assert len(conversations) == 50
    assert {len(chat.turns) for chat in conversations} >= {1, 2, 9}
    assert raw == synthetic.chats(conversations=50, seed=1)
    assert raw != synthetic.chats(conversations=50, seed=2)


@pytest.mark.parametrize("name", SETS)
def test_ratings_follow_the_words(name):
    texts, given = synthetic.ratings(name, texts=100, seed=1)
    items = parse_ratings(name, texts=texts, ratings=given)
    assert len(items) == 100
    assert all(-4 <= rating <= 4 for item in items for rating in item.ratings)
    good = [i.score for i in items if any(word in i.text.split() for word in synthetic.GOOD)]
    bad = [i.score for i in items if any(word in i.text.split() for word in synthetic.BAD)]
    assert min(good) > max(bad)
