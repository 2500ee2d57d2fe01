"""What can be wrong with a recipe beside its size, found before anything is loaded."""

import importlib.metadata
import importlib.util
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.checkpoint import POINT_COPIES
from pipeline.circumstances import LIBRARIES
from pipeline.config import TRACKERS, require
from pipeline.distributed import NOT_FLATTENED
from pipeline.doctor.dividing import asked, refuses, shares_base
from pipeline.doctor.machine import Machine
from pipeline.doctor.need import Need
from pipeline.doctor.recipe import Recipe
from pipeline.errors import UserError, installing
from pipeline.ppo.settings import Source
from pipeline.ppo.sources import reading_at
from pipeline.ppo.wanted import check_sharding
from pipeline.tokenizer import decode_response, encode_conversation, encode_prompt, encode_response
from pipeline.trackers import key_is_configured

TRAINED = ("pretrain", "sft", "reward", "reward_guard")
SAYING = ("hello", "How are you? I'm fine.", "naïve café, 20 °C")
"""Replies that have to come through a tokenizer as they are."""
PIN = re.compile(r"^([A-Za-z0-9_.-]+)==(\S+)", re.MULTILINE)


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        state: good, wrong, or unknown where it cannot be looked at yet.
        text: what was found and, where it is wrong, what mends it.
    """

    state: str
    text: str


def examine(
    recipe: Recipe, machine: Machine, needs: Sequence[Need], *, copy: float
) -> list[Finding]:
    """Returns all findings.

    Args:
        recipe: that is looked at.
        machine: that it is to run on.
        needs: of its stages.
        copy: bytes of one model in float32.
    """
    found: list[Finding] = []
    looks = (architecture, tokens, agreement, batches, contexts, sharding, guard, one_base)
    for look in (*looks, libraries, tracking):
        try:
            found += look(recipe, machine)
        except UserError as error:
            found.append(Finding("wrong", str(error)))
    return [*found, disk(recipe, machine, needs, copy=copy)]


def architecture(recipe: Recipe, _machine: Machine) -> Iterator[Finding]:
    """Yields whether the model to start from is the one that the recipe says it is."""
    pretrain = recipe.configs["pretrain"]
    if not pretrain.init_from:
        return
    config = recipe.origin_config()
    if config is None:
        text = f"{pretrain.init_from} is not yet there: the recipe's architecture is believed"
        yield Finding("unknown", text)
        return
    different = "; ".join(pretrain.architecture.differences(config))
    yield Finding(
        "wrong" if different else "good",
        f"architecture: {pretrain.init_from}: {different}. Mend pretrain.yaml"
        if different
        else f"architecture: {pretrain.init_from} is what the recipe says",
    )


def tokens(recipe: Recipe, _machine: Machine) -> Iterator[Finding]:
    """Yields whether PAD is not EOS, a prompt is rendered, and replies come back as they were.

    A tokenizer that is still to be taken is looked at as the stage would write it.
    """
    found = recipe.tokenizer()
    if found is None:
        yield Finding("unknown", "tokenizer: not yet there; PAD, EOS and template are unchecked")
        return
    place, (tokenizer, mended) = found
    changes = "".join(f"; {change}" for change in mended)
    yield Finding("good", f"{place}: PAD is not EOS, a prompt is rendered{changes}")
    messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]
    ids, is_reply = encode_conversation(tokenizer, messages)
    reply = [token for token, marked in zip(ids, is_reply, strict=True) if marked]
    lost = [
        text
        for text in SAYING
        if decode_response(tokenizer, encode_response(tokenizer, text)) != text
    ]
    prompt = encode_prompt(tokenizer, "hello")
    if tokenizer.eos_token_id not in reply or decode_response(tokenizer, reply) != "hi":
        text = f"{place}: the chat template does not mark a reply and its EOS. Run: make tokenizer"
        yield Finding("wrong", text)
    elif lost or not prompt or ids[: len(prompt)] != prompt:
        text = f"{place}: {lost or 'a prompt'} does not come through the tokenizer as it is"
        yield Finding("wrong", f"{text}. Take another model's tokenizer")
    else:
        yield Finding("good", f"{place}: the template marks replies, and texts come back")


def agreement(recipe: Recipe, _machine: Machine) -> Iterator[Finding]:
    """Yields how each reward model reads what the policy writes."""
    for source in recipe.configs["ppo"].reward.used_sources:
        if source.function:
            continue
        try:
            yield _reading(recipe, source)
        except UserError as error:
            yield Finding("wrong", str(error))


def _reading(recipe: Recipe, source: Source) -> Finding:
    """Returns whether a reward model reads the policy's tokens, as ppo and evaluate find it.

    Raises:
        UserError: they would refuse it.
    """
    from pipeline.models import load_tokenizer
    from pipeline.reward.reading import TokenReading

    name, who = source.model, f"reward model {source.label}"
    require(
        not source.is_stage or name in recipe.configs,
        f"reward.sources: {name}: there is no configs/{recipe.name}/{name}.yaml. Write it, or name "
        "another source",
    )
    own = not source.is_stage or bool(recipe.configs[name].init_from)
    ours = recipe.folder / "sft"
    theirs = recipe.folder / name if source.is_stage else Path(name)
    if not all((folder / "tokenizer_config.json").is_file() for folder in (ours, theirs)):
        text = "not yet there" if own else "made from sft, with its tokenizer"
        return Finding("unknown", f"{who}: {text}")
    reading = reading_at(theirs, tokenizer=load_tokenizer(ours), own=own)
    what = "the policy's tokens" if isinstance(reading, TokenReading) else "the text anew"
    return Finding("good", f"{who} reads {what}")


def batches(recipe: Recipe, machine: Machine) -> Iterator[Finding]:
    """Yields whether batch sizes divide over the processes."""
    processes = machine.processes
    for stage in TRAINED:
        config = recipe.configs.get(stage)
        if config is not None and not getattr(config, "take_as_is", False):
            config.training.accumulation(processes)
    ppo = recipe.configs["ppo"]
    if ppo.minibatch_size % processes:
        yield Finding(
            "wrong",
            f"ppo: minibatch_size {ppo.minibatch_size} is no multiple of {processes}; "
            "processes would have to wait for others",
        )
    else:
        yield Finding("good", f"batch sizes divide over {processes} process(es)")


def contexts(recipe: Recipe, _machine: Machine) -> Iterator[Finding]:
    """Yields whether the longest rows of all stages fit into the model's context."""
    context = recipe.blueprint(packs=False).context
    configs = recipe.configs
    lengths = {
        "pretrain: sequence_length": configs["pretrain"].sequence_length,
        "sft: max_length": configs["sft"].max_length,
        "reward: max_length": configs["reward"].max_length,
        "ppo: max_prompt_tokens + max_response_tokens": configs["ppo"].longest,
    }
    long = [f"{name} {tokens}" for name, tokens in lengths.items() if context and tokens > context]
    if configs["reward"].init_from:
        long = [words for words in long if not words.startswith("reward")]
    text = f"the model's context of {context} positions"
    yield Finding(
        "wrong" if long else "good",
        f"{', '.join(long)}: beyond {text}. Shorten them" if long else f"rows fit into {text}",
    )


def sharding(recipe: Recipe, machine: Machine) -> Iterator[Finding]:
    """Yields which stages cannot divide their models, where they are to."""
    configs = recipe.configs
    for stage in (*TRAINED, "ppo"):
        kind = asked(machine, stage, configs).kind
        if stage not in configs:
            continue
        if refuses(stage, configs, kind=kind):
            yield Finding(
                "wrong",
                f"{stage} of {recipe.name} keeps its models whole and refuses {kind}. Run it with "
                "configs/accelerate/ddp.yaml",
            )
        elif kind.startswith("zero") and configs[stage].training.optimizer == "muon":
            yield Finding(
                "wrong",
                f"{stage}: {NOT_FLATTENED}. Set {stage}.training.optimizer to adamw, or use "
                "configs/accelerate/fsdp2.yaml",
            )
    ppo, wanted = configs["ppo"], asked(machine, "ppo", configs)
    if wanted.kind == "fsdp" and ppo.roles == "separate":
        check_sharding(
            "fsdp2_offload" if wanted.offload_weights else "fsdp2",
            roles=ppo.roles,
            engine=ppo.engine.name,
            num_processes=machine.processes,
            on_gpu=machine.is_gpu,
            compiles=ppo.optimisation.compile,
        )


def guard(recipe: Recipe, _machine: Machine) -> Iterator[Finding]:
    """Yields whether the recipe trains the model that is to watch ppo."""
    every = recipe.configs["ppo"].guard.every
    if every and "reward_guard" not in recipe.configs:
        yield Finding(
            "wrong",
            f"ppo: guard.every is {every}, and there is no configs/{recipe.name}/reward_guard.yaml "
            "to train a guard with. Write one after configs/cpu/reward_guard.yaml, or set it to 0",
        )


def one_base(recipe: Recipe, _machine: Machine) -> Iterator[Finding]:
    """Yields whether evaluate finds the adapters that it is to read on one base."""
    if not recipe.configs["evaluate"].on_one_base:
        return
    found = shares_base(recipe.configs)
    yield Finding(
        "good" if found else "wrong",
        "evaluate reads the adapters of ppo and reward on one base"
        if found
        else "evaluate: on_one_base needs ppo.roles lora and reward.lora.rank above 0. Set it to "
        "false, or these",
    )


def libraries(recipe: Recipe, machine: Machine) -> Iterator[Finding]:
    """Yields whether the libraries are those that were tested, and those there that are needed."""
    pins = dict(PIN.findall(Path("constraints.txt").read_text(encoding="utf-8")))
    found = {name: importlib.metadata.version(name).partition("+")[0] for name in LIBRARIES}
    other = [f"{name} {found[name]} (tested: {pins[name]})" for name in LIBRARIES
             if found[name] != pins[name]]  # fmt: skip
    text = (
        f"{', '.join(other)}. Run: make install" if other else "libraries are the tested versions"
    )
    yield Finding("wrong" if other else "good", text)
    settings = [getattr(config, "lora", config) for config in recipe.configs.values()]
    four_bit = any(getattr(one, "quantise", "none") == "4bit" for one in settings)
    trackers = {TRACKERS[name] for config in recipe.configs.values() for name in config.trackers}
    colocated = recipe.configs["ppo"].engine.name == "vllm_colocate"
    wanted = {
        "bitsandbytes": (four_bit, f"Run: {installing('qlora')}"),
        "deepspeed": (machine.sharding.kind.startswith("zero"), f"Run: {installing('deepspeed')}"),
        "vllm": (colocated, "docs/engines.md says how, or set ppo.engine.name to native"),
        **{name: (True, f"Run: {installing(name)}") for name in sorted(trackers - {"wandb"})},
    }
    for name, (is_wanted, mend) in wanted.items():
        if is_wanted and importlib.util.find_spec(name) is None:
            yield Finding("wrong", f"{name} is not installed. {mend}")


def tracking(recipe: Recipe, _machine: Machine) -> Iterator[Finding]:
    """Yields whether metrics reach Weights & Biases, where they are to."""
    wanted = {name for config in recipe.configs.values() for name in config.trackers}
    if not wanted & {"auto", "wandb"}:
        return
    without = "wandb has no key: it writes offline, and stages say how to sync"
    yield Finding("good", "wandb has a key" if key_is_configured() else without)


def disk(recipe: Recipe, machine: Machine, needs: Sequence[Need], *, copy: float) -> Finding:
    """Returns whether the disk holds every stage's model and its resume points."""
    wanted = 0.0
    for need in needs:
        config = recipe.configs[need.stage]
        if need.stage == "evaluate" or getattr(config, "take_as_is", False):
            wanted += copy if need.stage == "pretrain" else 0
            continue
        models = 2 + bool(config.guard.every) if need.stage == "ppo" else 1  # with critic, and best
        wanted += models * copy + POINT_COPIES * need.trained * (config.saving.keep + 1)
    text = f"disk: models and resume points take {wanted / 1e9:,.1f} GB"
    if not machine.is_here:
        return Finding("unknown", text)
    place = next(p for p in (recipe.folder, *recipe.folder.parents) if p.exists())
    if not place.is_dir() or not os.access(place, os.W_OK):
        what = "no folder" if not place.is_dir() else "not writable"
        return Finding("wrong", f"disk: {place} is {what}. Choose another one with RUN=")
    free = shutil.disk_usage(place).free
    text += f", {free / 1e9:,.1f} are free"
    if free < wanted:
        return Finding("wrong", f"{text}. Free some, or choose another folder with RUN=")
    return Finding("good", text)
