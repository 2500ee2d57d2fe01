"""The reward stage's real run on the smoke recipe, resuming, and what it refuses."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import stages.data
import stages.pretrain
import stages.sft
import stages.tokenizer
from pipeline import checkpoint
from pipeline.config import load
from pipeline.errors import UserError
from pipeline.lora import LoRA
from pipeline.reward.settings import Normalisation
from pipeline.saving import Saving
from stages import reward
from tests.data.own import write_rows
from tests.support import SMOKE, assert_close


@pytest.fixture(scope="module")
def parents(tmp_path_factory):
    """A run folder with the smoke recipe up to sft, trained for two steps."""
    folder = tmp_path_factory.mktemp("run")
    for stage in ("data", "tokenizer", "pretrain", "sft"):
        module = getattr(stages, stage)
        config = load(module.Config, [*SMOKE, f"--run={folder}"], stage=stage)
        if hasattr(config, "training"):
            few = {"steps": 2, "warmup_steps": 0, "log_every": 1, "eval_every": 0}
            config = replace(config, training=replace(config.training, **few))
        module.run(config)
    return folder


@pytest.fixture
def run_dir(parents, tmp_path):
    """A run folder of a test's own with the same parents."""
    for stage in ("data", "sft"):
        shutil.copytree(parents / stage, tmp_path / stage)
    return tmp_path


def config_of(folder: Path, *, training: dict | None = None, **changes) -> reward.Config:
    config = load(reward.Config, [*SMOKE, f"--run={folder}"], stage="reward")
    few = {"steps": 4, "log_every": 2, "eval_every": 2}
    changes.setdefault("saving", Saving(every=3))
    changes["training"] = replace(config.training, **(few | (training or {})))
    return replace(config, **changes)


def test_the_folder_is_a_plain_classifier_with_constants_and_a_report(run_dir):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from pipeline.models import load_reward_model, score_responses

    config = config_of(run_dir)
    reward.run(config)
    folder = run_dir / "reward"
    artifact = checkpoint.open_artifact(folder, kind="reward")
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert model.config.num_labels == 1
    assert model.config.pad_token_id == tokenizer.pad_token_id != tokenizer.eos_token_id
    assert artifact.summary["reward_std"] == model.config.reward_std > 0
    assert 0 <= artifact.summary["padding_frac"] < 0.05

    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    scores = np.array([sample["score"] for sample in samples])
    assert len(scores) == config.normalisation.num_samples
    assert (scores.mean(), scores.std()) == pytest.approx((0.0, 1.0), abs=1e-5)

    report = json.loads((folder / "report.json").read_text())
    assert report["split"] == "validation"
    assert artifact.summary["accuracy"] == report["mean_accuracy"]
    assert set(report["sets"]) == {"tweets", "movieReviewSnippets"}
    for one in report["sets"].values():
        assert one["accuracy"]["low"] <= one["accuracy"]["value"] <= one["accuracy"]["high"]
        assert one["bag_of_words"]["value"] > 0.6
        assert one["one_human_rater"] > 0.6
    assert "| tweets |" in (folder / "README.md").read_text()

    prompt = [tokenizer.convert_tokens_to_ids("<|user|>"), tokenizer.eos_token_id]
    scored = score_responses(
        load_reward_model(folder), [prompt], [[9, tokenizer.eos_token_id]], pad_id=0
    )
    assert np.isfinite(float(scored))


@pytest.mark.parametrize("lora", [LoRA(), LoRA(rank=4)], ids=["all weights", "lora"])
def test_an_interrupted_run_ends_in_the_same_bytes(run_dir, monkeypatch, lora):
    config = config_of(run_dir, lora=lora)
    reward.run(config)
    straight = (run_dir / "reward" / "model.safetensors").read_bytes()
    logged = (run_dir / "reward" / "metrics.jsonl").read_text()
    shutil.rmtree(run_dir / "reward")
    publish = checkpoint.StageRun.save_point

    def killed_after_three_steps(self, step, write):
        publish(self, step, write)
        if step == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint.StageRun, "save_point", killed_after_three_steps)
    with pytest.raises(KeyboardInterrupt):
        reward.run(config)
    monkeypatch.undo()
    reward.run(config)
    assert (run_dir / "reward" / "model.safetensors").read_bytes() == straight
    assert (run_dir / "reward" / "metrics.jsonl").read_text() == logged


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
def test_an_adapter_with_its_head_is_written_beside_the_merged_model(run_dir):
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    from pipeline.reward.training import reward_model_from

    reward.run(config_of(run_dir, lora=LoRA(rank=4, alpha=8)))
    ids = torch.tensor([[5, 6, 7, 8]])
    base = reward_model_from(run_dir / "sft", pad_id=0, seed=99)
    merged = AutoModelForSequenceClassification.from_pretrained(run_dir / "reward")
    drawn = reward_model_from(run_dir / "sft", pad_id=0, seed=1)
    with torch.no_grad():
        after = merged(ids).logits
        adapted = PeftModel.from_pretrained(base, run_dir / "reward" / "adapter")(ids).logits
    assert_close(adapted, after, tolerance=1e-4)
    assert not torch.equal(merged.score.weight, drawn.score.weight)  # the head learned too
    assert not torch.equal(*(next(m.model.layers.parameters()) for m in (merged, drawn)))
    assert merged.config.reward_std > 0


def test_pairs_train_too(run_dir):
    from pipeline.models import load_tokenizer
    from pipeline.reward import making
    from pipeline.reward.reading import TokenReading

    rows = [
        {"prompt": "hi", "chosen": f"nice to see you {number}", "rejected": f"go away {number}"}
        for number in range(4)
    ]
    for split in ("train", "validation"):
        write_rows(run_dir / "data", "preferences", split=split, rows=rows)
    config = config_of(run_dir, max_length=40)
    data, reading = run_dir / "data", TokenReading(load_tokenizer(run_dir / "sft"))
    encoded = making.read_split(config, "train", data=data, reading=reading)
    features = making.training_rows(config, encoded)
    assert [len(row["better"]) for row in features] == [1, 1, 1, 1]
    model = making.build_model(config, run_dir / "sft", reading=reading)
    metrics = making.validation_metrics(model, encoded, reading=reading, min_gap=config.report_gap)
    assert 0 <= metrics["validation/accuracy_pairs"] <= 1


def test_settings_that_fit_no_text_are_refused(run_dir, monkeypatch):
    with pytest.raises(UserError, match="max_length: no ranking of train has two texts of 3"):
        reward.run(config_of(run_dir, max_length=3))
    with monkeypatch.context() as patch:  # before the SFT model replies
        patch.setattr("pipeline.reward.making.sample_replies", None)
        with pytest.raises(UserError, match="max_length: 512 is longer than the model's context"):
            reward.run(config_of(run_dir, max_length=512))
    with pytest.raises(UserError, match="min_gap: no two texts of a training ranking differ"):
        reward.run(config_of(run_dir, min_gap=20.0))
    assert not (run_dir / "reward").exists()


def test_a_diverging_run_stops_before_the_weights_move(run_dir):
    fast = {"learning_rate": 1.0e30, "steps": 20, "warmup_steps": 0}
    with pytest.raises(UserError, match="not finite at step"):
        reward.run(config_of(run_dir, training=fast))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"row_type": "text"}, "row_type: must be preferences or guard_preferences, got 'text'"),
        ({"labels": "soft"}, "labels: must be hard or raters, got 'soft'"),
        ({"max_length": 0}, "max_length: must be at least 1, got 0"),
        ({"token_dropout": 1.0}, r"token_dropout: must be in \[0, 1\), got 1.0"),
        ({"lowercase_frac": 1.5}, r"lowercase_frac: must be in \[0, 1\], got 1.5"),
        ({"min_gap": -1.0}, "min_gap: must be at least 0, got -1.0"),
    ],
)
def test_settings_out_of_range_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        reward.Config(**changes)


def test_normalisation_needs_samples():
    with pytest.raises(UserError, match=r"normalisation\.num_samples: must be at least 2, got 1"):
        Normalisation(num_samples=1)
    with pytest.raises(UserError, match=r"normalisation\.batch_size: must be at least 1, got 0"):
        Normalisation(batch_size=0)
