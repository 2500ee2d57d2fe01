"""What each saving is worth, and where the time goes: one thread's passes of workload S.

Passes with a saving and without it are run in turn, then a profiler tells operations apart.

Milliseconds are the thread's own, so that other work on the machine lengthens them little.

Run     python -m benchmarks.passes          prints the tables of docs/performance.md
"""

import contextlib
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.versus_trl.ours import Replaying, build
from benchmarks.versus_trl.workload import WORKLOADS, write
from pipeline import sequences
from pipeline.attention import PACKED
from pipeline.ppo import rollout
from pipeline.ppo.passes import Job, Lesson, Microbatch, precision_context
from pipeline.ppo.rollout import Sampled, generate, uniforms

TURNS = 4
ROWS = 16
RESPONSES = 32
PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "mkldnn::_linear_pointwise")
"""Names of matrix products in a profile."""


@contextlib.contextmanager
def nothing(*_: Any, **__: Any) -> Iterator[None]:
    """Stands in for a context that saves something."""
    yield


def plainly(
    logits: Tensor, tokens: Tensor, *, temperature: float = 1.0, **_: Any
) -> tuple[Tensor, None]:
    """Returns log-probabilities as autograd goes back through them."""
    logprobs = (logits.float() / temperature).log_softmax(dim=-1)
    return logprobs.gather(1, tokens[:, None])[:, 0], None


WITHOUT = {
    "whole last layer": (sequences, "only", nothing),
    "plain log-softmax": (sequences, "picked", plainly),
    "512 tokens of the head": (sequences, "PIECE_TOKENS", 512),
}


def trainer_of(workload: str, precision: str) -> Replaying:
    """Returns our side of the comparison with TRL on one of its workloads."""
    with tempfile.TemporaryDirectory() as folder:
        write(WORKLOADS[workload], Path(folder), rollouts=1)
        return build(Path(folder), precision=precision)


def jobs(trainer: Replaying, kind: str, *, microbatch: int) -> list[Job]:
    """Returns the passes of one minibatch."""
    prompts = list(trainer.prompts)
    responses = [trainer.replays[0][tuple(prompt)] for prompt in prompts]
    experience = trainer.measure(prompts, Sampled(responses))
    lesson = Lesson(experience, experience.logprobs, experience.values, 0.0)
    rows = torch.arange(ROWS)
    rows = rows[experience.lengths[rows].argsort(stable=True)]
    micros = [
        Microbatch.of(lesson, part, roles=trainer.roles, pad_id=trainer.pad_id)
        for part in rows.split(microbatch)
    ]
    return [Job(kind, micro, 500, ["policy", "value"]) for micro in micros]


def timed(variants: dict[str, Callable[[], Any]]) -> str:
    """Returns smallest and median milliseconds of each, taken in turn; one turn to warm up."""
    taken: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(TURNS + 1):
        for name, run in variants.items():
            start = time.thread_time()
            run()
            taken[name].append(1e3 * (time.thread_time() - start))
    cells = [f"{min(times[1:]):.0f} ({median(times[1:]):.0f})" for times in taken.values()]
    return " | ".join(cells)


def training(trainer: Replaying, kind: str, *, microbatch: int) -> dict[str, Callable[[], Any]]:
    """Returns passes forward and backward: all savings on, then each alone off."""
    work, worker = jobs(trainer, kind, microbatch=microbatch), trainer.optimiser.crew.workers[0]

    def run() -> None:
        for job in work:
            worker.backward(job)

    def without(*what: Any) -> Callable[[], None]:
        def patched() -> None:
            with mock.patch.object(*what):
                run()

        return patched

    return {"now": run, **{name: without(*what) for name, what in WITHOUT.items()}}


def decoding(trainer: Replaying, precision: str) -> dict[str, Callable[[], Any]]:
    """Returns generations by a frozen model, as below adapters: as it is, and without its savings.

    Weights that are trained autocast would keep by itself, a copy in each thread.
    """
    numbers = uniforms(0, update=0, rows=range(RESPONSES), positions=64)

    def run(attention: str = "fp32") -> None:
        trainer.roles.reference.set_attn_implementation(PACKED[attention])
        with precision_context(precision, torch.device("cpu")):
            generate(
                trainer.roles.reference, trainer.prompts[:RESPONSES], uniforms=numbers,
                eos_id=trainer.eos_id, pad_id=trainer.pad_id,
            )  # fmt: skip

    def cast() -> None:
        with mock.patch.object(rollout, "narrowed", nothing):
            run()

    others = {
        "cache in bf16": lambda: run("mixed"),
        "attention in bf16": lambda: run("bf16"),
    }
    return {"now": run, "cast every step": cast, **others}


def shares(run: Callable[[], Any]) -> str:
    """Returns the shares of time in matrix products, in attention, and in all else."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        run()
    taken = {"products": 0.0, "attention": 0.0, "else": 0.0}
    for operation in profiler.key_averages():
        attends = "scaled_dot_product" in operation.key
        kind = "products" if operation.key in PRODUCTS else "attention" if attends else "else"
        taken[kind] += operation.self_cpu_time_total
    return " | ".join(f"{part / sum(taken.values()):.0%}" for part in taken.values())


def main() -> None:
    """Prints smallest and median milliseconds of a thread, and the shares of operations."""
    torch.set_num_threads(1)
    trainers = {precision: trainer_of("S", precision) for precision in ("fp32", "bf16")}
    sys.stdout.write(
        f"| pass | rows at once | now | {' | '.join(WITHOUT)} |\n|---|---|---|---|---|---|\n"
    )
    for precision, trainer in trainers.items():
        for kind in ("policy", "value"):
            for microbatch in (8, 16):
                cells = timed(training(trainer, kind, microbatch=microbatch))
                sys.stdout.write(f"| {precision} {kind} | {microbatch} | {cells} |\n")
                sys.stdout.flush()
    sys.stdout.write(
        "\n| decoding in bf16 | now | cast every step | cache in bf16 | attention in bf16 |\n"
        "|---|---|---|---|---|\n"
    )
    for name, trainer in (("S", trainers["bf16"]), ("M", trainer_of("M", "bf16"))):
        sys.stdout.write(f"| {name} | {timed(decoding(trainer, 'bf16'))} |\n")
    sys.stdout.write("\n| share | products | attention | all else |\n|---|---|---|---|\n")
    for precision, trainer in trainers.items():
        whole = {kind: training(trainer, kind, microbatch=ROWS) for kind in ("policy", "value")}
        for name, runs in (*whole.items(), ("decoding", decoding(trainer, precision))):
            sys.stdout.write(f"| {precision} {name} | {shares(runs['now'])} |\n")


if __name__ == "__main__":
    main()
