"""PPO ends where theory says it must: exact KL to the analytic optimum, a few seconds a world.

`python -m tests.ppo.optimum` drives more worlds and seeds; docs/ppo.md holds its table.
"""

import pytest
import torch

from pipeline.ppo.settings import Reward
from tests.ppo import optimum
from tests.ppo.optimum import (
    NEAR,
    WARMED,
    World,
    adaptive,
    coefficient,
    divergence,
    drive,
    fixed,
)
from tests.support import assert_close

pytestmark = pytest.mark.usefixtures("unchecked")


def test_the_optimum_by_hand():
    # ref (1/2, 1/2), scores (ln 3, 0), beta 1: (3/4, 1/4); beta 1/2: (9/10, 1/10)
    reference = torch.tensor([[0.5, 0.5]]).double().log()
    scores = torch.tensor([[3.0, 1.0]]).double().log()
    assert_close(optimum.optimum(reference, scores, coef=1.0).exp(), [[0.75, 0.25]])
    assert_close(optimum.optimum(reference, scores, coef=0.5).exp(), [[0.9, 0.1]])
    # KL((3/4, 1/4) || (1/2, 1/2)) = 3/4 ln 3/2 + 1/4 ln 1/2 = 0.130812; beta 1 has just that KL
    assert divergence(optimum.optimum(reference, scores, coef=1.0), reference) == pytest.approx(
        0.130812, abs=1e-6
    )
    assert coefficient(reference, scores, target=0.13081203594113694) == pytest.approx(1.0)


def test_every_response_is_listed_once():
    # EOS, 4 tokens then one of 5: 1 + 4 * 5
    world = World(kl=fixed(1.0))
    assert len(world.responses()) == len({tuple(r) for r in world.responses()}) == 21
    policy = world.trainer().roles.policy
    assert_close(world.log_policy(policy).exp().sum(dim=1), [1.0, 1.0, 1.0])


@pytest.mark.parametrize(
    "world",
    [
        World(seed=1, budget=1, kl=fixed(0.5), updates=30),
        World(seed=2, kl=fixed(1.0), mean_score=3.0, updates=50),
        World(seed=3, kl=fixed(1.0), reward=Reward(missing_eos_score=-1.0), updates=50),
        World(seed=1, kl=fixed(1.0), trunk=True, optimisation=WARMED, updates=50),
        World(seed=2, kl=fixed(1.0), trunk=True, optimisation=WARMED, updates=50),
        World(seed=3, kl=fixed(0.5), trunk=True, optimisation=WARMED),
    ],
    ids=["one token", "two tokens", "missing EOS", "trunk 1", "trunk 2", "trunk 3"],
)
def test_a_fixed_coefficient_ends_at_its_optimum(world):
    result = drive(world)
    assert result.start > 10 * NEAR
    assert result.end < NEAR


def test_an_adaptive_coefficient_ends_at_the_optimum_whose_kl_is_the_target():
    result = drive(World(seed=1, kl=adaptive(0.4)))
    assert result.start > 10 * NEAR
    assert result.end < NEAR
    assert result.coef == pytest.approx(result.settled, rel=0.1)
