"""What each stage of a recipe needs of a machine: bytes of one device, seconds of one step."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from pipeline.config import require
from pipeline.distributed import num_cores
from pipeline.doctor.blueprint import Blueprint
from pipeline.doctor.dividing import divided, in_parts, shares_base
from pipeline.doctor.evaluating import rehearse_policies, rehearse_pretrained, rehearse_scoring
from pipeline.doctor.holding import REPLYING, held_at, peak_of
from pipeline.doctor.lengths import UNKNOWN, Lengths
from pipeline.doctor.machine import CPU_SLACK, GB, GPU_CONTEXT, GPU_SLACK, Machine
from pipeline.doctor.need import Need, Peak
from pipeline.doctor.rehearsal import (
    Passes,
    Replies,
    rankings,
    rehearse_generation,
    rehearse_language_model,
    rehearse_measuring,
    rehearse_ppo,
    rehearse_reward,
    training_rows,
)
from pipeline.doctor.scaling import Act, Scaling, of_replies
from pipeline.doctor.seen import Rehearsal
from pipeline.doctor.timing import run_seconds, step_seconds, update_seconds
from pipeline.doctor.ways import on_processor
from pipeline.lora import LoRA
from pipeline.models import choose_precision
from pipeline.ppo.engine_settings import Engine
from pipeline.ppo.rollout import MOST_ROWS
from pipeline.ppo.settings import Settings

LIBRARIES = {"pretrain": 0.54, "sft": 0.58, "reward": 0.60, "reward_guard": 0.60, "ppo": 0.53,
             "evaluate": 0.59}  # fmt: skip
"""GB of a process that has loaded a stage's libraries and read some rows: what stages of the smoke
recipe take, whose models weigh kilobytes (`make RECIPE=smoke`, the manifests' peak_memory_gib)."""
NO_LORA = LoRA()
PROMPT_SHARE = 0.25
"""Share of a text that is taken for its prompt, where settings bound both together."""


@dataclass(frozen=True, kw_only=True)
class Planner:
    """Turns settings of stages into needs, on one machine.

    Attributes:
        blueprint: of the recipe's language models.
        machine: what they run on.
        ranking: texts of a row of the reward stage.
        lengths: of the run's rows, which time goes by.
    """

    blueprint: Blueprint
    machine: Machine
    ranking: int
    lengths: Lengths = UNKNOWN

    def need(self, stage: str, configs: Mapping[str, Any]) -> Need:
        """Returns what a stage needs with these settings of it and of the others.

        Raises:
            UserError: ppo is to read an adapter that reward does not train.
        """
        config = configs[stage]
        machine = divided(self.machine, stage, configs).computing(config.threads)
        if machine != self.machine:
            return replace(self, machine=machine).need(stage, configs)
        if stage == "pretrain" and config.take_as_is:
            return self._measured(config)
        if stage in ("pretrain", "sft"):
            return self._language_model(stage, config)
        if stage == "ppo":
            return self._ppo(config, configs["reward"])
        if stage == "evaluate":
            return self._evaluate(config, configs)
        return self._reward(config, stage)

    def rehearse(self, act: Act, *, rows: int, length: int) -> Rehearsal:
        """Returns what an act makes of so many rows of so many tokens."""
        scaling = Scaling(blueprint=self.blueprint, machine=self.machine)
        return scaling.rehearse(act, rows=rows, length=length)

    @cached_property
    def copy_bytes(self) -> float:
        """Bytes of one causal LM in float32."""
        sizes = []
        for depth in (1, 2):
            weights = self.blueprint.of_depth(depth).causal_lm().parameters()
            sizes.append(sum(weight.numel() * weight.element_size() for weight in weights))
        return float(sizes[0] + (self.blueprint.layers - 1) * (sizes[1] - sizes[0]))

    def precision(self, wanted: str) -> str:
        """Returns bf16 or fp32; GPUs compute in bf16 where it is left to them."""
        if self.machine.is_gpu:
            return "fp32" if wanted == "fp32" else "bf16"
        with on_processor():
            return choose_precision(wanted)

    def _measured(self, config: Any) -> Need:
        length = config.sequence_length
        rehearsal = self.rehearse(
            lambda blueprint, ledger, rows: rehearse_measuring(
                blueprint,
                ledger,
                batch=training_rows(rows, length),
                quantised=config.quantise == "4bit",
            ),
            rows=config.training.microbatch_size,
            length=length,
        )
        seconds = rehearsal.moments["validation"].seconds
        peaks = [peak_of(self.machine, rehearsal, "validation")]
        return self._most("pretrain", peaks, seconds=seconds, unit="batch")

    def _language_model(self, stage: str, config: Any) -> Need:
        adapted = stage == "sft"
        lora = config.lora if adapted else NO_LORA
        length = config.max_length if adapted else config.sequence_length
        rehearsal = self.rehearse(
            lambda blueprint, ledger, rows: rehearse_language_model(
                blueprint,
                ledger,
                training=config.training,
                lora=lora,
                batch=training_rows(rows, length),
                passes=self._passes(config),
            ),
            rows=config.training.microbatch_size,
            length=length,
        )
        return self._trained(stage, rehearsal, config, allowed=length)

    def _reward(self, config: Any, stage: str) -> Need:
        texts, length = self.ranking, config.max_length
        prompt, packed = max(1, int(PROMPT_SHARE * length)), config.pack and not config.init_from
        rehearsal = self.rehearse(
            lambda blueprint, ledger, rows: rehearse_reward(
                blueprint,
                ledger,
                training=config.training,
                lora=config.lora,
                batch=rankings(
                    rows=rows,
                    texts=texts,
                    prompt=prompt,
                    length=length,
                    packed=packed,
                ),
                dropout=config.dropout,
                passes=self._passes(config),
            ),
            rows=config.training.microbatch_size,
            length=texts * length,
        )
        allowed = texts * length - (texts - 1) * prompt * packed  # packed texts share a prompt
        constants = self._constants(config)
        return self._trained(stage, rehearsal, config, constants, allowed=allowed)

    def _ppo(self, config: Any, reward: Any) -> Need:
        require(
            config.roles != "lora" or reward.lora.rank > 0,
            "ppo: roles lora reads the reward model's adapter, and reward trains none. Set "
            "reward.lora.rank above 0, or roles to separate",
        )
        asked = max(config.prompts_per_update, config.validation_prompts)
        share = math.ceil(asked / self.machine.processes)
        sharding, workers = self.machine.sharding, self._workers(config)
        rows = min(MOST_ROWS, math.ceil(share / workers))
        mine = math.ceil(config.minibatch_size / self.machine.processes)
        micro = min(config.microbatch_size, mine)
        passes = min(2, math.ceil(mine / micro))
        settings = _rehearsed(config, precision=self.precision(config.precision))
        replies = Replies(
            rows=rows, prompt=config.max_prompt_tokens, response=config.max_response_tokens
        )
        rehearsal = self.rehearse(
            lambda blueprint, ledger, rows: rehearse_ppo(
                blueprint,
                ledger,
                settings=replace(
                    settings,
                    prompts_per_update=passes * rows,
                    minibatch_size=passes * rows,
                    microbatch_size=rows,
                ),
                roles=config.roles,
                loras=(config.lora, reward.lora),
                replies=replies,
                recomputes=config.activation_checkpointing,
                divided=sharding.divides_weights,
            ),
            rows=micro,
            length=passes * config.longest,
        )
        narrow = sharding.divides_weights and settings.precision == "bf16"
        rehearsal = in_parts(rehearsal, kind=sharding.kind, narrow=narrow)
        peaks = list(self._updating(rehearsal, config))
        seconds = update_seconds(
            rehearsal.moments,
            config,
            self.lengths,
            processes=self.machine.processes,
            batch=rows,
            passes=passes,
        )
        return replace(
            self._most("ppo", peaks, seconds=seconds, unit="update"),
            units=config.updates,
            trained=rehearsal.gradients,
            roles=rehearsal.roles,
        )

    def _updating(self, rehearsal: Rehearsal, config: Any) -> Iterator[Peak]:
        workers, engine = self._workers(config), config.engine
        judges = [one for one in config.reward.sources if one.is_stage and one.model != "reward"]
        beside = (len(judges) + bool(config.guard.every)) * self.copy_bytes  # whole everywhere
        by_vllm = engine.gpu_memory_frac * self.machine.memory
        if engine.name == "vllm_colocate":
            extra = beside + by_vllm
            yield held_at(self.machine, rehearsal, "replies by vLLM", gradients=False, extra=extra)
            beside += 0 if engine.sleep else by_vllm
        if engine.name == "native":
            for name in REPLYING:
                yield peak_of(self.machine, rehearsal, name, workers=workers, extra=beside)
        yield peak_of(self.machine, rehearsal, "measure", workers=workers, extra=beside)
        for name in ("optimise", "step"):
            yield peak_of(
                self.machine, rehearsal, name, gradients=True, workers=workers, extra=beside
            )
        yield peak_of(self.machine, rehearsal, "text", extra=beside)
        together = self.machine.processes > 1 and not self.machine.sharding.divides_state
        if together:  # a role's gradients in a row, and their sum
            largest = max(role.trained for role in rehearsal.roles.values())
            yield held_at(self.machine, rehearsal, "reduce gradients", extra=beside + 2 * largest)
        if config.roles == "lora" and not self.machine.is_gpu:
            extra = beside + self.copy_bytes
            yield held_at(self.machine, rehearsal, "save merged", gradients=False, extra=extra)

    def _evaluate(self, config: Any, configs: Mapping[str, Any]) -> Need:
        ppo, shared = configs["ppo"], config.on_one_base and shares_base(configs)
        replies = Replies(
            rows=config.batch_size, prompt=ppo.max_prompt_tokens, response=ppo.max_response_tokens
        )
        quantised = shared and ppo.lora.quantise == "4bit"
        scoring = configs["reward"].lora if shared else NO_LORA
        one_after_the_other = [
            self.rehearse(
                of_replies(act, replies, **more), rows=config.batch_size, length=ppo.longest
            )
            for act, more in (
                (rehearse_policies, {"lora": ppo.lora if shared else None}),
                (rehearse_pretrained, {"quantised": quantised}),
                (rehearse_scoring, {"quantised": quantised, "lora": scoring}),
            )
        ]
        workers = self._workers(config)
        peaks = [
            peak_of(
                self.machine,
                rehearsal,
                name,
                workers=1 if shared and name == "divergence" else workers,
            )
            for rehearsal in one_after_the_other
            for name in rehearsal.moments
        ]
        moments = {k: v for rehearsal in one_after_the_other for k, v in rehearsal.moments.items()}
        processes = self.machine.processes
        seconds = run_seconds(moments, config, ppo, self.lengths, processes=processes)
        return replace(self._most("evaluate", peaks, seconds=seconds, unit="run"), units=1)

    def _workers(self, config: Any) -> int:
        if self.machine.is_gpu or self.machine.sharding.divides_state:
            return 1
        threads = config.threads or max(1, num_cores() // self.machine.processes)
        wanted = getattr(config, "workers", 0)
        return wanted or min(2, threads)

    def _passes(self, config: Any) -> Passes:
        sharding = self.machine.sharding
        bf16 = self.precision(config.training.precision) == "bf16"
        return Passes(
            bf16=bf16,
            narrow=bf16 and sharding.divides_state,
            adds_up=self._adds_up(config.training),
            recomputes=config.activation_checkpointing,
            all_logits=sharding.kind == "zero3",
        )

    def _trained(
        self, stage: str, rehearsal: Rehearsal, config: Any, *more: Peak, allowed: int
    ) -> Need:
        """Returns the need of a stage that trains one model, with rows of so many tokens at most.

        It is that of the moment that takes most, or of what comes beside.
        """
        narrow = self._passes(config).narrow
        parts = in_parts(rehearsal, kind=self.machine.sharding.kind, narrow=narrow)
        peaks = [
            peak_of(self.machine, parts, "validation"),
            *self._training(parts, config.training),
            *more,
        ]
        seconds = step_seconds(
            rehearsal.moments,
            config.training,
            processes=self.machine.processes,
            share=self.lengths.row_share(stage, allowed),
        )
        return replace(
            self._most(stage, peaks, seconds=seconds, unit="step"),
            units=config.training.steps,
            trained=rehearsal.gradients * (2 if narrow else 1),  # points hold float32
        )

    def _adds_up(self, training: Any) -> bool:
        """Whether gradients of other passes are there, or count as such since they are divided."""
        together = training.microbatch_size * self.machine.processes
        return training.minibatch_size > together or self.machine.sharding.divides_state

    def _training(self, rehearsal: Rehearsal, training: Any) -> Iterator[Peak]:
        adds_up = self._adds_up(training)
        buckets = 0.0
        if self.machine.processes > 1 and not self.machine.sharding.divides_state:
            buckets = rehearsal.gradients  # of DistributedDataParallel
        yield peak_of(self.machine, rehearsal, "pass", gradients=adds_up, extra=buckets)
        yield peak_of(self.machine, rehearsal, "step", gradients=True, extra=buckets)

    def _constants(self, config: Any) -> Peak:
        """The SFT model replies before the reward model is there, to normalise its scores."""
        wanted = config.normalisation
        replies = Replies(
            rows=min(wanted.batch_size, math.ceil(wanted.num_samples / self.machine.processes)),
            prompt=max(1, config.max_length - wanted.response_tokens),
            response=wanted.response_tokens,
        )
        spoken = self.rehearse(
            of_replies(rehearse_generation, replies, quantised=config.lora.quantise == "4bit"),
            rows=replies.rows,
            length=replies.prompt + replies.response,
        )
        name = max(REPLYING, key=lambda name: spoken.moments[name].most)
        working = spoken.moments[name].most - spoken.weights
        return Peak(moment=f"normalise, {name}", weights=spoken.weights, working=working)

    def _most(self, stage: str, peaks: list[Peak], *, seconds: float, unit: str) -> Need:
        peak = max(peaks, key=lambda one: one.live)
        if self.machine.is_gpu:
            base = GPU_CONTEXT + GPU_SLACK * peak.live
        else:
            base = LIBRARIES[stage] * GB + CPU_SLACK * peak.live
        room = self.machine.room
        return Need(stage=stage, peak=peak, base=base, room=room, seconds=seconds, unit=unit)


def _rehearsed(config: Any, *, precision: str) -> Settings:
    """Returns ppo's settings of an update of one pass over the rows, by one worker."""
    groups = 1 if config.advantage.needs_value_model else config.advantage.responses_per_prompt
    return replace(
        config.settings(torch.device("cpu")),
        precision=precision,
        workers=1,
        engine=Engine(),  # what else samples is not of this process
        optimisation=replace(config.optimisation, epochs=1, critic_warmup=0, compile=False),
        advantage=replace(config.advantage, responses_per_prompt=groups),
    )
