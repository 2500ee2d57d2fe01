"""Compares our PPO with TRL 1.12's, in turn, on the same models, prompts and rollouts.

Each side is one process that rests while the other works. Every pair is one update of each; ratios
are of the two halves of a pair. Both run on the same number of threads, and in one precision unless
TRL's is named; bf16 is its own flag there. Roles that share weights are another algorithm: their
rows say so, and TRL's side stays as it is.

Run     make bench                          the table of docs/performance.md, both precisions
        make bench ARGS="--workloads S --pairs 3 --precision bf16 --peer_precision fp32"
        make bench ARGS="--workloads S --precision fp32 --roles lora"
"""

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.processes import output_of
from benchmarks.shared_roles import MODES, write_adapted_reward
from benchmarks.versus_trl.table import HEADING, PHASES, lines
from benchmarks.versus_trl.workload import WORKLOADS, Workload, needed_work, write

AGREEMENT = 1e-5
RESULTS = Path(__file__).parents[1] / "results"


class Side:
    """A process that makes one update for each line it is sent."""

    def __init__(self, *command: str) -> None:
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            text=True,
        )  # fmt: skip

    def update(self) -> dict[str, Any]:
        """Returns the figures of one update."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            sys.exit(f"bench: {' '.join(map(str, self.process.args))} ended; run it by hand")
        figures: dict[str, Any] = json.loads(answer)
        return figures

    def end(self) -> None:
        """Lets it go."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def matrix_limit(threads: int, *, precision: str) -> float:
    """Returns what products of 1,024 x 1,024 matrices reach, FLOP/s, median of 20."""
    import torch

    torch.set_num_threads(threads)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    left, right = torch.randn(2, 1024, 1024).to(dtype)
    seconds = []
    for _ in range(20):
        start = time.perf_counter()
        torch.mm(left, right)
        seconds.append(time.perf_counter() - start)
    return 2 * 1024**3 / median(seconds)


def check_agreement(folder: Path, *, peer: Path, threads: int) -> dict[str, float]:
    """Returns the differences of both sides' gradients; ends the run when they are too large."""
    gradients = folder / "gradients.pt"
    quiet = subprocess.DEVNULL
    words = [peer, "-m", "benchmarks.versus_trl.peer", folder, str(threads), "fp32", gradients]
    subprocess.run(words, check=True, stderr=quiet)
    found: dict[str, float] = json.loads(
        output_of("benchmarks.versus_trl.agreement", folder, gradients)
    )
    worst = max(found[name] for name in ("loss", "policy_gradient", "value_gradient"))
    if worst > AGREEMENT:
        sys.exit(f"bench: the two sides do not compute the same: {found}")
    return found


def compare(
    workload: Workload,
    folder: Path,
    *,
    peer: Path,
    pairs: int,
    threads: int,
    precision: str,
    peer_precision: str,
    roles: str,
) -> Any:
    """Returns the figures of all updates by side, the first of each left out."""
    write(workload, folder, rollouts=pairs + 1)
    if roles == "lora":
        write_adapted_reward(folder / "reward", base=folder / "policy")
    named = [workload.name, *[roles] * (roles != "separate"), *["bf16"] * (precision == "bf16")]
    named += [f"TRL {peer_precision}"] * (peer_precision != precision)
    result: dict[str, Any] = {"workload": ", ".join(named)}
    if not workload.ends and precision == "fp32" and roles == "separate":
        result["agreement"] = check_agreement(folder, peer=peer, threads=threads)
    common, module = (str(folder), str(threads)), "benchmarks.versus_trl"
    sides = {
        "trl": Side(str(peer), "-m", f"{module}.peer", *common, peer_precision),
        "ours": Side(sys.executable, "-m", f"{module}.ours", *common, precision, roles),
    }
    figures: dict[str, list[dict[str, Any]]] = {"trl": [], "ours": []}
    for number in range(pairs + 1):
        for name, side in sides.items():
            figures[name].append(side.update())
        sys.stderr.write(
            f"{workload.name} {number}/{pairs}: "
            f"{figures['trl'][-1]['total']:.1f} s, {figures['ours'][-1]['total']:.1f} s\n"
        )
    for side in sides.values():
        side.end()
    content = json.loads((folder / "workload.json").read_text())
    prompts = [len(prompt) for prompt in content["prompts"]]
    rollouts = [[len(row) for row in rows] for rows in content["rollouts"][1:]]
    work = [needed_work(workload, prompts, responses) for responses in rollouts]
    result |= {name: rows[1:] for name, rows in figures.items()}
    result["work"] = {phase: [each[phase] for each in work] for phase in PHASES}
    result["tokens"] = [sum(responses) for responses in rollouts]
    return result


def machine() -> str:
    """Returns the processor's name, where the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.is_file() else ""
    names = [line.partition(":")[2].strip() for line in text.splitlines() if "model name" in line]
    return names[0] if names else platform.machine()


def main() -> None:
    """Prints the table and writes everything measured to benchmarks/results/."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--peer", type=Path, required=True, help="its environment's interpreter")
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    precisions = ("fp32", "bf16")
    parser.add_argument("--precision", nargs="+", choices=precisions, default=precisions)
    parser.add_argument("--peer_precision", choices=precisions, help="TRL's; ours where not said")
    parser.add_argument("--roles", choices=MODES, default="separate", help="ppo's 'roles', ours")
    options = parser.parse_args()
    if not options.peer.is_file():
        sys.exit(f"bench: --peer={options.peer} names no interpreter; 'make bench' builds TRL's")
    if min(options.pairs, options.threads) < 1:
        sys.exit("bench: --pairs and --threads must be at least 1")
    for precision in options.precision:
        sys.stdout.write(measured(options, precision=precision) + "\n")


def measured(options: argparse.Namespace, *, precision: str) -> str:
    """Returns the table of all workloads in one precision; everything measured is written too."""
    limit = matrix_limit(options.threads, precision=precision)
    peer_precision = options.peer_precision or precision
    table, agreement = [*HEADING], []
    for name in options.workloads:
        with tempfile.TemporaryDirectory() as folder:
            result = compare(
                WORKLOADS[name], Path(folder), peer=options.peer, pairs=options.pairs,
                threads=options.threads, precision=precision, peer_precision=peer_precision,
                roles=options.roles,
            )  # fmt: skip
        table += lines(result, limit=limit)
        agreement += [f"{name}: {result['agreement']}"] if "agreement" in result else []
        settings = {"threads": options.threads, "precision": precision, "peer": peer_precision}
        content = {"machine": machine(), **settings, "limit_flops": limit, **result}
        RESULTS.mkdir(exist_ok=True)
        unusual = {options.roles, precision} - {"separate", "fp32"}
        unusual |= {f"trl_{peer_precision}"} if peer_precision != precision else set()
        path = RESULTS / f"{'-'.join(['versus_trl', name, *sorted(unusual)])}.json"
        path.write_text(json.dumps(content, indent=1) + "\n")
    limits = f"{precision}, {options.threads} threads, {limit / 1e9:.0f} GFLOP/s in matrix products"
    return "\n".join([limits, *agreement, "", *table])


if __name__ == "__main__":
    main()
