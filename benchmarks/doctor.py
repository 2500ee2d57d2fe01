"""What `make doctor` predicts of a stage's memory and time, beside what its process took.

Each case is a real stage on the smoke recipe's rows with a model of up to 57M weights, in a process
of its own; measured is the peak of its resident memory, which its manifest holds, and the median
second of a step or an update without the first. The models have few steps to take: memory does not
grow with them.

Run     python -m benchmarks.doctor             every case anew, then the table
        python -m benchmarks.doctor --predict   predictions and the table alone
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

RESULTS = Path("benchmarks/results/doctor.json")
STEPS = [
    *("--training.steps=5", "--training.warmup_steps=0", "--training.log_every=1"),
    *("--training.eval_every=0", "--saving.every=0"),
]
UPDATES = ["--updates=4", "--validate_every=4", "--saving.every=0", "--keep_rollout_every=0"]
PHASES = [f"time/{name}_seconds" for name in ("step", "rollout", "score", "optimise")]
"""What adds up to a step or an update, as timings.jsonl calls it."""
LORA = ["--lora.rank=16"]


def sizes(hidden: int, layers: int) -> list[str]:
    """Returns the words that give a Llama's size."""
    options = {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 64,
        "intermediate_size": 8 * hidden // 3 // 64 * 64,
        "tie_word_embeddings": True,
    }
    return [f"--architecture.options={json.dumps(options)}"]


LARGE, MIDDLE = sizes(768, 8), sizes(384, 6)
ADAMW, BF16 = ["--training.optimizer=adamw"], ["--training.precision=bf16"]


@dataclass(frozen=True)
class Case:
    """A stage of the smoke recipe with other words; its parents are made by other cases."""

    name: str
    stage: str
    words: list[str]
    parents: dict[str, str] = field(default_factory=dict)


PRETRAINED = {"pretrain": "pretrain, 57M"}
TUNED = PRETRAINED | {"sft": "sft"}
REWARDED = TUNED | {"reward": "reward"}
ADAPTED = TUNED | {"reward": "reward, lora"}
CASES = [
    Case("pretrain, 57M", "pretrain", [*STEPS, *LARGE, *ADAMW]),
    Case("sft", "sft", [*STEPS, *ADAMW], PRETRAINED),
    Case("reward", "reward", STEPS, TUNED),
    Case("ppo, separate", "ppo", UPDATES, REWARDED),
    Case("ppo, trunk", "ppo", [*UPDATES, "--roles=trunk"], REWARDED),
    Case("reward, lora", "reward", [*STEPS, *LORA], TUNED),
    Case("ppo, lora", "ppo", [*UPDATES, "--roles=lora", *LORA], ADAPTED),
    Case("sft, lora", "sft", [*STEPS, *LORA], PRETRAINED),
    Case("pretrain, 57M, bf16, muon", "pretrain", [*STEPS, *LARGE, *BF16]),
    Case("ppo, separate, bf16", "ppo", [*UPDATES, "--precision=bf16"], REWARDED),
    Case(
        "pretrain, 11M, rows of 512",
        "pretrain",
        [*STEPS, *MIDDLE, "--sequence_length=512", "--context_length=512"],
    ),
    Case(
        "pretrain, 11M, rows of 512, activations computed again",
        "pretrain",
        [
            *STEPS,
            *MIDDLE,
            "--sequence_length=512",
            "--context_length=512",
            "--activation_checkpointing=true",
        ],
    ),
    Case("ppo, separate, two workers", "ppo", [*UPDATES, "--threads=2"], REWARDED),
]


def measure(case: Case, root: Path) -> dict[str, float]:
    """Returns the peak of the stage's process in MB, and the seconds of a step or an update."""
    run = root / case.name
    shutil.rmtree(run, ignore_errors=True)
    for parent, maker in case.parents.items():
        shutil.copytree(root / maker / parent, run / parent, copy_function=os.link)
    for stage in ("data", "tokenizer"):
        if not (root / stage / "manifest.json").is_file():
            start(stage, [], run=root)
        shutil.copytree(root / stage, run / stage, copy_function=os.link)
    start(case.stage, case.words, run=run)
    manifest = json.loads((run / case.stage / "manifest.json").read_text())
    megabytes = manifest["circumstances"]["peak_memory_gib"] * 2**30 / 1e6
    return {"measured": megabytes, "seconds": median(step_seconds(run / case.stage)[1:])}


def step_seconds(folder: Path) -> list[float]:
    """Returns the seconds of each step or update that a stage's timings tell of."""
    rows = map(json.loads, (folder / "timings.jsonl").read_text().splitlines())
    return [sum(spent) for row in rows if (spent := [row[name] for name in PHASES if name in row])]


def start(stage: str, words: list[str], *, run: Path) -> None:
    """Runs a stage of the smoke recipe."""
    command = [sys.executable, "-m", f"stages.{stage}", "--recipe=smoke", f"--run={run}", *words]
    subprocess.run(command, check=True)


def words_of(case: Case) -> list[str]:
    """Returns the words of a case and of those that make its parents, as the doctor takes them."""
    before = [one for one in CASES if one.name in case.parents.values()]
    return [
        f"--{one.stage}.{word.removeprefix('--')}" for one in (*before, case) for word in one.words
    ]


def predict(case: Case, root: Path) -> dict[str, float]:
    """Returns what the doctor says that the stage's process takes, in MB, and seconds."""
    from pipeline.doctor.lengths import lengths_of
    from pipeline.doctor.machine import this_machine
    from pipeline.doctor.needs import Planner
    from stages.doctor import Config, recipe_of

    config = Config(recipe="smoke", run=str(root), words=tuple(words_of(case)))
    recipe, machine = recipe_of(config), this_machine(1)
    blueprint = recipe.blueprint(packs=True)
    planner = Planner(
        blueprint=blueprint,
        machine=machine,
        ranking=recipe.ranking,
        lengths=lengths_of(recipe),
    )
    need = planner.need(case.stage, recipe.configs)
    sys.stderr.write(f"{case.name}: {need.peak}, base {need.base / 1e6:.0f} MB\n")
    return {"predicted": need.total / 1e6, "predicted_seconds": need.seconds}


def table(results: dict[str, dict[str, float]]) -> str:
    """Returns the table of docs/doctor.md, and the median errors."""
    lines = [
        "| stage | measured, MB | predicted, MB | error | measured, s | predicted, s | error |",
        "|---|---|---|---|---|---|---|",
    ]
    errors: dict[str, list[float]] = {"memory": [], "time": []}
    for name, found in results.items():
        memory = found["predicted"] / found["measured"] - 1
        time = found["predicted_seconds"] / found["seconds"] - 1
        errors["memory"].append(abs(memory))
        errors["time"].append(abs(time))
        cells = f"{found['measured']:,.0f} | {found['predicted']:,.0f} | {memory:+.1%}"
        times = f"{found['seconds']:.2f} | {found['predicted_seconds']:.2f} | {time:+.0%}"
        lines.append(f"| {name} | {cells} | {times} |")
    for name, all_of in errors.items():
        lines += ["", f"{name}: median error {median(all_of):.1%}, largest {max(all_of):.1%}"]
    return "\n".join(lines)


def main() -> None:
    """Measures and predicts every case, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--predict", action="store_true", help="keep what was measured before")
    parser.add_argument("--root", default="runs/doctor", help="folder of the runs")
    options = parser.parse_args()
    root = Path(options.root)
    results: dict[str, Any] = json.loads(RESULTS.read_text()) if options.predict else {}
    for case in CASES:
        if not options.predict:
            results[case.name] = measure(case, root)
        results[case.name] |= predict(case, root)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    sys.stdout.write(table(results) + "\n")


if __name__ == "__main__":
    main()
