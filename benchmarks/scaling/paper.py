"""A PPO update on 8, 64 and 512 GPUs, on paper: this project's measured costs, stated hardware.

Carried over from measurements: the share of the matrix products' limit that scoring and training
reach (benchmarks/results/versus_trl-S-bf16.json), and what every process computes for the rows of
all processes (measured here, when this runs). Everything else is arithmetic; docs/scaling.md says
what is assumed. No GPU has run any of it.

Run     python -m benchmarks.scaling.paper          prints the tables of docs/scaling.md
"""

import json
import pickle
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

MEASURED = Path(__file__).parents[1] / "results" / "versus_trl-S-bf16.json"
WORLDS = (8, 64, 512)
GPUS_PER_NODE = 8
COMPUTED = {"scoring", "training"}
"""Parts that are matrix products; a bottleneck is one of the others."""


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """One node's GPUs and links: an H100 SXM's data sheet, NVLink 4, InfiniBand NDR."""

    flops: float = 989e12
    """bf16 matrix products a second, dense."""
    memory_bytes: float = 3.35e12
    """Bytes a second from a GPU's own memory."""
    memory_share: float = 0.7
    """Share of that rate which decoding reaches; assumed."""
    nvlink: float = 450e9
    """Bytes a second of one GPU to the others of its node, each way."""
    infiniband: float = 50e9
    """Bytes a second of one GPU's own card, each way (400 Gbit)."""
    link_share: float = 0.8
    """Share of a link's rate which a collective reaches; assumed."""
    hop: float = 10e-6
    """Seconds that a message takes from node to node at least; assumed."""
    launch: float = 6e-6
    """Seconds of the host to launch one kernel; assumed."""
    disk: float = 2e9
    """Bytes a second to shared storage, all processes together; assumed."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """A model of 8 billion weights, all four roles whole, divided with FSDP2.

    A moved weight takes 16 bytes (itself in float32, gradient, two moments), a frozen one 4; passes
    and the copy that replies read them in 2.
    """

    weights: float = 8.0e9
    layers: int = 32
    cache_bytes: int = 2 * 32 * 8 * 128 * 2
    """Of keys and values for one token in bf16: layers, heads, width."""
    kernels_per_layer: int = 15
    prompt_tokens: int = 512
    response_tokens: int = 256
    """On average; the longest takes `budget` steps."""
    budget: int = 512
    epochs: int = 2
    minibatches: int = 4
    microbatch_rows: int = 8
    save_every: int = 10


def shares() -> dict[str, float]:
    """Returns the share of the limit that each phase reached here, median of the runs."""
    run = json.loads(MEASURED.read_text(encoding="utf-8"))
    return {
        phase: median(
            work / seconds[phase] / run["limit_flops"]
            for work, seconds in zip(run["work"][phase], run["ours"], strict=True)
        )
        for phase in ("scoring", "training")
    }


def host_seconds_per_token(*, rows: int = 512, length: int = 256, processes: int = 8) -> float:
    """Returns what each process spends on one response token of any process.

    It unpickles the rows of all, puts them in order, assembles them, whitens and estimates.
    """
    import torch

    from pipeline.ppo.advantages import gae, whiten
    from pipeline.ppo.experience import assemble
    from pipeline.ppo.order import interleave

    torch.set_num_threads(1)
    names = ("logprobs", "ref_logprobs", "values", "entropy")
    share = rows // processes
    drawn = [[7] * length for _ in range(share)]
    figures = {name: [torch.rand(length) for _ in range(share)] for name in names}
    sent = [pickle.dumps((drawn, figures)) for _ in range(processes)]
    times = []
    for _ in range(5):
        start = time.process_time()
        parts = [pickle.loads(one) for one in sent]  # noqa: S301 - our own, a line above
        responses = interleave([part[0] for part in parts])
        measured = {name: interleave([part[1][name] for part in parts]) for name in names}
        made = assemble(responses, responses, measured, scores=torch.rand(rows), parts={}, eos_id=1)
        advantages, _ = gae(made.ref_logprobs, made.values, made.mask, gamma=1.0, lam=0.95)
        whiten(advantages, made.mask)
        times.append(time.process_time() - start)
    return median(times) / (rows * length)


def gathered(size: float, world: int, hardware: Hardware, *, messages: int) -> float:
    """Returns seconds to gather or to scatter so many bytes over all GPUs, in so many messages.

    Inside a node each GPU receives all the others' parts; between nodes a node's cards share them.
    A ring of nodes passes each message on once a node.
    """
    nodes = world // GPUS_PER_NODE
    inside = size / (hardware.nvlink * hardware.link_share)
    between = size * (nodes - 1) / nodes / (hardware.infiniband * GPUS_PER_NODE)
    return max(inside, between / hardware.link_share) + messages * (nodes - 1) * hardware.hop


def update(
    world: int, rows: int, *, job: Job, hardware: Hardware, share: dict[str, float], host: float
) -> dict[str, float]:
    """Returns the seconds of each part of one update, every GPU with so many rows."""
    length = job.prompt_tokens + job.response_tokens
    tokens, steps = rows * length, job.epochs * job.minibatches
    read = 2 * job.weights + rows * length * job.cache_bytes
    step = max(
        read / (hardware.memory_bytes * hardware.memory_share),
        2 * job.weights * rows / (hardware.flops * share["scoring"]),
    )
    launches = job.layers * job.kernels_per_layer * hardware.launch
    passes = max(1, -(-rows // job.minibatches // job.microbatch_rows)) * steps
    whole = 2 * job.weights
    one_way = gathered(whole, world, hardware, messages=job.layers)
    apart = gathered(2 * whole, world, hardware, messages=job.layers)
    return {
        "decoding": job.budget * step,
        "launches of decoding": job.budget * max(0.0, launches - step),
        "scoring": 3 * 2 * job.weights * tokens / (hardware.flops * share["scoring"]),
        "training": 2
        * 6
        * job.weights
        * tokens
        * job.epochs
        / (hardware.flops * share["training"]),
        # Policy for decoding, three models for scoring; both moved ones forward and back.
        "gathering weights": 4 * one_way + 2 * passes * 2 * one_way,
        "scattering gradients": 2 * passes * apart,
        "rows of all processes": world * rows * job.response_tokens * host,
        "saving": 2 * 12 * job.weights / hardware.disk / job.save_every,
    }


def memory_gb(world: int, rows: int, job: Job) -> float:
    """Returns the GB that one GPU holds at most, activations of a microbatch left out."""
    moved, frozen = 2 * 16 * job.weights / world, 2 * 4 * job.weights / world
    cache = rows * (job.prompt_tokens + job.budget) * job.cache_bytes
    return (moved + frozen + 2 * job.weights + cache) / 1e9


def table(rows_of: dict[int, int], **given: object) -> list[str]:
    """Returns the rows of one table, a column a world, and what comes first in each."""
    found = {world: update(world, rows, **given) for world, rows in rows_of.items()}  # type: ignore[arg-type]
    lines = ["| seconds | " + " | ".join(f"{world} GPUs" for world in found) + " |"]
    lines += ["|---|" + "---:|" * len(found)]
    for part in next(iter(found.values())):
        lines.append(f"| {part} | " + " | ".join(f"{f[part]:.2f}" for f in found.values()) + " |")
    totals = {world: sum(parts.values()) for world, parts in found.items()}
    lines.append("| **update** | " + " | ".join(f"{t:.1f}" for t in totals.values()) + " |")
    speeds = (world * rows / totals[world] for world, rows in rows_of.items())
    lines.append("| responses a second | " + " | ".join(f"{speed:.1f}" for speed in speeds) + " |")
    lines.append("| rows of one GPU | " + " | ".join(map(str, rows_of.values())) + " |")
    job = given["job"]
    assert isinstance(job, Job)
    sizes = (memory_gb(world, rows, job) for world, rows in rows_of.items())
    lines.append("| GB of one GPU | " + " | ".join(f"{size:.0f}" for size in sizes) + " |")
    for place, name in enumerate(("first bottleneck", "second")):
        ranked = [sorted(set(parts) - COMPUTED, key=parts.__getitem__) for parts in found.values()]
        lines.append(f"| {name} | " + " | ".join(names[-1 - place] for names in ranked) + " |")
    return lines


def main() -> None:
    """Prints what was measured and both tables."""
    share, host = shares(), host_seconds_per_token()
    given = {"job": Job(), "hardware": Hardware(), "share": share, "host": host}
    write = sys.stdout.write
    write(f"share of the limit: scoring {share['scoring']:.2f}, training {share['training']:.2f}; ")
    write(f"rows of all processes: {host * 1e9:.0f} ns a response token\n\n")
    write("Weak scaling: 32 rows a GPU\n\n")
    write("\n".join(table(dict.fromkeys(WORLDS, 32), **given)) + "\n\n")
    write("Strong scaling: 2,048 rows in all\n\n")
    write("\n".join(table({world: 2048 // world for world in WORLDS}, **given)) + "\n")


if __name__ == "__main__":
    main()
