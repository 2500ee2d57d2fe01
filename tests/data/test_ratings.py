"""Ratings: the join by id, splits without leaks, rankings of one set."""

import pytest

from pipeline.data.cleaning import normalise
from pipeline.data.ratings import RatedText, parse_ratings, rankings, split_rated
from pipeline.data.splits import Split


def rated(name: str, key: str, text: str, score: int = 1) -> RatedText:
    return RatedText(set=name, id=key, text=text, ratings=(score, score))


def test_parse_joins_by_id_and_takes_the_mean_of_the_raw_ratings():
    texts = b"1\t9.9\tgood &amp; cheap\n2\t-1.0\tbad\r\n"
    given = "\ufeff2\t-1.0\t0.0\t[-1, -1, -1]\n1\t9.9\t0.5\t[1, 2, 2, 3]\n".encode()
    first, second = parse_ratings("tweets", texts=texts, ratings=given)
    assert (first.id, first.text, first.score) == ("1", "good & cheap", 2.0)
    assert (second.id, second.ratings) == ("2", (-1, -1, -1))


def test_incomplete_join_is_our_bug():
    with pytest.raises(AssertionError, match="tweets: texts and ratings differ"):
        parse_ratings("tweets", texts=b"1\t0\ta\n", ratings=b"2\t0\t0\t[1]\n")


def test_missing_column_is_our_bug():
    with pytest.raises(AssertionError, match="expected 3 columns"):
        parse_ratings("tweets", texts=b"1\t0\n", ratings=b"1\t0\t0\t[1]\n")


def test_groups():
    assert rated("nytEditorialSnippets", "12_3", "a").group == "nytEditorialSnippets/12"
    assert rated("tweets", "7", "Yay!!").group == rated("tweets", "8", "yay").group


def test_no_text_is_in_two_splits():
    items = [
        rated("nytEditorialSnippets", f"{n}_{k}", f"t{n % 40} {k}")
        for n in range(60)
        for k in range(5)
    ]
    by_split, dropped = split_rated(items, Split(), seed=1)
    texts = {name: {normalise(i.text) for i in items} for name, items in by_split.items()}
    assert not texts["train"] & texts["test"]
    assert not texts["train"] & texts["validation"]
    assert not texts["validation"] & texts["test"]
    assert sum(map(len, by_split.values())) + sum(dropped.values()) == len(items)
    assert any("occurs in an earlier split" in reason for reason in dropped)


def test_unusable_texts_are_counted():
    items = [rated("tweets", str(n), f"text {n}") for n in range(9)]
    items += [rated("tweets", "10", ""), rated("tweets", "11", "a <|pad|> b")]
    by_split, dropped = split_rated(items, Split(), seed=1)
    assert dropped == {"empty, or a special token in the text": 2}
    assert sum(map(len, by_split.values())) == 9


def test_rankings_hold_every_text_once_within_its_set():
    items = [rated("tweets", str(n), f"t{n}") for n in range(21)]
    items += [rated("movieReviewSnippets", str(n), f"m{n}") for n in range(7)]
    rows = rankings(items, ["hello there", "hi"], size=10, seed=1)
    assert [(row["set"], len(row["ids"])) for row in rows] == [
        ("tweets", 10),
        ("tweets", 11),  # 21 = 10 + 10 + 1, and one text alone cannot be compared
        ("movieReviewSnippets", 7),
    ]
    assert sorted(text for row in rows for text in row["responses"]) == sorted(
        item.text for item in items
    )
    assert all(row["prompts"][0] in ("hello there", "hi") for row in rows)
    assert rows == rankings(items, ["hello there", "hi"], size=10, seed=1)


def test_a_set_of_one_text_makes_no_row():
    assert rankings([rated("tweets", "1", "a")], ["p"], size=4, seed=1) == []
