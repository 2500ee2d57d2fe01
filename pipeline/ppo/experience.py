"""One update's rollout with everything that was measured on it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from pipeline.attention import is_packed
from pipeline.logprobs import wide
from pipeline.parallel import side_by_side
from pipeline.ppo.kl import k1
from pipeline.sequences import (
    Batch,
    by_length,
    collate,
    pad_tokens,
    response_states,
    response_tokens,
    token_logprobs,
    token_logprobs_and_entropy,
)
from pipeline.sharding import in_one_pass
from pipeline.sizes import filled_up


@dataclass(frozen=True)
class Roles:
    """The four models; all in evaluation mode, so that dropout is off everywhere.

    Each is called in the same way, whether it is a model of its own or shares weights with others
    (`pipeline.ppo.sharing`).

    Attributes:
        policy: causal LM being trained.
        reference: the SFT model, frozen; moved between updates where settings say so.
        reward_model: frozen sequence classifier with normalisation constants that reads the
            policy's tokens; None where something else scores.
        value: sequence classifier started from the reward model if there is one, else from the
            SFT model, or a head on the policy's trunk, being trained; None for advantages that
            need no critic.
    """

    policy: Any
    reference: Any
    reward_model: Any | None
    value: Any | None

    @property
    def one_trunk(self) -> bool:
        """Whether the critic is a head on the policy's own hidden states."""
        return self.value is not None and self.value.base_model == self.policy.base_model

    @property
    def packed(self) -> bool:
        """Whether all that read responses token by token read packed rows."""
        readers = (self.policy, self.reference, self.value)
        return all(is_packed(role) for role in readers if role is not None)


@dataclass(frozen=True)
class Experience:
    """Rows of all ranks in the update's order; token tensors start at the first response token.

    Attributes:
        prompts: token ids.
        responses: token ids, EOS included when the response ended.
        mask: True on response tokens.
        logprobs: log pi at the time of sampling, 0 outside the mask.
        ref_logprobs: log pi_ref, 0 outside the mask.
        values: value of the state before each token, 0 outside the mask and without a critic.
        entropy: entropy of pi at each token in nats, 0 outside the mask.
        scores: the normalised score of each response.
        ended: True where the response holds its EOS.
        parts: the scores by each of several sources, by name.
        engine_logprobs: log-probability of each token by the engine that sampled it, 0 outside the
            mask; None where that was the policy itself.
    """

    prompts: list[list[int]]
    responses: list[list[int]]
    mask: Bool[Tensor, "batch time"]
    logprobs: Float[Tensor, "batch time"]
    ref_logprobs: Float[Tensor, "batch time"]
    values: Float[Tensor, "batch time"]
    entropy: Float[Tensor, "batch time"]
    scores: Float[Tensor, "batch"]
    ended: Bool[Tensor, "batch"]
    parts: Mapping[str, Float[Tensor, "batch"]] = field(default_factory=dict)
    engine_logprobs: Float[Tensor, "batch time"] | None = None

    @property
    def lengths(self) -> Int[Tensor, " batch"]:
        """Tokens of each row, prompt and response."""
        rows = zip(self.prompts, self.responses, strict=True)
        return torch.tensor([len(prompt) + len(response) for prompt, response in rows])

    @property
    def kl(self) -> Float[Tensor, "batch time"]:
        """The k1 estimate of each token's KL, 0 outside the mask."""
        return k1(self.logprobs, self.ref_logprobs)


@torch.no_grad()
def move_reference(roles: Roles, *, rate: float) -> None:
    """Moves the reference towards the policy: ref <- (1 - rate) ref + rate policy.

    Gorbatovski et al. 2024, eq. 4 and 5.
    """
    pairs = zip(roles.reference.parameters(), roles.policy.parameters(), strict=True)
    for ours, theirs in pairs:
        ours.lerp_(theirs, rate)


def length_mask(responses: Sequence[Sequence[int]]) -> Bool[Tensor, "batch time"]:
    """Returns a mask whose rows are True on as many columns as the responses have tokens."""
    lengths = torch.tensor([len(response) for response in responses])
    return torch.arange(int(lengths.max())) < lengths[:, None]


def state_values(value_model: Any, states: Float[Tensor, "token width"]) -> Float[Tensor, "token"]:
    """Returns the normalised value of each state, float32 or wider."""
    raw = wide(value_model.score(filled_up(states))[: len(states), 0])
    return (raw - value_model.config.reward_mean) / value_model.config.reward_std


@torch.no_grad()
def measure(
    roles: Roles,
    prompts: Sequence[list[int]],
    responses: Sequence[list[int]],
    *,
    temperature: float,
    pad_id: int,
    batch_size: int,
    workers: int = 1,
    known: Mapping[str, list[Any]] | None = None,
) -> dict[str, list[Any]]:
    """Returns per row: logprobs, ref_logprobs, entropy and with a critic values of its tokens.

    Rows are measured in the order of their lengths, so that batches hold little padding.

    Args:
        roles: the models, one after the other: those on one base switch its adapters.
        prompts: token ids.
        responses: token ids.
        temperature: divides the logits.
        pad_id: fills the rows up.
        batch_size: rows of one forward pass.
        workers: passes of one model side by side.
        known: logprobs and entropy, where sampling has left them: the policy is then not read.
    """
    lengths = [len(p) + len(r) for p, r in zip(prompts, responses, strict=True)]
    chosen = by_length(lengths, batch_size=batch_size)
    batches = [
        collate(
            [prompts[i] for i in rows],
            [responses[i] for i in rows],
            pad_id=pad_id,
            packed=roles.packed,
        ).to(roles.policy.device)
        for rows in chosen
    ]
    figures: dict[str, list[Any]] = dict(known or {})
    assert not (known and roles.one_trunk)  # the policy's pass gives the values too
    for one_pass in _passes(roles, temperature=temperature, reads_policy=not known):
        found = side_by_side(one_pass, batches, workers=workers)
        for rows, measured in zip(chosen, found, strict=True):
            counts = [len(responses[row]) for row in rows]
            for name, tokens in measured.items():
                of_rows = figures.setdefault(name, [None] * len(lengths))
                for row, part in zip(rows, tokens.cpu().split(counts), strict=True):
                    of_rows[row] = part.clone()  # a view would be sent with the whole batch
    return figures


def _passes(
    roles: Roles, *, temperature: float, reads_policy: bool
) -> list[Callable[[Batch], dict[str, Tensor]]]:
    """Returns what is to be run over all batches, one after the other."""

    def policy(batch: Batch) -> dict[str, Tensor]:
        states = response_states(roles.policy, batch)
        chosen, entropy = token_logprobs_and_entropy(
            roles.policy, states, response_tokens(batch), temperature=temperature
        )
        figures = {"logprobs": chosen, "entropy": entropy}
        if roles.one_trunk:
            figures["values"] = state_values(roles.value, states)
        return figures

    def reference(batch: Batch) -> dict[str, Tensor]:
        states, tokens = response_states(roles.reference, batch), response_tokens(batch)
        chosen = token_logprobs(roles.reference, states, tokens, temperature=temperature)
        return {"ref_logprobs": chosen}

    def critic(batch: Batch) -> dict[str, Tensor]:
        return {"values": state_values(roles.value, response_states(roles.value, batch))}

    apart = roles.value is not None and not roles.one_trunk
    passes = [
        *([(roles.policy, policy)] if reads_policy else []),
        (roles.reference, reference),
        *([(roles.value, critic)] if apart else []),
    ]
    return [partial(in_one_pass, role, one_pass) for role, one_pass in passes]


def assemble(
    prompts: list[list[int]],
    responses: list[list[int]],
    measured: dict[str, list[Any]],
    *,
    scores: Float[Tensor, "batch"],
    parts: Mapping[str, Float[Tensor, "batch"]],
    eos_id: int,
) -> Experience:
    """Returns the rows of all ranks as one Experience."""
    mask = length_mask(responses)
    tokens = {
        name: pad_tokens(torch.cat(measured[name]), mask)
        for name in ("logprobs", "ref_logprobs", "values", "entropy", "engine_logprobs")
        if name in measured
    }
    tokens.setdefault("values", torch.zeros_like(tokens["logprobs"]))
    return Experience(
        prompts=prompts,
        responses=responses,
        mask=mask,
        scores=scores.to(tokens["logprobs"].dtype),
        ended=torch.tensor([response[-1] == eos_id for response in responses]),
        parts=parts,
        **tokens,
    )
