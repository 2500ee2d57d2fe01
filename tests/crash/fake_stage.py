"""A stage of a few milliseconds a step that keeps the folder's contract, or breaks it on purpose.

A random walk: its weight and its generator are its state. The file `flaw` beside the Makefile says
what it does wrong.
"""

import json
import os
import random
import shutil
import sys
import time
from pathlib import Path

STEPS, SAVE_EVERY, KEEP = 12, 3, 2
STAGE = Path(sys.argv[0]).stem
RUN = next(word.removeprefix("--run=") for word in sys.argv if word.startswith("--run="))
FOLDER = Path(RUN, STAGE)
FLAW = Path("flaw").read_text() if Path("flaw").exists() else ""


def points() -> list[Path]:
    found = FOLDER.glob("checkpoints/step-*/point.json")
    return sorted((path.parent for path in found), key=lambda path: int(path.name[5:]))


def write(path: Path, value: object) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(value))
    temporary.replace(path)


def save(step: int, weight: float, generator: random.Random) -> None:
    temporary = FOLDER / "checkpoints" / f".step-{step}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    write(temporary / "state.json", {"generator": generator.getstate(), "weight": weight})
    size = (FOLDER / "metrics.jsonl").stat().st_size
    write(temporary / "point.json", {"step": step, "logs": {"metrics.jsonl": size}})
    temporary.replace(FOLDER / "checkpoints" / f"step-{step}")
    tidy()


def tidy() -> None:
    kept = points()[-KEEP:]
    for path in FOLDER.glob("checkpoints/*"):
        if path not in kept:
            shutil.rmtree(path)


def begin(generator: random.Random) -> tuple[int, float]:
    lying = [] if FLAW == "ignores points" else points()
    if not lying:
        if FOLDER.exists():
            shutil.rmtree(FOLDER)
        FOLDER.mkdir(parents=True)
        return 0, 0.0
    if FLAW == "cannot go on":
        sys.exit(FLAW)
    point = json.loads((lying[-1] / "point.json").read_text())
    state = json.loads((lying[-1] / "state.json").read_text())
    if FLAW != "forgets its generator":
        version, internal, gauss = state["generator"]
        generator.setstate((version, tuple(internal), gauss))
    if FLAW != "doubles rows":
        os.truncate(FOLDER / "metrics.jsonl", point["logs"]["metrics.jsonl"])
    if FLAW != "leaves things behind":
        tidy()
    sys.stderr.write(f"{STAGE}: goes on from step {point['step']}\n")
    return point["step"], state["weight"]


def main() -> None:
    generator = random.Random(1)
    done, weight = begin(generator)
    for step in range(done + 1, STEPS + 1):
        time.sleep(0.002)
        weight += generator.random()
        with (FOLDER / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": step, "weight": weight}) + "\n")
        if step % SAVE_EVERY == 0:
            save(step, weight, generator)
    write(FOLDER / "model.json", {"weight": weight})
    content = {"stage": STAGE, "config": {}}
    summary = {"steps": STEPS, "epochs": 2.5}
    write(FOLDER / "manifest.json", {"content": content, "circumstances": {"summary": summary}})


if __name__ == "__main__":
    main()
