"""What a resume point costs: seconds that training waits, and seconds until the point is safe.

A pretend stage trains a Llama of 61M weights with AdamW and saves what ppo saves of a policy:
weights and moments, 0.7 GB.

Run     python -m benchmarks.saving          prints the table of docs/recovery.md
"""

import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.memory import SIZES
from pipeline.points import Points

POINTS = 5


def main() -> None:
    """Times saves, each beside a step of training and with nothing beside it."""
    step, write = stage()
    with tempfile.TemporaryDirectory(dir=".") as folder:
        points = Points("saving", Path(folder), {"key": "", "config": {}, "parents": {}}, keep=2)
        step()
        alone = [timed(step) for _ in range(POINTS)]
        blocked, whole, beside = [], [], []
        for number in range(POINTS):
            start = time.perf_counter()
            points.save(number, write, seconds=0.0)
            blocked.append(time.perf_counter() - start)
            points.wait()
            whole.append(time.perf_counter() - start)
            points.save(POINTS + number, write, seconds=0.0)
            beside.append(timed(step))
            points.wait()
        size = sum(f.stat().st_size for f in points.found()[-1].iterdir())
        points.close()
    rows = {
        f"training waits, a point of {size / 1e9:.2f} GB": blocked,
        "until the point is digested, on disk and renamed": whole,
        "a training step, nothing beside it": alone,
        "a training step beside the publication": beside,
    }
    lines = ["| what | seconds, median | smallest to largest |", "|---|---|---|"]
    for what, seconds in rows.items():
        lines.append(
            f"| {what} | {median(seconds):.2f} | {min(seconds):.2f} to {max(seconds):.2f} |"
        )
    sys.stdout.write("\n".join(lines) + "\n")


def stage() -> tuple[Any, Any]:
    """Returns a training step, and what writes its state into a folder."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    optimizer = torch.optim.AdamW(model.parameters())
    ids = torch.randint(2, SIZES["vocab_size"], (8, 32))

    def step() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def write(folder: Path) -> None:
        weights = {name: p.detach() for name, p in model.named_parameters()}
        save_file(weights, folder / "policy.safetensors")
        torch.save(optimizer.state_dict(), folder / "state.pt")

    return step, write


def timed(action: Any) -> float:
    """Returns the seconds an action takes."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
