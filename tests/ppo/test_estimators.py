"""Advantages without a critic: by hand, against loops, and in the trainer."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import UserError
from pipeline.ppo.advantages import RunningBaseline, grpo, reinforce, rloo
from pipeline.ppo.settings import Advantage
from tests.ppo.ragged import Ragged
from tests.ppo.worlds import PROMPTS, trainer, weights
from tests.support import assert_close

OPTIONS = {
    "rloo": Advantage(estimator="rloo", responses_per_prompt=3),
    "grpo": Advantage(estimator="grpo", responses_per_prompt=4),
    "reinforce": Advantage(estimator="reinforce"),
}


def test_rloo_and_grpo_by_hand():
    # two prompts of two responses: rewards 1 + 2 = 3 and 1; 4 and 4
    rewards = torch.tensor([[1.0, 2.0], [1.0, 9.0], [4.0, 9.0], [4.0, 9.0]]).double()
    mask = torch.tensor([[True, True], [True, False], [True, False], [True, False]])
    # leave one out: 3 - 1 = 2 and 1 - 3 = -2
    assert_close(rloo(rewards, mask, group=2), [[2.0, 2.0], [-2.0, 0.0], [0.0, 0.0], [0.0, 0.0]])
    # mean 2, deviation 1: +1 and -1; equal rewards: 0
    expected = [[1.0, 1.0], [-1.0, 0.0], [0.0, 0.0], [0.0, 0.0]]
    assert_close(grpo(rewards, mask, group=2), expected, tolerance=1e-7)


def test_reinforce_by_hand():
    # rewards to go 3, 2 and 1; less 1: 2, 1, 0; deviation of 3, 2, 1: sqrt(2/3)
    rewards = torch.tensor([[1.0, 2.0], [1.0, 9.0]]).double()
    mask = torch.tensor([[True, True], [True, False]])
    advantages, to_go = reinforce(rewards, mask, gamma=1.0, baseline=1.0)
    assert_close(to_go, [[3.0, 2.0], [1.0, 0.0]])
    root = math.sqrt(1.5)
    assert_close(advantages, [[2 * root, root], [0.0, 0.0]], tolerance=1e-7)


@settings(max_examples=40)
@given(seed=st.integers(0, 10_000), group=st.sampled_from([2, 3]), gamma=st.floats(0.0, 1.0))
def test_estimators_agree_with_loops(seed, group, gamma):
    batch = Ragged(seed, rows=6)
    rewards, mask = batch.draw(), batch.mask
    lengths = mask.sum(dim=1).tolist()
    rows = [[float(rewards[i, t]) for t in range(lengths[i])] for i in range(6)]
    totals = [sum(row) for row in rows]
    leave_one_out, grouped = torch.zeros_like(rewards), torch.zeros_like(rewards)
    for i in range(6):
        members = range(i // group * group, i // group * group + group)
        others = [totals[j] for j in members if j != i]
        mean = sum(totals[j] for j in members) / group
        deviation = math.sqrt(sum((totals[j] - mean) ** 2 for j in members) / group + 1e-8)
        for t in range(lengths[i]):
            leave_one_out[i, t] = totals[i] - sum(others) / len(others)
            grouped[i, t] = (totals[i] - mean) / deviation
    assert_close(rloo(rewards, mask, group=group), leave_one_out)
    assert_close(grpo(rewards, mask, group=group), grouped)
    to_go = [
        [sum(gamma ** (s - t) * row[s] for s in range(t, len(row))) for t in range(len(row))]
        for row in rows
    ]
    flat = [value for row in to_go for value in row]
    mean = sum(flat) / len(flat)
    deviation = math.sqrt(sum((value - mean) ** 2 for value in flat) / len(flat) + 1e-8)
    advantages, _ = reinforce(rewards, mask, gamma=gamma, baseline=0.3)
    expected = [(value - 0.3) / deviation for value in flat]
    assert_close(advantages[mask], expected, tolerance=1e-8)
    assert bool((advantages[~mask] == 0).all())


def test_the_running_baseline_by_hand():
    baseline = RunningBaseline(0.5)
    baseline.update(4.0)
    baseline.update(4.0)
    assert baseline.value == 3.0


def test_responses_to_one_prompt_stand_in_adjacent_rows_and_differ():
    ppo = trainer(advantage=Advantage(responses_per_prompt=3))
    rows = ppo.prompt_rows(0)
    assert len(rows) == 12
    assert all(len(set(rows[start : start + 3])) == 1 for start in range(0, 12, 3))
    assert len(set(rows)) == 4
    assert not set(rows) & set(ppo.prompt_rows(1))
    responses = ppo.sample([PROMPTS[row] for row in rows], update=0).responses
    assert any(responses[0] != other for other in responses[1:3])


@pytest.mark.parametrize("name", OPTIONS)
def test_without_a_critic_there_are_no_value_metrics(name, tmp_path):
    ppo = trainer(advantage=OPTIONS[name], updates=3)
    before = weights(ppo)
    metrics = ppo.update(0).metrics
    assert not [key for key in metrics if key.startswith("value/")]
    assert not torch.equal(weights(ppo), before)
    ppo.save(tmp_path)
    assert {file.stem for file in tmp_path.glob("*.safetensors")} == {"policy"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"estimator": "vtrace"}, "advantage.estimator: must be one of gae, rloo, .*'vtrace'"),
        ({"estimator": "rloo"}, "responses_per_prompt: rloo needs at least 2, got 1"),
        ({"responses_per_prompt": 0}, "responses_per_prompt: gae needs at least 1, got 0"),
        ({"baseline_decay": 1.0}, r"baseline_decay: must be in \[0, 1\), got 1.0"),
    ],
)
def test_misfits_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        Advantage(**options)
