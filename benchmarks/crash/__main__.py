"""Kills stages at instants of a recorded seed, runs them again, and compares byte for byte.

The smoke chain runs once, undisturbed. Then each trial copies what a stage needs, runs the stage by
its `make` line, strikes it once to three times in a row, runs the same line again to the end, and
compares everything with the undisturbed folder. A trial that finds a difference keeps its folder.

Run     make crash-test KILLS=100              the tables of docs/recovery.md
        make crash-test KILLS=20 SEED=2 STAGES="sft ppo"
        make crash-test ARGS="--trial 17"      one trial of the seed, alone
"""

import argparse
import itertools
import json
import platform
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from benchmarks.crash import session
from benchmarks.crash.chain import NAME, Chain, needed, steps_per_pass
from benchmarks.crash.compare import read_rows
from benchmarks.crash.moments import Life, Trial, trials
from benchmarks.crash.table import lines, record
from benchmarks.crash.trial import Outcome, conduct
from pipeline.manifest import STAGES

RESULTS = Path(__file__).parents[1] / "results" / "crash.json"
WORK = Path("runs/crash")


def live(chain: Chain, stages: Sequence[str]) -> dict[str, Life]:
    """Returns the undisturbed lives of the stages, one after another.

    A stage that fails here ends the test: there is nothing to compare with.
    """
    lives = {}
    for stage in stages:
        ended = session.run(chain, stage)
        if ended.code:
            sys.exit(f"crash-test: {stage} failed undisturbed:\n{ended.output}")
        rows = chain.folder(stage) / "metrics.jsonl"
        lives[stage] = Life(
            seconds=ended.seconds,
            changes=ended.changes,
            boundary=steps_per_pass(chain, stage),
            rollout_seconds=_rollout_seconds(chain) if stage == "ppo" else None,
            rows=tuple(row["step"] for row in read_rows(rows)) if rows.is_file() else (),
        )
        _say(f"undisturbed: {stage} {ended.seconds:.1f} s, {len(ended.changes)} changes")
    return lives


def _rollout_seconds(chain: Chain) -> float:
    rows = read_rows(chain.folder("ppo") / "timings.jsonl")
    return min(float(row["time/rollout_seconds"]) for row in rows)


def outcomes(
    plan: Iterator[Trial], straight: Chain, *, kills: int, one: Callable[..., Outcome] = conduct
) -> Iterator[Outcome]:
    """Yields the outcomes of trials until there were so many kills."""
    done = 0
    while done < kills:
        trial = next(plan)
        outcome = one(trial, straight, straight.run.parents[1] / f"trial-{trial.number}")
        done += len(outcome.kills)
        _say(f"{done}/{kills} trial {trial.number} {told(outcome)}")
        yield outcome


def told(outcome: Outcome) -> str:
    """Returns a trial in one line, and what differs below it."""
    strikes = [
        f"{kill.strike.signal} {kill.strike.moment} ({kill.at}) -> {kill.ended_by}"
        for kill in outcome.kills
    ]
    strikes += [f"{outcome.missed}: too late"] if outcome.missed else []
    end = f"{len(outcome.differences)} differences" if outcome.differences else "equal"
    heading = f"{outcome.trial.stage}: {', '.join(strikes)}: {end}"
    return "\n  ".join([f"{heading}, {outcome.seconds:.1f} s", *outcome.differences])


def _say(text: str) -> None:
    sys.stderr.write(f"crash-test: {text}\n")
    sys.stderr.flush()


def parse() -> argparse.Namespace:
    """Returns the command line's options."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--trial", type=int, default=0, help="only this trial of the seed")
    parser.add_argument("--work", type=Path, default=WORK, help="folder of the runs; emptied")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.kills < 1:
        sys.exit("crash-test: --kills must be at least 1")
    return options


def main() -> None:
    """Prints the tables and writes every trial to the results; exit code 1 when any differs."""
    options = parse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # ends its stage too
    shutil.rmtree(options.work, ignore_errors=True)
    straight = Chain(Path.cwd(), options.work / "straight" / NAME)
    straight.run.mkdir(parents=True)
    started = time.monotonic()
    lives = live(straight, needed(options.stages))
    plan = trials(lives, options.stages, seed=options.seed)
    if options.trial:
        plan = itertools.islice(plan, options.trial - 1, options.trial)
        found = [conduct(next(plan), straight, options.work / f"trial-{options.trial}")]
        _say(told(found[0]))
    else:
        found = []
        for outcome in outcomes(plan, straight, kills=options.kills):
            found.append(outcome)
            _write(options, found, minutes=(time.monotonic() - started) / 60)
    sys.stdout.write("\n".join(lines(found)) + "\n")
    sys.exit(any(outcome.differences for outcome in found))


def _write(options: argparse.Namespace, found: Sequence[Outcome], *, minutes: float) -> None:
    content = {
        "seed": options.seed,
        "kills": sum(len(outcome.kills) for outcome in found),
        "stages": options.stages,
        "machine": platform.machine(),
        "minutes": round(minutes, 1),
        "trials": [record(outcome) for outcome in found],
    }
    options.results.parent.mkdir(parents=True, exist_ok=True)
    options.results.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
