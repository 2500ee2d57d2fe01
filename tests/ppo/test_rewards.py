"""Rewards per token: the penalty everywhere, the score on the last token only."""

import torch

from pipeline.ppo.rewards import final_scores, token_rewards
from tests.support import assert_close


def test_by_hand():
    kl = torch.tensor([[0.5, -0.25, 7.0], [1.0, 7.0, 7.0]]).double()
    mask = torch.tensor([[True, True, False], [True, False, False]])
    rewards = token_rewards(torch.tensor([2.0, -1.0]).double(), kl, mask, kl_coef=0.1)
    assert_close(rewards, [[-0.05, 2.025, 0.0], [-1.1, 0.0, 0.0]])


def test_missing_eos_replaces_the_score_and_clipping_comes_first():
    scores, ended = torch.tensor([5.0, 3.0, -4.0]), torch.tensor([True, False, True])
    replaced = final_scores(scores, ended, missing_eos_score=-1.0, clip=0.0)
    assert_close(replaced, [5.0, -1.0, -4.0])
    kept = final_scores(scores, ended, missing_eos_score=None, clip=0.0)
    assert_close(kept, [5.0, 3.0, -4.0])
    clipped = final_scores(scores, ended, missing_eos_score=-9.0, clip=2.0)
    assert_close(clipped, [2.0, -9.0, -2.0])
