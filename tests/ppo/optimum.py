"""Where PPO under a KL penalty must end, exactly, and the real trainer driven there.

The objective E[score] - beta KL(pi || ref) is maximal at
pi*(response) = ref(response) exp(score(response) / beta) / Z, over whole responses (Ziegler et al.
2019, section 2). With five tokens and at most two of them a response, all responses can be listed:
KL(pi || pi*) is a sum, not an estimate.

Run     python -m tests.ppo.optimum          every row of the table in docs/ppo.md
"""

import copy
import itertools
import sys
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from accelerate import Accelerator
from transformers import PreTrainedConfig

from pipeline.ppo.experience import Roles
from pipeline.ppo.settings import KL, Advantage, Optimisation, Reward, Settings
from pipeline.ppo.sharing import TrunkValue
from pipeline.ppo.trainer import PPOTrainer

VOCABULARY, CONTEXT, EOS, PAD = 5, 7, 1, 0
PROMPTS = [[2, 3], [3, 4, 2], [2, 2, 3, 4]]
"""Of several lengths, so that every batch is padded; no two share a (position, last tokens)."""

TEMPERATURE = 0.7
"""Not 1, so that one log-probability of the untempered policy would move the optimum."""

KEEP_SCORES = Reward(missing_eos_score=None)
RATES = Optimisation(learning_rate=0.1, value_learning_rate=0.1, epochs=2, max_grad_norm=10.0)
WARMED = replace(RATES, critic_warmup=5)
"""For a critic that starts as a head of zeros."""

NEAR = 0.02
"""KL(pi || pi*) in nats below which the trainer has arrived."""


@dataclass
class LastToken:
    """The cache of a model that looks back one token."""

    tokens: torch.Tensor

    def batch_select_indices(self, rows: torch.Tensor) -> None:
        self.tokens = self.tokens[rows]


class Table(torch.nn.Module):
    """A model that approximates nothing: free numbers for every (position, last two tokens).

    As a policy they are the next token's logits, as a value or reward model one number. It reads
    `position_ids` and a cache like any other model, so wrong ones move it off its optimum. The
    numbers are its hidden states too, for a critic on its trunk.
    """

    base_model_prefix = ""

    def __init__(self, *, outputs: int, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        shape = (CONTEXT, VOCABULARY, VOCABULARY, outputs)
        self.numbers = torch.nn.Parameter(torch.randn(shape, generator=generator))
        self.device = torch.device("cpu")
        self.config = PreTrainedConfig(reward_mean=0.5, reward_std=2.0, hidden_size=outputs)
        self.score = torch.nn.Identity()

    def get_output_embeddings(self) -> torch.nn.Module:
        return self.score

    def base_model(self, *, input_ids: Any, position_ids: Any, **_: Any) -> SimpleNamespace:
        before = torch.cat([input_ids[:, :1], input_ids[:, :-1]], dim=1)
        return SimpleNamespace(last_hidden_state=self.numbers[position_ids, before, input_ids])

    def forward(self, *, input_ids: Any, position_ids: Any, past_key_values: Any, **_: Any) -> Any:
        last, place = input_ids[:, -1], position_ids[:, -1]
        before = past_key_values.tokens if past_key_values else input_ids[:, -2]
        logits = self.numbers[place, before, last][:, None]
        return SimpleNamespace(logits=logits, past_key_values=LastToken(last))


@dataclass(frozen=True, kw_only=True)
class World:
    """One run: how long responses are, what they score, and how the trainer is set.

    A mean score other than 0 moves no optimum, and shows whatever pays or fines each token.
    """

    seed: int = 1
    budget: int = 2
    kl: KL
    mean_score: float = 0.0
    reward: Reward = KEEP_SCORES
    optimisation: Optimisation = RATES
    updates: int = 60
    trunk: bool = False
    """Whether the critic is a head on the policy's hidden states (`roles: trunk`)."""

    def trainer(self, reward_model: Any = None) -> PPOTrainer:
        """A trainer whose policy starts as the reference; scores are random unless given."""
        reference = Table(outputs=VOCABULARY, seed=self.seed)
        scores, value = (Table(outputs=1, seed=self.seed + more) for more in (100, 200))
        with torch.no_grad():
            scores.numbers.mul_(2.0).add_(
                0.5 + 2.0 * self.mean_score
            )  # deviation 1 when normalised
        policy = copy.deepcopy(reference)
        critic = TrunkValue(policy) if self.trunk else value
        return PPOTrainer(
            Roles(policy, reference, reward_model or scores, critic), PROMPTS,
            settings=self.settings(), accelerator=Accelerator(cpu=True), eos_id=EOS, pad_id=PAD,
        )  # fmt: skip

    def settings(self) -> Settings:
        """What the trainer needs to know."""
        return Settings(
            seed=self.seed, updates=self.updates, prompts_per_update=128, minibatch_size=64,
            microbatch_size=64, max_response_tokens=self.budget, temperature=TEMPERATURE,
            precision="fp32",
            workers=1, kl=self.kl, reward=self.reward, advantage=Advantage(),
            optimisation=self.optimisation,
        )  # fmt: skip

    def responses(self) -> list[list[int]]:
        """Every response there is: up to the first EOS, or the budget without one."""
        return [
            list(tokens)
            for length in range(1, self.budget + 1)
            for tokens in itertools.product(range(VOCABULARY), repeat=length)
            if EOS not in tokens[:-1] and (tokens[-1] == EOS or length == self.budget)
        ]

    def log_policy(self, model: Table) -> torch.Tensor:
        """The log pi(response | prompt), response by response from the table."""
        logprobs = (model.numbers.detach().double() / TEMPERATURE).log_softmax(dim=-1)
        return self._each(
            lambda prompt, response: sum(
                float(logprobs[_place(prompt + response[:index])][token])
                for index, token in enumerate(response)
            )
        )

    def scores(self, reward_model: Table) -> torch.Tensor:
        """The score of each response: of its last token, normalised, or of its missing EOS."""
        missing, numbers = self.reward.missing_eos_score, reward_model.numbers.detach().double()

        def score(prompt: list[int], response: list[int]) -> float:
            if missing is not None and response[-1] != EOS:
                return missing
            return (float(numbers[_place(prompt + response)]) - 0.5) / 2.0

        return self._each(score)

    def _each(self, function: Any) -> torch.Tensor:
        rows = [[function(prompt, response) for response in self.responses()] for prompt in PROMPTS]
        return torch.tensor(rows, dtype=torch.float64)


def _place(tokens: list[int]) -> tuple[int, int, int]:
    return len(tokens) - 1, tokens[-2], tokens[-1]


def divergence(first: torch.Tensor, second: torch.Tensor) -> float:
    """Exact KL(first || second) in nats from log-probabilities, the mean over prompts."""
    return float((first.exp() * (first - second)).sum(dim=1).mean())


def optimum(reference: torch.Tensor, scores: torch.Tensor, *, coef: float) -> torch.Tensor:
    """The log pi* = log ref + score / beta - log Z."""
    return (reference + scores / coef).log_softmax(dim=1)


def coefficient(reference: torch.Tensor, scores: torch.Tensor, *, target: float) -> float:
    """The beta whose optimum lies `target` nats from the reference, by bisection."""
    low, high = 1e-2, 1e2
    for _ in range(60):
        middle = (low * high) ** 0.5
        far = divergence(optimum(reference, scores, coef=middle), reference) > target
        low, high = (middle, high) if far else (low, middle)
    return low


@dataclass(frozen=True, kw_only=True)
class Result:
    """Where a run ended.

    Attributes:
        start: KL(reference || optimum): how far there was to go.
        end: KL(policy || optimum).
        coef: beta after the last update.
        settled: the fixed beta; for an adaptive controller the beta whose optimum has just the
            target's KL to the reference, which is the only one at which the controller rests.
        length: how many more tokens the policy's mean response has than the optimum's.
    """

    start: float
    end: float
    coef: float
    settled: float
    length: float


def drive(world: World) -> Result:
    """Runs the trainer to its end and measures the policy against the optimum."""
    trainer = world.trainer()
    for number in range(world.updates):
        trainer.update(number)
    policy, reference = map(world.log_policy, (trainer.roles.policy, trainer.roles.reference))
    scores, settled = world.scores(trainer.roles.reward_model), world.kl.coef
    if world.kl.controller == "adaptive":
        settled = coefficient(reference, scores, target=world.kl.target)
    best = optimum(reference, scores, coef=settled)
    lengths = torch.tensor([len(response) for response in world.responses()]).double()
    return Result(
        start=divergence(reference, best),
        end=divergence(policy, best),
        coef=trainer.kl.coef,
        settled=settled,
        length=float(((policy.exp() - best.exp()) * lengths).sum(dim=1).mean()),
    )


def fixed(coef: float) -> KL:
    """A penalty whose coefficient stays."""
    return KL(coef=coef, controller="fixed")


def adaptive(target: float) -> KL:
    """A penalty that steers to a target, from a coefficient that is far too large."""
    return KL(coef=2.0, controller="adaptive", target=target, horizon=800.0)


TABLE: dict[str, dict[str, Any]] = {
    **{
        f"{budget} token, beta {coef}": {"budget": budget, "kl": fixed(coef)}
        for budget in (1, 2)
        for coef in (0.5, 1.0, 2.0)
    },
    **{
        f"2 token, beta {coef}, one trunk": {
            "kl": fixed(coef),
            "trunk": True,
            "optimisation": WARMED,
        }
        for coef in (0.5, 1.0, 2.0)
    },
    "2 token, target 0.2": {"kl": adaptive(0.2)},
    "2 token, target 0.4": {"kl": adaptive(0.4)},
    "2 token, no EOS scores -1": {"kl": fixed(1.0), "reward": Reward(missing_eos_score=-1.0)},
    "2 token, beta 1.0, mean score 3": {"kl": fixed(1.0), "mean_score": 3.0},
    "2 token, mean score 3, whitened": {
        "kl": fixed(1.0),
        "mean_score": 3.0,
        "reward": Reward(missing_eos_score=None, whiten=True),
    },
}
"""The last row does not arrive, and must not: docs/ppo.md, "Reward whitening does move it"."""


def main(seeds: tuple[int, ...] = (1, 2, 3)) -> None:
    """Prints the table: one line a world, the seeds side by side."""
    sys.stdout.write(
        "| world | KL(ref, optimum) | KL(policy, optimum) | beta, settled | length |\n"
    )
    sys.stdout.write("|---|---|---|---|---|\n")
    for name, fields in TABLE.items():
        results = [drive(World(seed=seed, updates=120, **fields)) for seed in seeds]
        columns = [
            ", ".join(f"{result.start:.2f}" for result in results),
            ", ".join(f"{result.end:.4f}" for result in results),
            ", ".join(f"{result.coef:.3f} ({result.settled:.3f})" for result in results),
            ", ".join(f"{result.length:+.3f}" for result in results),
        ]
        sys.stdout.write(f"| {name} | {' | '.join(columns)} |\n")
        sys.stdout.flush()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
