"""The ppo stage with rewards of every kind: functions, sums, ensembles, other tokenizers."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from pipeline.checkpoint import open_artifact
from pipeline.evaluation.loading import read_tokenizers, scorer_by
from pipeline.models import load_reward_model, load_tokenizer
from pipeline.storage import read_jsonl, sha256_file
from pipeline.tokenizer import encode_response, train_tokenizer
from stages import data, evaluate, ppo, reward, tokenizer
from tests.reward.encoders import save_encoder
from tests.stages.test_ppo import make_models, words
from tests.support import tiny_reward_model

FUNCTIONS = """
import time

def polite(prompts, responses):
    assert all(prompt[-1]["role"] == "user" for prompt in prompts)
    return [float("you" in response) - 0.01 * len(response) for response in responses]

def hangs(prompts, responses):
    time.sleep(600)

def short(prompts, responses):
    return [0.0]

def later(prompts, responses):
    if len(responses) == 8:
        return [1.0] * 8
    raise ValueError("not on Sundays")
"""


FEW = [
    "--updates=1", "--prompts_per_update=16", "--validation_prompts=8", "--max_response_tokens=6",
    "--optimisation.epochs=1", "--keep_rollout_every=0",
]  # fmt: skip


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("sources")
    for stage in (data, tokenizer):
        assert stage.main(["--recipe=smoke", f"--run={run}", "--tracking=none"]) == 0
    make_models(run)
    return run


@pytest.fixture
def run_dir(run_folder, tmp_path, monkeypatch) -> Path:
    """A run of a test's own, and a module of reward functions beside it."""
    for stage in ("data", "sft", "reward"):
        shutil.copytree(run_folder / stage, tmp_path / "run" / stage)
    (tmp_path / "my_rewards.py").write_text(FUNCTIONS)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path / "run"


def trained(run: Path, sources: list[dict], *more: str) -> tuple[dict, list[dict]]:
    """The manifest's content and the metrics of the updates with these sources."""
    assert ppo.main(words(run, *FEW, f"--reward.sources={json.dumps(sources)}", *more)) == 0
    rows = read_jsonl(run / "ppo" / "metrics.jsonl")
    content = open_artifact(run / "ppo", kind="causal-lm").content
    return content, [row for row in rows if "objective/score" in row]


def test_a_function_alone_needs_no_reward_stage_and_its_file_is_recorded(run_dir):
    shutil.rmtree(run_dir / "reward")
    content, rows = trained(run_dir, [{"function": "my_rewards:polite"}])
    assert set(content["parents"]) == {"data", "sft", "score/polite"}
    assert content["parents"]["score/polite"]["kind"] == "function"
    assert all(row["objective/score"] <= 1.0 for row in rows)
    critic = load_reward_model(run_dir / "ppo" / "value")  # from the SFT model, a head of its own
    assert (critic.config.reward_mean, critic.config.reward_std) == (0.0, 1.0)
    module = run_dir.parent / "my_rewards.py"
    before, digest = content["parents"]["score/polite"]["digest"], sha256_file(module)
    module.write_text(FUNCTIONS.replace("0.01", "0.02"))
    assert sha256_file(module) != digest
    content, _ = trained(run_dir, [{"function": "my_rewards:polite"}])  # another function: rerun
    assert content["parents"]["score/polite"]["digest"] != before


def test_a_weighted_sum_of_the_reward_model_and_a_function(run_dir):
    sources = [
        {"model": "reward"},
        {"function": "my_rewards:polite", "weight": 0.5, "name": "nice"},
    ]
    content, rows = trained(run_dir, sources)
    assert set(content["parents"]) == {"data", "sft", "reward", "score/nice"}
    for row in rows:
        total = row["score/reward"] + 0.5 * row["score/nice"]
        assert row["objective/score"] == pytest.approx(total, abs=1e-5)


def another_model(run: Path, folder: Path) -> Path:
    """A reward model with other weights, from outside the run."""
    shutil.copytree(run / "reward", folder)
    (folder / "manifest.json").unlink()
    model = load_reward_model(folder)
    with torch.no_grad():
        model.score.weight.mul_(-1.0)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("combine", ["mean", "min", "mean_minus_std"])
def test_an_ensemble_of_two_reward_models(run_dir, tmp_path, combine):
    other = another_model(run_dir, tmp_path / "other")
    sources = [{"model": "reward"}, {"model": str(other)}]
    content, rows = trained(run_dir, sources, f"--reward.combine={combine}")
    assert content["parents"]["score/other"]["kind"] == "reward"
    # The two say the opposite of each other: s and -s.
    assert rows[0]["score/other"] == pytest.approx(-rows[0]["score/reward"], abs=1e-4)
    if combine == "mean":
        assert rows[0]["objective/score"] == pytest.approx(0.0, abs=1e-5)
    else:
        assert rows[0]["objective/score"] <= -abs(rows[0]["score/reward"])


def test_a_model_of_another_tokenizer_reads_anew_and_gets_constants(run_dir, tmp_path, caplog):
    theirs = train_tokenizer(["how are you today? fine, thanks"] * 9, vocabulary_size=280)
    folder = tmp_path / "foreign"
    theirs.save_pretrained(folder)
    model = tiny_reward_model(vocabulary=len(theirs))
    model.config.pad_token_id = theirs.pad_token_id
    del model.config.reward_mean, model.config.reward_std
    model.save_pretrained(folder)
    caplog.set_level("INFO")
    content, rows = trained(run_dir, [{"model": str(folder)}])
    assert "score/foreign: read anew by a tokenizer of its own, as a conversation" in caplog.text
    assert set(content["chosen"]["constants"]["foreign"]) == {"mean", "std"}
    # Normalised on the SFT model's replies, so the first rollout's scores are near mean 0.
    assert abs(rows[0]["objective/score"]) < 1.0
    raw, _ = trained(run_dir, [{"model": str(folder)}], "--reward.normalise=false", "--force=true")
    assert "constants" not in raw["chosen"]


def test_an_encoder_is_trained_on_the_rankings_and_rewards_ppo(run_dir, tmp_path):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    encoder = save_encoder(tmp_path / "bert", max_length=128)
    shutil.rmtree(run_dir / "reward")
    settings = ["--training.steps=3", f"--init_from={encoder}", "--max_length=96"]
    assert reward.main(["--recipe=smoke", f"--run={run_dir}", "--tracking=none", *settings]) == 0
    model = AutoModelForSequenceClassification.from_pretrained(run_dir / "reward")
    assert model.config.model_type == "bert"
    assert model.config.reward_std > 0
    assert AutoTokenizer.from_pretrained(run_dir / "reward").cls_token == "[CLS]"
    content, rows = trained(run_dir, [])  # the stage reward, as without any source
    assert set(content["parents"]) == {"data", "sft", "reward"}
    assert not any("score/" in name for row in rows for name in row if "/score" not in name)
    critic = load_reward_model(run_dir / "ppo" / "value")
    ours = load_tokenizer(run_dir / "sft")
    assert critic.config.vocab_size == len(ours)

    kinds = {"data": "dataset", "sft": "causal-lm", "reward": "reward", "ppo": "causal-lm"}
    parents = {name: open_artifact(run_dir / name, kind=kind) for name, kind in kinds.items()}
    parents["pretrain"] = parents["sft"]
    prompts, _ = evaluate.held_out_prompts(parents, num_prompts=2)
    _, reading = read_tokenizers(parents)
    read = load_reward_model(run_dir / "reward")
    scorer = scorer_by(read, prompts, reading=reading, tokenizer=ours, batch_size=4)
    assert reading.separator is not None
    replies = [encode_response(ours, "fine"), encode_response(ours, "thanks")]
    expected = [
        reading.tokenizer(text, reply, return_tensors="pt")
        for text, reply in zip(prompts.texts, ("fine", "thanks"), strict=True)
    ]
    raw = [float(model.eval()(**pair).logits.detach()) for pair in expected]
    std = model.config.reward_std  # small after three steps, so that rounding looks large
    normal = [(one - model.config.reward_mean) / std for one in raw]
    assert scorer(prompts.tokens, replies).tolist() == pytest.approx(normal, abs=1e-5 / std)


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ('[{"function": "my_rewards:short"}]', "my_rewards:short returned 1 scores for 8 respo"),
        (
            '[{"function": "my_rewards:hangs", "timeout_seconds": 1.0}]',
            "validation after update 0: my_rewards:hangs gave no answer within 1 seconds",
        ),
        (
            '[{"function": "my_rewards:later"}]',
            r"update 0: my_rewards:later raised ValueError: not on Sundays \(my_rewards.py, line",
        ),
        ('[{"function": "no_rewards:f"}]', "no_rewards:f: there is no module no_rewards"),
        ('[{"model": "nowhere/model"}]', "nowhere/model is no folder of a model"),
        ('[{"model": "reward_guard"}]', "reward_guard does not exist. Run: make reward_guard"),
        ('[{"modle": "reward"}]', "modle"),
        ('[{"model": "reward", "weight": 0}]', "reward.sources: reward: weight must be a number"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_no_folder(run_dir, caplog, sources, message):
    assert ppo.main(words(run_dir, *FEW, f"--reward.sources={sources}")) == 2
    line = caplog.records[-1].getMessage()
    assert re.search(message, line), line
    assert "\n" not in line
    assert not (run_dir / "ppo").exists()
