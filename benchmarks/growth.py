"""How the cost of one PPO update grows with lengths, prompts, vocabulary and model size.

Four random Llamas in float32, one thread, one epoch; every point is a process of its own, forked
when the libraries are there. Seconds are the processor's own, so that a shared machine distorts
them little; memory is what the update adds to the libraries.

Run     python -m benchmarks.growth [--axes length prompts vocabulary size --points=9]
        prints the table of docs/costs.md and writes benchmarks/results/growth.json
"""

import argparse
import copy
import json
import math
import multiprocessing
import resource
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

RESULTS = Path(__file__).parent / "results" / "growth.json"
BASE = {"length": 32, "prompts": 16, "vocabulary": 4096, "width": 64, "layers": 2}
AXES: dict[str, list[dict[str, int]]] = {
    "length": [{"length": 2**n} for n in range(5, 10)],
    "prompts": [{"prompts": 2**n} for n in range(4, 10)],
    "vocabulary": [{"vocabulary": 2**n} for n in range(12, 18)],
    "size": [
        {"prompts": 8, "width": width, "layers": layers}
        for width, layers in ((64, 2), (128, 4), (256, 8), (512, 8), (768, 19))
    ],
}
PROMPT_TOKENS = 16
MINIBATCHES = 4


def load_roles(point: dict[str, int]) -> Any:
    """Returns four random models of one shape."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

    from pipeline.ppo.experience import Roles

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=point["vocabulary"], hidden_size=point["width"],
        intermediate_size=point["width"] * 11 // 4, num_hidden_layers=point["layers"],
        num_attention_heads=point["width"] // 32, max_position_embeddings=1024, num_labels=1,
        tie_word_embeddings=True, bos_token_id=None, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    reward_model = LlamaForSequenceClassification(config).requires_grad_(False).eval()
    reward_model.config.reward_mean, reward_model.config.reward_std = 0.0, 1.0
    policy = LlamaForCausalLM(config).eval()
    return Roles(
        policy=policy,
        reference=copy.deepcopy(policy).requires_grad_(False),
        reward_model=reward_model,
        value=LlamaForSequenceClassification(config).eval(),
    )


def trainer_of(roles: Any, point: dict[str, int]) -> Any:
    """Returns the trainer of an update of the point's size."""
    from accelerate import Accelerator

    from pipeline.ppo.settings import KL, Advantage, Optimisation, Reward, Settings
    from pipeline.ppo.trainer import PPOTrainer

    size = point["prompts"] // MINIBATCHES
    settings = Settings(
        seed=0, updates=1, prompts_per_update=point["prompts"], minibatch_size=size,
        microbatch_size=min(16, size), max_response_tokens=point["length"], temperature=1.0,
        precision="fp32", workers=1, kl=KL(), reward=Reward(), advantage=Advantage(),
        optimisation=Optimisation(epochs=1),
    )  # fmt: skip
    prompts = [[2 + row % 50] * PROMPT_TOKENS for row in range(point["prompts"])]
    return PPOTrainer(
        roles, prompts, settings=settings, accelerator=Accelerator(cpu=True), eos_id=1, pad_id=0
    )


def measure(point: dict[str, int]) -> dict[str, float]:
    """Returns parameters, tokens sampled, processor seconds by phase, and megabytes added."""
    import torch

    torch.set_num_threads(1)
    before = resident_mb()
    roles = load_roles(point)
    trainer = trainer_of(roles, point)
    with mock.patch.object(time, "perf_counter", time.process_time):  # what the trainer reads
        start = time.process_time()
        outcome = trainer.update(0)
        seconds = time.process_time() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
    phases = {
        name.removeprefix("time/").removesuffix("_seconds"): value
        for name, value in outcome.timings.items()
        if name.endswith("_seconds")
    }
    return {
        "parameters": sum(p.numel() for p in roles.policy.parameters()),
        "tokens": int(outcome.experience.mask.sum()),
        **phases,
        "seconds": seconds,
        "megabytes": peak - before,
    }


def resident_mb() -> float:
    """Returns the memory that this process holds now, in MB."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * resource.getpagesize() / 1e6


def exponent(sizes: list[float], costs: list[float]) -> float:
    """Returns b of the least-squares fit cost = a * size^b in logarithms."""
    xs, ys = [math.log(size) for size in sizes], [math.log(cost) for cost in costs]
    x, y = sum(xs) / len(xs), sum(ys) / len(ys)
    return sum((a - x) * (b - y) for a, b in zip(xs, ys, strict=True)) / sum(
        (a - x) ** 2 for a in xs
    )


def report(axis: str, found: list[dict[str, Any]]) -> str:
    """Returns one axis as rows of a table, with exponents over all points and the last two."""
    size = "parameters" if axis == "size" else axis
    lines = []
    for point in found:
        cells = " | ".join(f"{point[name]:.2f}" for name in ("rollout", "score", "optimise"))
        lines.append(
            f"| {axis} | {point[size]:,} | {point['tokens']:,} | {cells} "
            f"| {point['seconds']:.2f} | {point['megabytes']:,.0f} |"
        )
    if len(found) > 1:
        fits = []
        for name in ("rollout", "score", "optimise", "seconds", "megabytes"):
            sizes, costs = [p[size] for p in found], [p[name] for p in found]
            fits.append(f"{exponent(sizes, costs):.2f}, {exponent(sizes[-2:], costs[-2:]):.2f}")
        lines.append(f"| {axis} | exponent: all, last two | | {' | '.join(fits)} |")
    return "\n".join(lines)


def main() -> None:
    """Prints the table and writes the figures."""
    parser = argparse.ArgumentParser(description="growth of an update's cost")
    parser.add_argument("--axes", nargs="+", choices=list(AXES), default=list(AXES))
    parser.add_argument("--points", type=int, default=9, help="smallest points of each axis")
    given = parser.parse_args()
    import pipeline.ppo.sharing
    import pipeline.ppo.trainer  # noqa: F401 - the libraries are there before the forks

    sys.stdout.write("| axis | value | tokens | rollout, s | score, s | optimise, s | update, s |")
    sys.stdout.write(" added MB |\n|---|---|---|---|---|---|---|---|\n")
    results = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    for axis in given.axes:
        found = []
        for change in AXES[axis][: given.points]:
            point = BASE | change
            with multiprocessing.get_context("fork").Pool(1) as pool:
                found.append(point | pool.apply(measure, (point,)))
        results[axis] = found
        sys.stdout.write(report(axis, found) + "\n")
        sys.stdout.flush()
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
