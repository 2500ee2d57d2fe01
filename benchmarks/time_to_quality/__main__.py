"""Times how soon PPO reaches a quality from one SFT and one reward model: ours beside TRL 1.12's.

Three sides in turn, for each seed: ours at the recipe's settings; TRL's at the same ones, as far
as it has them; TRL's at the defaults of its PPOConfig. The clock runs from the first update on and
stands still while a policy is saved. Afterwards each policy replies to validation prompts; the time
to quality is that of the first one whose gold win rate over SFT and whose distinct-2 suffice.

Run     make bench-quality                  after `make`
        make bench-quality ARGS="--limit 140 --interval 8 --prompts 250"     25 minutes
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from tqdm import tqdm

from benchmarks.time_to_quality.judge import Judge
from pipeline.config import load
from pipeline.distributed import num_threads
from pipeline.models import load_tokenizer
from pipeline.ppo.inputs import read_prompts
from pipeline.ppo.optimiser import ADAM_EPSILON
from stages.ppo import Config

RESULT = Path(__file__).parents[1] / "results" / "time_to_quality.json"
WIN_RATE, DISTINCT_2 = 0.75, 0.85
"""The quality: gold win rate over SFT, and distinct-2 as a share of SFT's."""
SIDES = ("ours", "trl", "trl_defaults")


def same_settings(config: Config) -> dict[str, Any]:
    """Returns the recipe's settings as TRL's PPOConfig has them.

    It has no adaptive KL coefficient, no length compensation, no entropy bonus, no learning rate
    for the critic and no clipping of gradients. Its penalty is taken off the score of a response
    without EOS, where ours is that score; both average 0.
    """
    step, missing = config.optimisation, config.reward.missing_eos_score
    return {
        "total_episodes": config.updates * config.prompts_per_update,
        "per_device_train_batch_size": config.prompts_per_update,
        "num_mini_batches": config.prompts_per_update // config.minibatch_size,
        "gradient_accumulation_steps": 1,
        "num_ppo_epochs": step.epochs,
        "learning_rate": step.learning_rate,
        "adam_epsilon": ADAM_EPSILON,
        "cliprange": step.clip,
        "cliprange_value": step.value_clip,
        "vf_coef": step.value_coef,
        "gamma": config.reward.gamma,
        "lam": config.reward.lam,
        "kl_coef": config.kl.coef,
        "missing_eos_penalty": None if missing is None else -missing,
        "response_length": config.max_response_tokens,
        "temperature": config.temperature,
        "gradient_checkpointing": False,
        "bf16": False,
    }


def jobs(options: argparse.Namespace, *, folder: Path) -> list[dict[str, Any]]:
    """Returns what is to be trained, in order: a side and a seed each."""
    words = [f"--recipe={options.recipe}", f"--run={options.run}"]
    config = load(Config, words, stage="ppo")
    prompts = read_prompts(
        options.run / "data", split="train", tokenizer=load_tokenizer(options.run / "sft"),
        max_tokens=config.max_prompt_tokens,
    ).tokens  # fmt: skip
    common = {
        "interval": options.interval,
        "limit": options.limit,
        "words": words,
        "sft": str(options.run / "sft"),
        "reward": str(options.run / "reward"),
        "prompts": prompts,
        "threads": num_threads(config),
    }
    settings = {"ours": {}, "trl": same_settings(config), "trl_defaults": {}}
    return [
        {
            **common,
            "side": side,
            "seed": seed,
            "settings": settings[side],
            "folder": str(folder / f"{side}-{seed}"),
        }
        for seed in options.seeds
        for side in options.sides
    ]


def train(job: dict[str, Any], *, peer: Path) -> None:
    """Runs a job in a process of its own; its policies are in its folder afterwards."""
    path = Path(f"{job['folder']}.json")
    path.write_text(json.dumps(job))
    ours = job["side"] == "ours"
    python, module = (sys.executable, "ours") if ours else (str(peer), "peer")
    command = [python, "-m", f"benchmarks.time_to_quality.{module}", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"bench-quality: {' '.join(command)} failed:\n{done.stderr[-2000:]}")


def reached(curve: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Returns the first policy of a curve that is good enough; None where none is."""
    good = (
        look
        for look in curve
        if look["gold_win_rate"] >= WIN_RATE and look["distinct_2"] >= DISTINCT_2
    )
    return next(good, None)


def row(result: dict[str, Any]) -> str:
    """Returns a line of the table."""
    curve = result["curve"]
    first, last = reached(curve), curve[-1]
    best = max(curve, key=lambda look: look["gold_win_rate"])
    when = f"{first['seconds']:.0f}" if first else f"not in {last['seconds']:.0f}"
    cells = [
        result["side"].replace("_", ", "), result["seed"], when,
        first["updates"] if first else f"of {last['updates']} none",
        f"{best['gold_win_rate']:.3f}", f"{best['distinct_2']:.2f}", f"{best['seconds']:.0f}",
    ]  # fmt: skip
    return f"| {' | '.join(map(str, cells))} |"


def ratios(results: list[dict[str, Any]]) -> list[str]:
    """Returns what each of TRL's rows takes of ours, seed by seed; at least, where it ended."""
    lines = []
    times: dict[str, dict[int, tuple[float, bool]]] = {side: {} for side in SIDES}
    for result in results:
        first, last = reached(result["curve"]), result["curve"][-1]
        times[result["side"]][result["seed"]] = ((first or last)["seconds"], first is not None)
    for side in SIDES[1:]:
        ours = times["ours"].items()
        seeds = [seed for seed, (_, whole) in ours if whole and seed in times[side]]
        if not seeds:
            continue
        quotients = [times[side][seed][0] / times["ours"][seed][0] for seed in seeds]
        least = "" if all(times[side][seed][1] for seed in seeds) else "at least "
        spread = f"({min(quotients):.1f} to {max(quotients):.1f})"
        lines.append(f"{side} / ours: {least}{median(quotients):.1f} {spread}, {len(seeds)} seeds")
    return lines


def main() -> None:
    """Trains, judges, prints the table and writes the curves to benchmarks/results/."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--peer", type=Path, required=True, help="its environment's interpreter")
    parser.add_argument("--recipe", default="cpu")
    parser.add_argument("--run", type=Path, default=Path("runs/cpu"))
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--prompts", type=int, default=300, help="validation prompts")
    parser.add_argument("--interval", type=float, default=5.0, help="seconds between policies")
    parser.add_argument("--limit", type=float, default=360.0, help="seconds of a side's training")
    options = parser.parse_args()
    if not options.peer.is_file():
        sys.exit(f"bench-quality: --peer={options.peer} names no interpreter")
    results = []
    with tempfile.TemporaryDirectory() as folder:
        todo = jobs(options, folder=Path(folder))
        for job in tqdm(todo, desc="train"):
            train(job, peer=options.peer)
        config = load(Config, todo[0]["words"], stage="ppo")
        judge = Judge(
            options.run,
            num_prompts=options.prompts,
            max_tokens=(config.max_prompt_tokens, config.max_response_tokens),
        )
        for job in tqdm(todo, desc="judge"):
            curve = judge.curve(Path(job["folder"]))
            results.append({"side": job["side"], "seed": job["seed"], "curve": curve})
    RESULT.write_text(json.dumps(results, indent=1) + "\n")
    heading = [
        "| side | seed | seconds to quality | updates | best win rate | its distinct-2 | at, s |",
        "|---|---|---|---|---|---|---|",
    ]
    sys.stdout.write("\n".join([*heading, *map(row, results), "", *ratios(results)]) + "\n")


if __name__ == "__main__":
    main()
