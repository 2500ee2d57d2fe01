"""Several scores become one, and a model's rows are divided over processes."""

import logging
import pickle

import pytest
import torch

from pipeline.errors import UserError
from pipeline.models import load_with_new_head
from pipeline.ppo import scorers
from pipeline.ppo.scorers import Divided, Rewards, TextScorer, combined, model_scorer
from pipeline.ppo.settings import Reward, Source
from pipeline.reward.reading import PairReading, TokenReading, Words
from pipeline.tokenizer import encode_prompt, encode_response, train_tokenizer
from tests.ppo.company import Company
from tests.ppo.worlds import trainer
from tests.reward.encoders import save_encoder, word_pieces
from tests.support import assert_close

SCORES = torch.tensor([[1.0, 4.0], [3.0, -2.0]], dtype=torch.float64)


@pytest.mark.parametrize(
    ("combine", "weights", "expected"),
    [
        ("sum", (1.0, 0.5), [2.5, 3.0]),  # 1 + 0.5 * 3, 4 - 0.5 * 2
        ("mean", (3.0, 1.0), [1.5, 2.5]),  # (3 * 1 + 3) / 4, (3 * 4 - 2) / 4
        ("min", (1.0, 1.0), [1.0, -2.0]),
        ("mean_minus_std", (1.0, 1.0), [1.0, -2.0]),  # 2 - 1, 1 - 3: deviations of two scores
    ],
)
def test_combinations_by_hand(combine, weights, expected):
    assert_close(combined(SCORES, weights=weights, combine=combine), expected)


def test_the_deviation_is_the_populations():
    three = torch.tensor([[0.0], [3.0], [3.0]], dtype=torch.float64)
    # mean 2, variance (4 + 1 + 1) / 3 = 2
    assert_close(combined(three, weights=(1.0,) * 3, combine="mean_minus_std"), [2.0 - 2.0**0.5])


def by_first_token(prompts, responses):
    rows = zip(prompts, responses, strict=True)
    return torch.tensor([float(prompt[0] + 10 * len(response)) for prompt, response in rows])


def test_the_parts_of_a_score_are_metrics_and_their_sum_is_what_is_maximised():
    ppo = trainer()
    ppo.rewards = Rewards(
        {"length": lambda p, r: torch.tensor([float(len(row)) for row in r]), "one": by_one},
        weights=(0.5, 2.0),
    )
    metrics = ppo.update(0).metrics
    assert metrics["score/length"] == pytest.approx(metrics["response/length_tokens"])
    assert metrics["score/one"] == 1.0
    assert metrics["objective/score"] == pytest.approx(0.5 * metrics["score/length"] + 2.0)


def by_one(prompts, responses):
    return torch.ones(len(responses))


@pytest.mark.parametrize("size", [2, 3])
def test_divided_rows_come_back_in_their_order(size, monkeypatch):
    company = Company(size)
    monkeypatch.setattr(scorers, "distributed", company)
    prompts, responses = [[row] for row in range(7)], [[1] * (row % 3 + 1) for row in range(7)]
    found = [None] * size

    def score(rank):
        found[rank] = Divided(by_first_token)(prompts, responses)

    company.work(score)
    for scores in found:
        assert_close(scores, by_first_token(prompts, responses))


def test_scores_are_sent_as_numbers(monkeypatch):
    company = Company(2)
    monkeypatch.setattr(scorers, "distributed", company)
    rows = [[1]] * 2000
    company.work(lambda _: Divided(by_one)(rows, rows))
    assert all(len(pickle.dumps(share)) < 10_000 for share in company.desk)


def test_long_texts_are_counted_and_cut_at_their_beginning(tmp_path, caplog):
    ours = train_tokenizer(["hello there, friend"] * 5, vocabulary_size=300)
    model = load_with_new_head(save_encoder(tmp_path, max_length=16), pad_id=0)
    model.config.reward_mean, model.config.reward_std = 1.0, 0.5
    prompts = [encode_prompt(ours, "a" * 40), encode_prompt(ours, "b")]
    words = Words.behind(prompts, ["a" * 40, "b"], tokenizer=ours)
    reading = PairReading(word_pieces(max_length=16))
    scorer = model_scorer(model, reading, words=words, name="bert", batch_size=8)
    assert isinstance(scorer, TextScorer)
    with caplog.at_level(logging.WARNING):
        scores = scorer(prompts, [encode_response(ours, "yes")] * 2)
    assert_close(scores, [-2.0, -2.0])  # a head of 0, less 1, by 0.5
    assert "score/bert: 1 of 2 texts are longer than its context of 16 tokens" in caplog.text
    with pytest.raises(UserError, match="score/bert: a bert encoder needs a tokenizer of its own"):
        model_scorer(model, TokenReading(ours), words=words, name="bert", batch_size=8)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({}, "a source: needs a model or a function, and not both"),
        ({"model": "reward", "function": "a:b"}, "needs a model or a function, and not both"),
        ({"function": "a.b"}, "b: a function is module:function, got 'a.b'"),
        ({"model": "reward", "weight": 0.0}, "reward: weight must be a number other than 0"),
        ({"function": "a:b", "timeout_seconds": 0.0}, "b: timeout_seconds must be positive"),
    ],
)
def test_a_source_that_means_nothing_is_refused(source, message):
    with pytest.raises(UserError, match=f"reward.sources: .*{message}"):
        Source(**source)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"combine": "max"}, "reward.combine: must be one of sum, mean, min, mean_minus_std"),
        ({"sources": [Source(model="reward")] * 2}, r"\['reward'\] stands there twice"),
        (
            {"sources": [Source(model="reward", weight=2.0)], "combine": "min"},
            "reward.combine: min has no weights",
        ),
        (
            {"sources": [Source(model="reward", weight=-1.0)], "combine": "mean"},
            "reward.combine: the weights of a mean must sum to more than 0",
        ),
    ],
)
def test_sources_that_do_not_go_together_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        Reward(**changes)
