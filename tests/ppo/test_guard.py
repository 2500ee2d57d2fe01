"""The guard: when PPO ends early, and a real run that it watches, stops and resumes."""

import shutil

import pytest
import torch

from pipeline.checkpoint import StageRun, begin, open_artifact
from pipeline.config import StageConfig
from pipeline.errors import UserError
from pipeline.ppo import sources
from pipeline.ppo.guard import Watch, over_optimised
from pipeline.ppo.trainer import PPOTrainer
from pipeline.ppo.validation import Validation
from pipeline.reporting.curves import curves
from pipeline.reporting.figures import guard_charts
from pipeline.storage import read_jsonl
from stages import data, ppo, tokenizer
from tests.stages.test_ppo import Killed, make_models, words

RISING = [(0.0, 0.0), (1.0, 1.0), (1.2, 2.0)]


@pytest.mark.parametrize(
    ("looks", "ends"),
    [
        ([], False),
        (RISING[:1], False),
        ([*RISING, (0.9, 3.0)], False),
        ([*RISING, (0.9, 3.0), (0.8, 3.5)], True),
        ([*RISING, (0.9, 3.0), (1.15, 3.5)], False),
        ([*RISING, (0.9, 3.0), (0.8, 1.9)], False),
        ([*RISING, (0.9, 3.0), (1.3, 3.5)], False),
        ([(1.0, 0.0), (0.8, -1.0), (0.6, -2.0)], False),
    ],
)
def test_training_ends_when_the_guard_fell_while_the_score_rose(looks, ends):
    assert over_optimised(looks, patience=2) is ends
    assert after(dict(enumerate(looks)), patience=2).ends is ends


def after(looks, *, patience):
    """A validation after judged looks, by the number of updates done."""
    watch = Watch(scorer=None, patience=patience)
    idle = PPOTrainer.__new__(PPOTrainer)  # nothing is sampled here
    seen = Validation(idle, [[5]], num_prompts=1, tokenizer=None, watch=watch)
    names = ("guard/score", "validation/score")
    seen.looks = {update: dict(zip(names, look, strict=True)) for update, look in looks.items()}
    return seen


def test_more_patience_waits_for_more_looks():
    looks = [*RISING, (0.9, 3.0), (0.8, 3.5)]
    assert not over_optimised(looks, patience=3)
    assert over_optimised([*looks, (0.7, 4.0)], patience=3)


def test_the_first_of_equal_looks_is_the_best():
    seen = after({0: (0.1, 0.0), 10: (0.4, 0.0), 20: (0.4, 1.0), 30: (0.2, 1.0)}, patience=1)
    assert seen.best == 10


def test_looks_that_nobody_judged_are_never_the_best_and_end_nothing():
    seen = after({}, patience=1)
    seen.looks = {update: {"validation/score": 1.0 * update} for update in range(5)}
    assert seen.best is None
    assert not seen.ends


def test_a_resumed_run_recalls_what_was_judged():
    looks = dict(enumerate([*RISING, (0.9, 3.0), (0.8, 3.5)]))
    seen, resumed = after(looks, patience=2), after({}, patience=2)
    rows = [{"step": update, **figures} for update, figures in seen.looks.items()]
    resumed.recall([*rows, {"step": 9, "reward/mean": 1.0}])
    assert resumed.looks == seen.looks
    assert resumed.judged == looks
    assert (resumed.best, resumed.ends) == (2, True)


@pytest.mark.parametrize(("every", "judged"), [(0, []), (1, [0, 2, 4, 6, 7]), (2, [0, 4, 7])])
def test_the_guard_judges_every_nth_look_and_the_last(every, judged):
    config = ppo.Config(updates=7, validate_every=2, guard=ppo.Guard(every=every))
    assert [update for update in range(8) if config.judges(update)] == judged


def test_the_chart_is_drawn_where_a_guard_judged():
    rows = [
        {"step": step, "validation/score": 1.0 * step, "validation/kl": 1.0 * step**2}
        for step in range(4)
    ]
    assert guard_charts(curves(rows)) == []
    rows[1]["guard/score"], rows[3]["guard/score"] = 0.5, 0.2
    (chart,) = guard_charts(curves(rows))
    assert chart.description.endswith("guard, reward model by square root of the KL to SFT, nats")
    (chart,) = guard_charts(curves(rows), reference="what moved")
    assert chart.description.endswith("square root of the KL to what moved, nats")


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    run = tmp_path_factory.mktemp("guard")
    for stage in (data, tokenizer):
        assert stage.main(["--recipe=smoke", f"--run={run}", "--tracking=none"]) == 0
    make_models(run)
    config = StageConfig(recipe="smoke", run=str(run), tracking="none")
    kinds = {"data": "dataset", "sft": "causal-lm"}
    parents = {name: open_artifact(run / name, kind=kind) for name, kind in kinds.items()}
    with begin(config, stage="reward_guard", kind="reward", parents=parents) as stage:
        for path in (run / "reward").iterdir():
            if path.is_file() and path.name != "manifest.json":
                shutil.copy(path, stage.path)
        stage.finish("copied", chosen={}, summary={}, card="# guard")
    return run


@pytest.fixture
def falling(monkeypatch):
    """A guard whose score falls by 0.2 a look after the second, under a score that rises."""
    look, seen = Validation.look, []

    def judge(self, prompts, responses):
        return 1.0 - 0.1 * abs(seen[-1] - 2)

    def rising(self, stage, *, update, judged):
        seen.append(update)
        metrics = look(self, stage, update=update, judged=judged)
        metrics["validation/score"] = float(update)
        return metrics

    monkeypatch.setattr(Watch, "judge", judge)
    monkeypatch.setattr(Validation, "look", rising)


def weights(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def test_ppo_ends_early_keeps_the_best_and_resumes_to_the_same_bytes(
    run_folder, falling, monkeypatch
):
    settings = words(run_folder, "--updates=12", "--guard.every=1", "--guard.patience=2")
    assert ppo.main(settings) == 0
    artifact = open_artifact(run_folder / "ppo", kind="causal-lm")
    rows = read_jsonl(run_folder / "ppo" / "metrics.jsonl")
    assert [row["step"] for row in rows if "guard/score" in row] == [0, 2, 4, 6]
    assert [row["step"] for row in rows if "diagnosis/guard_falling" in row] == [6]
    assert artifact.summary["updates"] == 6
    assert set(artifact.content["parents"]) == {"data", "sft", "reward", "reward_guard"}
    best, last = weights(run_folder / "ppo" / "best"), weights(run_folder / "ppo")
    assert any(not torch.equal(best[name], last[name]) for name in last)

    save_point = StageRun.save_point
    for died_after in (12, 24):  # four optimizer steps an update

        def dying(self, step, write, died_after=died_after):
            save_point(self, step, write)
            if step == died_after:
                raise Killed

        with monkeypatch.context() as patch:
            patch.setattr(StageRun, "save_point", dying)
            with pytest.raises(Killed):
                ppo.main([*settings, "--force=true"])
        assert ppo.main(settings) == 0
        resumed = open_artifact(run_folder / "ppo", kind="causal-lm")
        assert resumed.content["files"] == artifact.content["files"]


def test_a_real_guard_scores_the_validation_replies(run_folder):
    assert ppo.main(words(run_folder, "--force=true", "--updates=2", "--guard.every=1")) == 0
    rows = read_jsonl(run_folder / "ppo" / "metrics.jsonl")
    judged = [row for row in rows if "guard/score" in row]
    assert [row["step"] for row in judged] == [0, 2]
    for row in judged:  # the guard here is a copy of the reward model
        assert row["guard/score"] == pytest.approx(row["validation/score"], abs=1e-5)


def test_a_guard_of_another_vocabulary_is_refused(run_folder, monkeypatch):
    from pipeline import models

    load = models.load_tokenizer

    def other(path):
        loaded = load(path)
        if path.name == "reward_guard":
            loaded.add_tokens(["<|stranger|>"])
        return loaded

    ours = load(run_folder / "sft")
    monkeypatch.setattr(models, "load_tokenizer", other)
    guard = open_artifact(run_folder / "reward_guard", kind="reward")
    with pytest.raises(UserError, match="reward_guard has another tokenizer than .*FORCE=1"):
        sources.reading_of(guard, tokenizer=ours)
