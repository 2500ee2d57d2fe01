"""Batched generation: temperature sampling by inverse CDF, with one uniform per token."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from pipeline.attention import attention_of
from pipeline.logprobs import wide
from pipeline.narrow import narrowed
from pipeline.parallel import side_by_side
from pipeline.ppo.cache import make_room
from pipeline.ppo.graphs import StaticSteps, can_keep_one_shape, prefers_one_shape
from pipeline.sequences import by_length
from pipeline.sizes import ROWS, rounded
from pipeline.stepping import steps_by_cache

ENGINE_LOGPROBS = "engine_logprobs"
"""Name of what another engine than the policy says of the tokens that it drew."""
MOST_ROWS = 256
"""Rows that are generated together, at most."""
PIECE_NUMBERS = 2**17
"""Probabilities that a processor sums at a time: a megabyte stays in its cache, and in the
allocator's, which returns larger ones to the system every time (a fifth of the time is left)."""
COMPACT_AT = 0.75
"""Finished rows leave the batch once no more than this share of it is still being generated."""
RECAPTURE_AT = 0.5
"""The same where steps keep one shape: fewer rows then mean another CUDA graph."""


def uniforms(
    seed: int, *, update: int, rows: Sequence[int], positions: int
) -> Float[Tensor, "row position"]:
    """Returns float64 numbers in [0, 1): a function of (seed, update, row, position) alone.

    However the rows are divided over processes and batches, each gets the same numbers.
    """
    numbers = np.empty((len(rows), positions))
    for index, row in enumerate(rows):
        bits = np.random.Philox(np.random.SeedSequence([seed, update, row]))
        numbers[index] = np.random.Generator(bits).random(positions)
    return torch.from_numpy(numbers)


@dataclass(frozen=True)
class Sampled:
    """Responses, and per token what the policy said of it as it was drawn.

    Attributes:
        responses: token ids up to and including EOS, or cut at the budget.
        figures: log-probability of each token and entropy of its distribution in nats, by the
            names logprobs and entropy; nothing where they are to be measured anew.
    """

    responses: list[list[int]]
    figures: dict[str, list[Tensor]] = field(default_factory=dict)


def sample_tokens(
    logits: Float[Tensor, "batch vocabulary"],
    uniform: Float[Tensor, "batch"],
    *,
    temperature: float,
) -> tuple[Int[Tensor, "batch"], Float[Tensor, "batch"], Float[Tensor, "batch"]]:
    """Returns the first token whose cumulative probability exceeds the row's uniform number.

    With it come its log-probability, and the entropy of what it was drawn from: log sum exp(z)
    less the mean of z. On a processor few rows are drawn at a time.
    """
    few = max(1, PIECE_NUMBERS // logits.shape[1])
    rows = few if logits.device.type == "cpu" else len(logits)
    parts = [
        _draw(some, numbers, temperature=temperature)
        for some, numbers in zip(logits.split(rows), uniform.split(rows), strict=True)
    ]
    tokens, logprobs, entropy = (torch.cat(part) for part in zip(*parts, strict=True))
    return tokens, logprobs, entropy


def _draw(
    logits: Float[Tensor, "batch vocabulary"],
    uniform: Float[Tensor, "batch"],
    *,
    temperature: float,
) -> tuple[Int[Tensor, "batch"], Float[Tensor, "batch"], Float[Tensor, "batch"]]:
    logits = wide(logits) / temperature
    probabilities = logits.softmax(dim=-1)
    cumulative = probabilities.double().cumsum(dim=-1)
    threshold = uniform.to(cumulative.device)[:, None] * cumulative[:, -1:]
    tokens = torch.searchsorted(cumulative, threshold, right=True).clamp(max=logits.shape[1] - 1)
    logprobs = probabilities.gather(1, tokens).log()
    norms = logits.gather(1, tokens) - logprobs
    entropy = norms[:, 0] - torch.linalg.vecdot(probabilities, logits)
    return tokens[:, 0], logprobs[:, 0], entropy


def generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    uniforms: Float[Tensor, "row position"],
    temperature: float = 1.0,
    eos_id: int,
    pad_id: int,
    batch_size: int = MOST_ROWS,
    workers: int = 1,
) -> Sampled:
    """Returns one response per prompt, with what the policy said of every token.

    Temperature only: no top-k, top-p, repetition penalty or minimum length, so that the tokens
    come from the policy itself.

    Args:
        model: causal LM; without a standard cache it reads its rows anew at every token.
        prompts: token ids, none empty.
        uniforms: one number per response token; its width is the budget of tokens.
        temperature: divides the logits.
        eos_id: ends a response.
        pad_id: fills prompts on the left.
        batch_size: most rows generated together; rows of like length share a batch.
        workers: batches generated side by side.
    """
    if not prompts:  # of fewer than there are processes
        return Sampled([], {"logprobs": [], "entropy": []})
    if not steps_by_cache(model):  # some keep states in their layers, for one batch at a time
        workers = 1
    size = min(batch_size, math.ceil(len(prompts) / workers))
    lengths = [len(prompt) for prompt in prompts]
    batches = by_length(lengths, batch_size=size, mixed=steps_by_cache(model))

    @torch.no_grad()
    def continued(rows: list[int]) -> Sampled:
        batch = _Decoding(model, [prompts[row] for row in rows], pad_id=pad_id)
        return batch.run(uniforms[rows], temperature=temperature, eos_id=eos_id)

    with narrowed(model):
        parts = list(side_by_side(continued, batches, workers=workers))
    rows = [row for batch in batches for row in batch]
    order = sorted(range(len(rows)), key=rows.__getitem__)

    def in_order(pieces: Iterable[list[Any]]) -> list[Any]:
        joined = [of_row for piece in pieces for of_row in piece]
        return [joined[place] for place in order]

    return Sampled(
        in_order(part.responses for part in parts),
        {name: in_order(part.figures[name] for part in parts) for name in ("logprobs", "entropy")},
    )


class _Decoding:
    """One batch of left-padded prompts being continued; finished rows are dropped on the way."""

    def __init__(
        self,
        model: Any,
        prompts: Sequence[Sequence[int]],
        *,
        pad_id: int,
    ) -> None:
        width = max(len(prompt) for prompt in prompts)
        padded = [[pad_id] * (width - len(prompt)) + list(prompt) for prompt in prompts]
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        self.model = model
        self.by_cache = steps_by_cache(model)
        self.ids = torch.tensor(padded).to(model.device)
        self.mask = (torch.arange(width) >= width - lengths[:, None]).long().to(model.device)
        self.positions = (self.mask.cumsum(dim=1) - 1).clamp(min=0)
        self.active = torch.arange(len(prompts), device=model.device)
        self.cache: Any = None
        self.steps: StaticSteps | None = None

    def run(
        self, uniforms: Float[Tensor, "row position"], *, temperature: float, eos_id: int
    ) -> Sampled:
        """Returns the response of every row."""
        uniforms = uniforms.to(self.ids.device)
        budget = uniforms.shape[1]
        tokens = torch.full_like(uniforms, eos_id, dtype=torch.long)
        lengths = torch.full_like(uniforms[:, 0], budget, dtype=torch.long)
        figures: dict[str, Tensor] = {}
        for position in range(budget):
            logits = self._step()
            if position == 0:
                self._make_room(budget - 1)
            drawn, logprobs, entropy = sample_tokens(
                logits, uniforms[self.active, position], temperature=temperature
            )
            for name, values in (("logprobs", logprobs), ("entropy", entropy)):
                table = figures.setdefault(name, values.new_zeros(uniforms.shape))
                table[self.active, position] = values
            going = lengths[self.active] == budget
            drawn = torch.where(going, drawn, eos_id)
            tokens[self.active, position] = drawn
            ended = going & (drawn == eos_id)
            lengths[self.active[ended]] = position + 1
            if bool((lengths[self.active] < budget).all()) or position + 1 == budget:
                break
            self._extend(drawn, lengths[self.active] == budget)
        counts = lengths.tolist()

        def cut(table: Tensor) -> list[Tensor]:
            # Views would be sent to other processes each with the whole table.
            return [row[:count].clone() for row, count in zip(table.cpu(), counts, strict=True)]

        responses = [row[:count] for row, count in zip(tokens.tolist(), counts, strict=True)]
        return Sampled(responses, {name: cut(table) for name, table in figures.items()})

    def _make_room(self, positions: int) -> None:
        """Prepares the cache for what is still to come."""
        if not self.by_cache:
            return
        if not (prefers_one_shape(self.model) and can_keep_one_shape(self.model, self.cache)):
            attention = attention_of(self.model.config)
            make_room(self.cache, positions=positions, attention=attention)
            return
        self.steps = StaticSteps(
            self.model,
            self.cache,
            mask=self.mask,
            positions=self.positions[:, -1:],
            room=positions,
        )

    def _step(self) -> Float[Tensor, "batch vocabulary"]:
        if self.steps is not None:
            return self.steps.step(self.ids)
        if not self.by_cache:
            last: Tensor = self.model(input_ids=self.ids, use_cache=False).logits[:, -1]
            return last
        output = self.model(
            input_ids=self.ids,
            attention_mask=self.mask,
            position_ids=self.positions,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self.cache = output.past_key_values
        logits: Tensor = output.logits[:, -1]
        return logits

    def _extend(self, drawn: Int[Tensor, "batch"], going: Tensor) -> None:
        """Appends the drawn tokens; drops finished rows when enough of them have finished."""
        self.ids = drawn[:, None] if self.by_cache else torch.cat([self.ids, drawn[:, None]], dim=1)
        self.positions = self.positions[:, -1:] + 1
        self.mask = torch.cat([self.mask, torch.ones_like(self.mask[:, :1])], dim=1)
        room = rounded(int(going.sum()), multiple=ROWS)
        if room <= (RECAPTURE_AT if self.steps else COMPACT_AT) * len(going):
            self._keep(going.int().argsort(descending=True, stable=True)[:room].sort().values)

    def _keep(self, rows: Int[Tensor, " kept"]) -> None:
        """Keeps these rows of the batch only."""
        if self.steps is not None:
            self.steps.select(rows)
        elif self.by_cache:
            self.cache.batch_select_indices(rows)
        self.active = self.active[rows]
        self.ids, self.positions = self.ids[rows], self.positions[rows]
        self.mask = self.mask[rows]
