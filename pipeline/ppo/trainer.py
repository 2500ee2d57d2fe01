"""PPO with a KL penalty: `update` reads as the algorithm.

Every process holds the rows of all processes (token ids and a few floats each), so whitening, KL
control and metrics are global by construction; generation, scoring and gradients are divided.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline import distributed
from pipeline.errors import UserError
from pipeline.logprobs import perplexity
from pipeline.ppo.advantages import RunningBaseline, gae, grpo, reinforce, rloo, whiten
from pipeline.ppo.checks import check_experience
from pipeline.ppo.engines import RolloutEngine, corrected, open_engine
from pipeline.ppo.experience import Experience, Roles, assemble, measure, move_reference
from pipeline.ppo.kl import AdaptiveController, Controller, FixedController, compensated
from pipeline.ppo.metrics import explained_variance, objective
from pipeline.ppo.midway import Midway
from pipeline.ppo.optimiser import Optimiser
from pipeline.ppo.order import interleave, rows_in_turn
from pipeline.ppo.passes import Lesson, precision_context
from pipeline.ppo.rewards import final_scores, token_rewards
from pipeline.ppo.rollout import ENGINE_LOGPROBS, Sampled, uniforms
from pipeline.ppo.scorers import Divided, Rewards, token_scorer
from pipeline.ppo.settings import KL, Settings
from pipeline.restricted import restricted
from pipeline.sequences import text_logprobs
from pipeline.sharding import divided_as, gathered, in_one_pass
from pipeline.streams import stream

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True)
class Outcome:
    """What one update reports: metrics (reproducible), timings (clocks), and its rollout.

    Rewards and advantages are those that the losses were made of, 0 outside the mask.
    """

    metrics: dict[str, float]
    timings: dict[str, float]
    experience: Experience
    rewards: Float[Tensor, "batch time"]
    advantages: Float[Tensor, "batch time"]


class PPOTrainer:
    """Trains a policy, and a critic if there is one; all randomness is a function of the seed.

    Attributes:
        updates: how many are done.
        midway: the update under way, where it was left between two optimizer steps.
    """

    def __init__(
        self,
        roles: Roles,
        prompts: Sequence[list[int]],
        *,
        settings: Settings,
        accelerator: "Accelerator",
        eos_id: int,
        pad_id: int,
        rewards: Rewards | None = None,
        text: Int[Tensor, "row time"] | None = None,
    ) -> None:
        """Takes what scores a rollout; where it is None, the reward model of the roles does."""
        self.roles, self.prompts, self.settings = roles, prompts, settings
        self.eos_id, self.pad_id = eos_id, pad_id
        if rewards is None:
            scorer = token_scorer(
                roles.reward_model,
                pad_id=pad_id,
                batch_size=settings.microbatch_size,
                workers=settings.workers,
            )
            rewards = Rewards({"reward": Divided(scorer)})
        self.rewards = rewards
        self.updates = 0
        self.midway: Midway | None = None
        self.kl = build_controller(settings.kl)
        self.baseline = RunningBaseline(settings.advantage.baseline_decay)
        self.engine: RolloutEngine = open_engine(
            roles.policy, settings=settings, accelerator=accelerator, eos_id=eos_id, pad_id=pad_id
        )
        self.synchronised = False
        self.optimiser = Optimiser(
            roles, settings=settings, accelerator=accelerator, pad_id=pad_id, text=text
        )

    def update(self, number: int, *, goes_on: Callable[[], bool] = lambda: True) -> Outcome | None:
        """Returns the outcome of one PPO update: sample, score, penalise, estimate, optimise.

        Args:
            number: which update, from 0; prompts, uniforms and permutations follow from it.
            goes_on: asked before every optimizer step, with the same answer on every process.

        Returns:
            None where it was told not to go on: `save` keeps what was done so far, and the next
            call goes on from there.

        Raises:
            UserError: a run-time check failed; no optimizer moved after the failure.
        """
        settings = self.settings
        if self.midway is None:
            self.midway = self.roll_out(number)
        experience, timings = self.midway.experience, self.midway.timings
        mask = experience.mask
        scores = final_scores(
            experience.scores,
            experience.ended,
            missing_eos_score=settings.reward.missing_eos_score,
            clip=settings.reward.clip,
        )
        kl_coef = self.kl.coef if settings.kl.in_loss is None else 0.0
        penalised = compensated(experience.kl, mask, share=settings.kl.length_compensation)
        rewards = token_rewards(scores, penalised, mask, kl_coef=kl_coef)
        if settings.reward.whiten:
            rewards = whiten(rewards, mask, shift_mean=False)
        lesson, engine = corrected(self.estimate(experience, rewards), settings.engine)
        with _clock(timings, "optimise"):
            losses = self.optimiser.run(number, lesson, steps=self.midway.steps, goes_on=goes_on)
        self.synchronised = False
        if losses is None:
            return None

        metrics = {
            **objective(
                experience, scores, penalised, kl_coef=self.kl.coef, clip=settings.reward.clip
            ),
            **losses,
            **engine,
        }
        if lesson.returns is not None:
            metrics["value/explained_variance"] = explained_variance(
                experience.values[mask], lesson.returns[mask]
            )
        self.steer(number, metrics["objective/kl"], rewards, mask)
        _add_throughput(timings, num_tokens=int(mask.sum()))
        return Outcome(metrics, timings, experience, rewards, lesson.advantages)

    def roll_out(self, number: int) -> Midway:
        """Returns an update's beginning: responses, sampled and measured."""
        prompts = [self.prompts[row] for row in self.prompt_rows(number)]
        timings = dict[str, float]()
        with _clock(timings, "rollout"):
            sampled = self.sample(prompts, update=number)
        with _clock(timings, "score"), placed(f"update {number}"):
            experience = self.measure(prompts, sampled)
        check_experience(experience, update=number, precision=self.settings.precision)
        return Midway(experience, timings)

    def steer(
        self,
        number: int,
        kl: float,
        rewards: Float[Tensor, "batch time"],
        mask: Bool[Tensor, "batch time"],
    ) -> None:
        """Moves what the next update is made with: penalty, baseline, reference.

        Args:
            number: the update that ends.
            kl: mean KL of the rollout's responses to the reference, in nats.
            rewards: one per token, 0 outside the mask.
            mask: True on response tokens.
        """
        settings = self.settings
        if number >= settings.optimisation.critic_warmup:  # before, the KL is 0 and says nothing
            self.kl.update(kl, num_episodes=len(mask))
        if settings.advantage.estimator == "reinforce":
            _, to_go = reinforce(rewards, mask, gamma=settings.reward.gamma, baseline=0.0)
            self.baseline.update(float(to_go[:, 0].mean()))
        self.updates, self.midway = number + 1, None
        if settings.kl.reference_rate > 0 and self.updates % settings.kl.reference_every == 0:
            move_reference(self.roles, rate=settings.kl.reference_rate)

    def prompt_rows(self, number: int) -> list[int]:
        """Returns the prompt of each response of an update.

        Every prompt comes once per epoch, in a new order every epoch; responses to the same prompt
        stand in adjacent rows.
        """
        group = self.settings.advantage.responses_per_prompt
        size, total = self.settings.prompts_per_update // group, len(self.prompts)
        rows = rows_in_turn(
            self.settings.seed, "prompts", start=number * size, size=size, total=total
        )
        return [row for row in rows for _ in range(group)]

    def estimate(self, experience: Experience, rewards: Float[Tensor, "batch time"]) -> Lesson:
        """Returns the rollout with advantages by the configured estimator."""
        mask, options, reward = experience.mask, self.settings.advantage, self.settings.reward
        if options.estimator == "gae":
            advantages, returns = gae(
                rewards, experience.values, mask, gamma=reward.gamma, lam=reward.lam
            )
            return Lesson(experience, whiten(advantages, mask), returns, self.kl.coef)
        if options.estimator == "reinforce":
            advantages, _ = reinforce(
                rewards, mask, gamma=reward.gamma, baseline=self.baseline.value
            )
            return Lesson(experience, advantages, None, self.kl.coef)
        compare = rloo if options.estimator == "rloo" else grpo
        group = options.responses_per_prompt
        return Lesson(experience, compare(rewards, mask, group=group), None, self.kl.coef)

    def sample(
        self, prompts: Sequence[list[int]], *, update: int, name: str = "rollout"
    ) -> Sampled:
        """Returns one response per prompt; each process generates its share.

        Args:
            prompts: token ids, the same list on every process.
            update: enters the uniform numbers.
            name: random stream, so that validation and rollout never share numbers.
        """
        mine = range(distributed.rank(), len(prompts), distributed.world_size())
        numbers = uniforms(
            stream(self.settings.seed, name),
            update=update,
            rows=mine,
            positions=self.settings.max_response_tokens,
        )
        if not self.synchronised:  # at the start, after a resume and after every update
            self.engine.synchronise()
            self.synchronised = True
        sampled = self.engine.sample([prompts[row] for row in mine], uniforms=numbers)
        parts = distributed.gather_objects(sampled)
        return Sampled(
            interleave([part.responses for part in parts]),
            {name: interleave([part.figures[name] for part in parts]) for name in sampled.figures},
        )

    def measure(self, prompts: list[list[int]], sampled: Sampled) -> Experience:
        """Returns the rows with log-probabilities, values and scores of all roles.

        In fp32 the policy's own are those of sampling; in bf16 a pass over whole rows rounds
        otherwise than steps through a cache do, and one trunk is read for the values anyway. Of an
        engine that is not the policy they are never taken, but kept beside the policy's.
        """
        responses = sampled.responses
        by_engine = ENGINE_LOGPROBS in sampled.figures
        keeps = self.settings.precision == "fp32" and not self.roles.one_trunk and not by_engine
        known = sampled.figures if keeps else {}
        rows = distributed.even_share(range(len(prompts)))
        with precision_context(self.settings.precision, self.roles.policy.device):
            measured = measure(
                self.roles,
                [prompts[row] for row in rows],
                [responses[row] for row in rows],
                known={name: [kept[row] for row in rows] for name, kept in known.items()},
                temperature=self.settings.temperature,
                pad_id=self.pad_id,
                batch_size=self.settings.microbatch_size,
                workers=self.settings.workers,
            )
            parts = self.rewards.measure(prompts, responses)
        shares = distributed.gather_objects(measured)
        together = {
            name: interleave([part[name] for part in shares])[: len(prompts)] for name in measured
        }
        return assemble(
            prompts,
            responses,
            {**together, **(sampled.figures if by_engine else {})},
            scores=self.rewards.together(parts),
            parts=parts,
            eos_id=self.eos_id,
        )

    @torch.no_grad()
    def text_perplexity(self, text: Int[Tensor, "row time"]) -> float:
        """Returns the policy's perplexity on packed rows of text, exp(mean nats per token)."""
        policy, rows = self.roles.policy, distributed.even_share(range(len(text)))
        count = len(range(distributed.rank(), len(text), distributed.world_size()))
        total = 0.0
        for start in range(0, len(rows), self.settings.microbatch_size):
            ids = text[rows[start : start + self.settings.microbatch_size]].to(policy.device)
            with precision_context(self.settings.precision, policy.device):
                logprobs = in_one_pass(policy, text_logprobs, policy, ids)
            total -= float(logprobs[: max(0, count - start)].sum())
        num_tokens = len(text) * (text.shape[1] - 1)
        return perplexity(sum(distributed.gather_objects(total)) / num_tokens)

    def save(self, folder: Path) -> None:
        """Writes the state of a resume point: what moves, whole. Every process must call it.

        Between two optimizer steps the rollout and the metrics of the steps are part of it.
        """
        for name, model in self._moved().items():
            weights = gathered(dict(model.named_parameters()))
            if distributed.is_main():
                save_file(weights, folder / f"{name}.safetensors")
        state = {
            **self.optimiser.state(),
            "kl": self.kl.state(),
            "baseline": self.baseline.value,
            "updates": self.updates,
            "midway": self.midway and self.midway.state(),
        }
        if distributed.is_main():
            torch.save(state, folder / "state.pt")

    @torch.no_grad()
    def load(self, folder: Path, *, step: int) -> None:
        """Takes up the state of a resume point.

        Args:
            folder: the point's.
            step: its number, which in the formats 1 and 2 counted updates.
        """
        for name, model in self._moved().items():
            weights = load_file(folder / f"{name}.safetensors")
            for key, parameter in model.named_parameters():
                parameter.copy_(divided_as(parameter, weights[key]))
        with restricted(folder):
            state = torch.load(folder / "state.pt", weights_only=True)
        self.optimiser.load_state(state)
        self.kl.coef = state["kl"]["coef"]
        self.baseline.value = state["baseline"]
        self.synchronised = False
        self.updates = state.get("updates", step)
        midway = state.get("midway")
        self.midway = midway and Midway.of(midway)

    @property
    def steps(self) -> int:
        """Optimizer steps so far; an update that ended before its last one counts as a whole."""
        under_way = len(self.midway.steps) if self.midway else 0
        return self.updates * self.settings.steps_per_update + under_way

    @property
    def moved_bytes(self) -> int:
        """Bytes of the weights that change: what a resume point holds beside moments."""
        models = self._moved().values()
        return sum(p.numel() * p.element_size() for m in models for p in m.parameters())

    def _moved(self) -> dict[str, Any]:
        """Returns the roles whose weights change from update to update."""
        moving = self.settings.kl.reference_rate > 0
        return {**self.optimiser.models, **({"reference": self.roles.reference} if moving else {})}


def build_controller(kl: KL) -> Controller:
    """Returns the configured controller of the KL coefficient."""
    if kl.controller == "fixed":
        return FixedController(kl.coef)
    return AdaptiveController(kl.coef, target=kl.target, horizon=kl.horizon)


@contextlib.contextmanager
def placed(where: str) -> Iterator[None]:
    """Says where in the run a user's mistake showed."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


@contextlib.contextmanager
def _clock(timings: dict[str, float], name: str) -> Iterator[None]:
    """Adds the seconds of a phase, and those of them in collectives where processes are several."""
    start, before = time.perf_counter(), distributed.seconds_together()
    yield
    found = {name: time.perf_counter() - start}
    if distributed.world_size() > 1:
        found["collectives"] = distributed.seconds_together() - before
    for part, seconds in found.items():
        key = f"time/{part}_seconds"
        timings[key] = timings.get(key, 0.0) + seconds


def _add_throughput(timings: dict[str, float], *, num_tokens: int) -> None:
    for name in ("rollout", "score", "optimise"):
        seconds = timings[f"time/{name}_seconds"]
        timings[f"throughput/{name}_tokens_per_second"] = num_tokens / seconds
