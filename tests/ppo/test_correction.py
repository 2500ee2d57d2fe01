"""Truncated importance sampling: every response of a small world listed, and the cap by hand."""

import itertools
import math

import pytest
import torch

from pipeline.ppo.correction import mismatch, truncated_weights
from pipeline.ppo.losses import kl_loss, policy_loss
from tests.support import assert_close

END, BUDGET = 0, 2
TOKENS = range(3)
RESPONSES = [[END], *([first, second] for first in (1, 2) for second in TOKENS)]
"""All there are: a response ends with END, or at the budget. 0 outside the mask."""
MASK = torch.tensor([[True, len(response) == BUDGET] for response in RESPONSES])
FREE = 1e9
"""A cap that never binds."""


def drawn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


POLICY, ENGINE, REFERENCE = drawn(1, 3, 3), drawn(2, 3, 3), drawn(4, 3, 3)
"""Logits after the start (row 0) and after the first tokens 1 and 2."""
ADVANTAGES = drawn(3, len(RESPONSES), BUDGET)
"""Of each token of each response: of all that follows too, as with real ones."""


def logprobs_of(logits: torch.Tensor) -> torch.Tensor:
    """Log-probability of every token of every response, 0 outside the mask."""
    said = logits.log_softmax(dim=1)
    rows = []
    for response in RESPONSES:
        states = [0, response[0]]
        row = [said[state, token] for state, token in zip(states, response, strict=False)]
        rows.append(torch.stack([*row, *[said.new_zeros(())] * (BUDGET - len(row))]))
    return torch.stack(rows)


def probability(logits: torch.Tensor) -> torch.Tensor:
    return logprobs_of(logits).sum(dim=1, keepdim=True).exp()


def expected_gradient(sampler, weights, loss: str = "policy") -> torch.Tensor:
    """Gradient of a loss in the policy's logits, in expectation over the sampler's responses."""
    logits = POLICY.clone().requires_grad_()
    logprobs = logprobs_of(logits)
    weights = probability(sampler) * weights
    if loss == "policy":
        value = policy_loss(
            logprobs, logprobs.detach(), ADVANTAGES * weights, MASK, clip=0.2, num_tokens=1
        ).value
    else:
        value = kl_loss(
            logprobs, logprobs.detach(), logprobs_of(REFERENCE), MASK,
            estimator=loss, num_tokens=1, weights=weights,
        ).value  # fmt: skip
    value.backward()
    return logits.grad


def weights_of(level: str, *, cap: float = FREE) -> torch.Tensor:
    return truncated_weights(logprobs_of(POLICY), logprobs_of(ENGINE), MASK, cap=cap, level=level)


def test_every_response_is_listed():
    assert len(RESPONSES) == 7
    for logits in (POLICY, ENGINE):
        assert_close(probability(logits).sum(), 1.0)


@pytest.mark.parametrize("loss", ["policy", "k2", "k3"])
def test_by_sequence_the_expected_gradient_is_the_policys_own(loss):
    own = expected_gradient(POLICY, torch.ones_like(ADVANTAGES), loss)
    corrected = expected_gradient(ENGINE, weights_of("sequence"), loss)
    left_alone = expected_gradient(ENGINE, torch.ones_like(ADVANTAGES), loss)
    assert_close(corrected, own, tolerance=1e-12)
    assert (left_alone - own).norm() > 0.1 * own.norm()


def test_by_token_the_actions_are_the_policys_and_the_states_the_engines():
    """Sum over s of d_q(s), over a of pi(a|s) A(s, a) grad log pi(a|s), by a slow loop."""
    gradient = expected_gradient(ENGINE, weights_of("token"))
    policy, engine = POLICY.softmax(dim=1), ENGINE.softmax(dim=1)
    slow = torch.zeros(3, 3, dtype=torch.float64)
    for first in TOKENS:
        rows = [row for row, response in enumerate(RESPONSES) if response[0] == first]
        later = [float(engine[first, RESPONSES[row][1]]) if first else 1.0 for row in rows]
        advantage = sum(p * float(ADVANTAGES[row, 0]) for p, row in zip(later, rows, strict=True))
        chosen = torch.eye(3, dtype=torch.float64)[first]
        slow[0] -= policy[0, first] * advantage * (chosen - policy[0])
    for first, second in itertools.product((1, 2), TOKENS):
        advantage = ADVANTAGES[RESPONSES.index([first, second]), 1]
        chosen = torch.eye(3, dtype=torch.float64)[second]
        slow[first] -= (
            engine[0, first] * policy[first, second] * advantage * (chosen - policy[first])
        )
    assert_close(gradient, slow, tolerance=1e-12)
    assert (gradient - expected_gradient(POLICY, torch.ones_like(ADVANTAGES))).norm() > 0.05


def test_a_cap_that_binds_pulls_the_gradient_towards_the_engines_own():
    own = expected_gradient(POLICY, torch.ones_like(ADVANTAGES))
    distances = [
        (expected_gradient(ENGINE, weights_of("sequence", cap=cap)) - own).norm()
        for cap in (1.0, 1.5, 2.0, 100.0)
    ]
    assert distances == sorted(distances, reverse=True)
    assert distances[0] > 0.05
    assert distances[-1] < 1e-12


def test_the_cap_by_hand():
    """Ratios 4 and 1/2, so 2 for the row; 3 alone; what stands outside the mask counts nowhere."""
    mask = torch.tensor([[True, True], [True, False]])
    ours = torch.tensor([[4.0, 0.5], [3.0, 1.0]]).log()
    ours[1, 1] = math.nan
    theirs = torch.zeros(2, 2)
    by_token = truncated_weights(ours, theirs, mask, cap=2.5, level="token")
    by_row = truncated_weights(ours, theirs, mask, cap=2.5, level="sequence")
    assert_close(by_token, torch.tensor([[2.5, 0.5], [2.5, 0.0]]))
    assert float(by_token[0, 0]) == 2.5  # which counts as capped
    assert_close(by_row, torch.tensor([[2.0, 2.0], [2.5, 0.0]]))
    far = truncated_weights(
        torch.tensor([[1e4]]), torch.zeros(1, 1), mask[:1, :1], cap=2.0, level="token"
    )
    assert_close(far, torch.tensor([[2.0]]))


def test_the_mismatch_by_hand():
    mask = torch.tensor([[True, True], [True, False]])
    ours = torch.tensor([[-1.0, -2.0], [-3.0, 9.0]])
    theirs = torch.tensor([[-1.5, -1.0], [-3.0, 0.0]])
    weights = torch.tensor([[1.0, 0.5], [2.0, 0.0]])
    assert mismatch(ours, theirs, mask, weights, cap=2.0) == {
        "engine/kl": pytest.approx((-0.5 + 1.0) / 3),
        "engine/gap_mean": pytest.approx(1.5 / 3),
        "engine/gap_max": pytest.approx(1.0),
        "engine/weight_mean": pytest.approx(3.5 / 3),
        "engine/capped_frac": pytest.approx(1 / 3),
        "engine/effective_frac": pytest.approx(3.5**2 / (3 * 5.25)),
    }
