"""The report on held-out texts: what each method learned from."""

import numpy as np
import pytest

from pipeline.reward import held_out
from pipeline.reward.reading import TokenReading
from tests.data.own import write_rows
from tests.reward.test_data import RANKING, Letters


class PaddedLetters(Letters):
    pad_token_id = 0


def trained(**changes):
    settings = {"row_type": "preferences", "max_length": 99, "report_gap": 0.5, "labels": "hard"}
    return held_out.Trained(**(settings | changes))


def reported(data, monkeypatch, **settings):
    """The report on test rankings of a model that scores everything alike."""
    monkeypatch.setattr(held_out, "raw_scores", lambda _, texts, **__: np.zeros(len(texts)))
    return held_out.held_out_report(
        None,
        reading=TokenReading(PaddedLetters()),
        data=data,
        split="test",
        trained=trained(**settings),
    )


def test_the_bag_of_words_learns_from_the_texts_that_the_model_was_trained_on(
    tmp_path, monkeypatch
):
    # In letters: prompt and marks take 14 tokens, EOS 1; of 20 in all 5 are left for a text.
    long = RANKING | {"responses": ["good", "so so", "far too long"]}
    alone = RANKING | {"responses": ["fine", "a long one", "another long one"]}
    write_rows(tmp_path, "preferences", split="train", rows=[long, alone])
    write_rows(tmp_path, "preferences", split="test", rows=[RANKING])
    learned: list[str] = []

    def recorded(texts, *, held_out, **_):
        learned.extend(texts)
        return np.zeros(len(held_out))

    monkeypatch.setattr(held_out, "bag_of_words_scores", recorded)
    report = reported(tmp_path, monkeypatch, max_length=20)
    assert learned == ["good", "so so"]
    assert report["sets"]["tweets"]["bag_of_words"]["value"] == 0.5


@pytest.mark.parametrize(("labels", "by"), [("raters", "raters"), ("hard", "order")])
def test_a_model_is_held_against_what_it_was_trained_on(tmp_path, monkeypatch, labels, by):
    raters = RANKING | {"ratings": [[2, 1], [1, 0], [0, 1]]}
    for split in ("train", "test"):
        write_rows(tmp_path, "preferences", split=split, rows=[raters])
    report = reported(tmp_path, monkeypatch, labels=labels)
    assert report["sets"]["tweets"]["calibration"]["observed_by"] == by
