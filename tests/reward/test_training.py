"""The trainer's loss over microbatches and processes, the new head, scores and constants."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification

from pipeline.errors import UserError
from pipeline.ppo.rollout import generate
from pipeline.reward import constants, packing
from pipeline.reward.baseline import bag_of_words_scores, sampled_pairs
from pipeline.reward.constants import sample_replies, score_constants
from pipeline.reward.data import Encoded, Ranking, RankingCollator, features
from pipeline.reward.scores import raw_scores
from pipeline.reward.settings import Normalisation
from pipeline.reward.training import (
    RankingTrainer,
    add_dropout,
    check_packing,
    reward_model_from,
)
from tests.support import assert_close, tiny_llama, tiny_reward_model

TOKENS = SimpleNamespace(eos_token_id=1, pad_token_id=0)


def row(seed: int, *, num_texts: int) -> dict[str, object]:
    """A ranking of random texts to one prompt, longer for a larger seed."""
    generator = np.random.default_rng(seed)
    prompt = [3, *generator.integers(5, 24, size=seed).tolist(), 4]
    sequences = [
        [*prompt, *generator.integers(5, 24, size=generator.integers(1, 9)).tolist(), 1]
        for _ in range(num_texts)
    ]
    ranking = Ranking(
        scale="g",
        group="g",
        set="s",
        prompts=["p"] * num_texts,
        responses=["r"] * num_texts,
        scores=generator.normal(size=num_texts).tolist(),
        ratings=None,
    )
    starts = [[len(prompt)] * num_texts]
    one = Encoded(
        rankings=[ranking],
        sequences=[sequences],
        lowered=[sequences],
        starts=starts,
        num_dropped=0,
    )
    return features(one, min_gap=0.1, soft=False)[0]


def loss_of(model, rows, *, num_processes: int = 1, comparisons: int, packed: bool = True):
    """What one process's compute_loss returns for its rows."""
    batch = RankingCollator(pad_id=0, packed=packed)(rows)
    accelerator = SimpleNamespace(num_processes=num_processes, unwrap_model=lambda model: model)
    process = SimpleNamespace(accelerator=accelerator)
    return RankingTrainer.compute_loss(
        process, model, batch, num_items_in_batch=torch.tensor(comparisons)
    )


@torch.no_grad()
def slow_loss(model, rows) -> float:
    """Mean over all comparisons, every text scored by itself without padding."""
    losses = []
    for each in rows:
        scores = [
            float(model(input_ids=torch.tensor([ids])).logits[0, 0]) for ids in each["sequences"]
        ]
        for better, worse in zip(each["better"], each["worse"], strict=True):
            losses.append(math.log1p(math.exp(scores[worse] - scores[better])))
    return sum(losses) / len(losses)


@pytest.mark.parametrize("row_tokens", [1, 16, 192])
def test_the_loss_is_the_mean_over_comparisons_however_texts_are_packed(monkeypatch, row_tokens):
    monkeypatch.setattr(packing, "ROW_TOKENS", row_tokens)
    model, rows = tiny_reward_model().double(), [row(1, num_texts=5), row(2, num_texts=3)]
    total = sum(len(each["better"]) for each in rows)
    found = loss_of(model, rows, comparisons=total)
    assert_close(found, slow_loss(model, rows), tolerance=1e-6)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_packed_texts_are_apart_in_every_kind_of_attention(attention, bf16):
    model, rows = tiny_reward_model(), [row(1, num_texts=5), row(2, num_texts=3)]
    model.set_attn_implementation(attention)
    total = sum(len(each["better"]) for each in rows)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
        packed = loss_of(model, rows, comparisons=total)
        whole = loss_of(model, rows, comparisons=total, packed=False)
    # A text that saw its neighbours would move the loss by some 1e-3; bf16 alone by less than 1e-4.
    assert_close(packed, whole, tolerance=3e-4 if bf16 else 1e-6)


@pytest.mark.parametrize(
    ("model_type", "options", "reads"),
    [
        ("gptj", {"n_embd": 16, "n_layer": 1, "n_head": 2, "rotary_dim": 4}, True),
        ("bloom", {"hidden_size": 16, "n_layer": 1, "n_head": 2}, False),
    ],
)
def test_a_model_that_reads_no_packed_texts_is_told_of_before_training(
    model_type, options, reads, monkeypatch
):
    config = AutoConfig.for_model(
        model_type, vocab_size=24, pad_token_id=0, num_labels=1, **options
    )
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config).eval()
    if reads:
        check_packing(model)
        monkeypatch.setattr(packing, "_visible", everything_before)
    with pytest.raises(UserError, match=rf"pack: {model_type} does not read texts.*Set pack of"):
        check_packing(model)


def everything_before(owner):
    """What a token sees where nothing keeps texts apart."""
    return torch.ones(*owner.shape, owner.shape[1], dtype=torch.bool).tril()


def test_texts_that_are_read_whole_have_the_same_loss():
    model, rows = tiny_reward_model().double(), [row(1, num_texts=5), row(2, num_texts=3)]
    total = sum(len(each["better"]) for each in rows)
    found = loss_of(model, rows, comparisons=total, packed=False)
    assert_close(found, slow_loss(model, rows), tolerance=1e-6)


def test_the_gradient_flows_through_the_prompt_that_texts_share():
    model, rows = tiny_reward_model().double(), [row(1, num_texts=5), row(2, num_texts=3)]
    total = sum(len(each["better"]) for each in rows)
    loss_of(model, rows, comparisons=total).backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    scores = [
        torch.stack([model(input_ids=torch.tensor([ids])).logits[0, 0] for ids in r["sequences"]])
        for r in rows
    ]
    margins = [s[r["better"]] - s[r["worse"]] for s, r in zip(scores, rows, strict=True)]
    (-torch.nn.functional.logsigmoid(torch.cat(margins)).mean()).backward()
    for name, parameter in model.named_parameters():
        assert_close(found[name], parameter.grad, tolerance=1e-5)


def test_two_processes_average_to_the_loss_of_one():
    model, rows = tiny_reward_model(), [row(1, num_texts=5), row(2, num_texts=3)]
    total = sum(len(each["better"]) for each in rows)
    alone = loss_of(model, rows, comparisons=total)
    parts = [loss_of(model, [each], num_processes=2, comparisons=total) for each in rows]
    assert_close(sum(parts) / 2, alone)


def test_the_head_is_new_and_the_body_is_the_language_models(tmp_path):
    lm = tiny_llama(hidden=64)
    lm.save_pretrained(tmp_path)
    model = reward_model_from(tmp_path, pad_id=0, seed=3)
    body, expected = model.model.state_dict(), lm.model.state_dict()
    assert all(torch.equal(body[name], expected[name]) for name in expected)
    assert model.score.weight.shape == (1, 64)
    # 64 draws of standard deviation 1/sqrt(65) = 0.124: within a third of it.
    assert float(model.score.weight.detach().std()) == pytest.approx(1 / math.sqrt(65), rel=0.33)
    assert model.config.pad_token_id == 0
    again = reward_model_from(tmp_path, pad_id=0, seed=3)
    assert torch.equal(model.score.weight, again.score.weight)


def test_scores_come_in_the_order_of_texts_whatever_the_batch():
    model = tiny_reward_model()
    texts = [[5, 6, 7, 1], [8, 1], [9, 10, 1]]
    expected = [float(model(input_ids=torch.tensor([ids])).logits.detach()) for ids in texts]
    model.train()
    for batch_size in (1, 2, 3):
        found = raw_scores(model, texts, pad_id=0, batch_size=batch_size)
        assert found == pytest.approx(expected, abs=1e-5)
    assert model.training


def test_scores_that_are_not_finite_stop_the_stage():
    model = tiny_reward_model()
    with torch.no_grad():
        model.score.weight.fill_(float("nan"))
    with pytest.raises(UserError, match=r"2 of 2 scores are not finite.*diverged"):
        raw_scores(model, [[5, 1], [6, 1]], pad_id=0)


def test_constants_by_hand_and_refused_when_nothing_varies():
    # 1 and 5: mean 3, deviation 2.
    assert score_constants(np.array([1.0, 5.0])) == (3.0, 2.0)
    with pytest.raises(UserError, match=r"all 2 replies score 1\.0.*learned nothing"):
        score_constants(np.ones(2))


def replies(monkeypatch, *, this: int, of: int, gather=None, batch_size: int = 256):
    monkeypatch.setattr(constants, "rank", lambda: this)
    monkeypatch.setattr(constants, "world_size", lambda: of)
    monkeypatch.setattr(constants, "gather_objects", gather or (lambda found: [found]))
    return sample_replies(
        tiny_llama(),
        [[3, 9, 4], [3, 8, 8, 4], [3] * 60],
        tokenizer=TOKENS,
        normalisation=Normalisation(num_samples=5, response_tokens=6, batch_size=batch_size),
        max_length=20,
        seed=1,
    )


def test_replies_repeat_prompts_that_fit_and_do_not_depend_on_processes(monkeypatch):
    prompts, alone = replies(monkeypatch, this=0, of=1)
    assert len(prompts) == len(alone) == 5
    assert {len(prompt) for prompt in prompts} == {3, 4}
    parts: list[dict[int, list[int]]] = []

    def collect(found):
        parts.append(dict(found))
        return [{row: [] for row in range(5)}, *parts]

    replies(monkeypatch, this=1, of=2, gather=collect)
    _, together = replies(monkeypatch, this=0, of=2, gather=collect)
    assert together == alone


def test_replies_do_not_depend_on_how_many_are_sampled_together(monkeypatch):
    asked = []
    monkeypatch.setattr(
        constants, "generate", lambda *a, **k: asked.append(k["batch_size"]) or generate(*a, **k)
    )
    together, apart = (replies(monkeypatch, this=0, of=1, batch_size=size) for size in (256, 2))
    assert together == apart
    assert asked == [256, 2]


def test_a_process_for_which_no_prompt_is_left_takes_what_the_others_said(monkeypatch):
    _, alone = replies(monkeypatch, this=0, of=1)
    others = dict(enumerate(alone))
    _, together = replies(monkeypatch, this=7, of=8, gather=lambda found: [found, others])
    assert together == alone


def test_prompts_without_room_are_told():
    with pytest.raises(UserError, match=r"normalisation\.response_tokens: no prompt leaves room"):
        sample_replies(
            tiny_llama(),
            [[3, 4]],
            tokenizer=TOKENS,
            normalisation=Normalisation(num_samples=2, response_tokens=8),
            max_length=9,
            seed=0,
        )


def test_the_bag_of_words_learns_which_words_are_good():
    texts = ["good day", "good film", "bad day", "bad film"] * 4
    scores = bag_of_words_scores(
        texts,
        ratings=np.array([1.0, 1.0, -1.0, -1.0] * 4),
        scales=["s"] * 16,
        held_out=["a good one", "a bad one", "unknown"],
        min_gap=0.5,
        seed=0,
    )
    assert scores is not None
    assert scores[0] > scores[2] == 0.0 > scores[1]


def test_the_bag_of_words_needs_comparable_texts():
    arguments = {"scales": ["a", "b"], "held_out": ["x"], "min_gap": 0.5, "seed": 0}
    assert bag_of_words_scores(["x", "y"], ratings=np.array([0.0, 1.0]), **arguments) is None


def test_sampled_pairs_stay_within_scales_and_gap():
    ratings = np.array([0.0, 1.0, 0.1, 5.0, 5.2])
    better, worse = sampled_pairs(ratings, ["a", "a", "b", "b", "a"], min_gap=0.5, seed=0)
    assert set(zip(better.tolist(), worse.tolist(), strict=True)) == {
        (1, 0),
        (4, 0),
        (4, 1),
        (3, 2),
    }


def test_dropout_acts_in_training_only():
    model, rows = tiny_reward_model(), [[5, 6, 7, 1], [8, 9, 1]]
    before = raw_scores(model, rows, pad_id=0)
    add_dropout(model, probability=0.5)
    assert np.array_equal(raw_scores(model, rows, pad_id=0), before)
    model.train()
    torch.manual_seed(0)
    ids = torch.tensor([[5, 6, 7, 1]])
    dropped = model(input_ids=ids).logits.detach()[0, 0]
    assert float(dropped) != pytest.approx(float(before[0]))


def test_dropout_needs_layers():
    model = tiny_reward_model()
    model.model.layers = torch.nn.Sequential(*model.model.layers)
    with pytest.raises(UserError, match="dropout: llama has no list of layers; set it to 0"):
        add_dropout(model, probability=0.1)
