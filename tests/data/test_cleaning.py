"""Cleaning: what it mends, and that a second pass changes nothing."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.cleaning import clean, has_marker, has_token, normalise, num_words, tidy


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ("rock &amp; roll", "rock & roll"),
        ("Hirschl &amp;amp; Adler", "Hirschl & Adler"),
        ("  two\n\twords ", "two words"),
        ("a\u0000b\ufeff", "a b"),
        ("I &lt;3 you", "I <3 you"),
    ],
)
def test_clean(raw, expected):
    assert clean(raw) == expected


@given(st.text())
def test_clean_is_idempotent(text):
    once = clean(text)
    assert clean(once) == once
    assert once.encode().decode() == once  # no lone surrogate is left


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (" a\n\n  b\tc ", "a\n\n  b\tc"),
        ("a\r\nb\rc", "a\nb\nc"),
        ("a\u0000b\ufeff", "a b"),
        ("&lt;p&gt;", "&lt;p&gt;"),
    ],
)
def test_tidy(raw, expected):
    assert tidy(raw) == expected


@given(st.text())
def test_tidy_is_idempotent(text):
    once = tidy(text)
    assert tidy(once) == once
    assert once.encode().decode() == once  # no lone surrogate is left


@pytest.mark.parametrize(
    ("one", "other"),
    [("How are you?", "how are you"), ("STOP!!!", "stop"), ("well - ok", "well ok")],
)
def test_normalise_is_equal_for_texts_that_read_the_same(one, other):
    assert normalise(one) == normalise(other)


def test_emoticons_stand_for_themselves():
    assert normalise(":)") == ":)"
    assert normalise(":)") != normalise(":(")


def test_small_measures():
    assert num_words("one two  three") == 3
    assert has_marker("this <|end|> ends")
    assert not has_marker("a <| b |>")
    assert has_token("<|im_start|>user")
    assert not has_token("a <| b |> and <b>")
