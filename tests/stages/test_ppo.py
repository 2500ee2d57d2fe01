"""The ppo stage on made-up data and tiny random models: what it writes, refuses and resumes."""

import json
import os
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch

from pipeline.architecture import Architecture
from pipeline.checkpoint import StageRun, begin, open_artifact
from pipeline.config import StageConfig
from pipeline.errors import UserError
from pipeline.ppo import inputs
from pipeline.ppo.loading import load_roles
from pipeline.ppo.optimiser import Optimiser
from pipeline.ppo.trainer import PPOTrainer
from pipeline.stopping import STOPPED
from stages import data, ppo, tokenizer

SIZES = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2
}  # fmt: skip


def stage_config(run: Path) -> StageConfig:
    return StageConfig(recipe="smoke", run=str(run), tracking="none")


def make_models(run: Path) -> None:
    """Writes sft and reward as finished folders of random weights; reward holds an adapter too."""
    from peft import get_peft_model_state_dict

    from pipeline.lora import ADAPTER, LoRA, merged, with_adapter, write_adapter
    from pipeline.models import build_causal_lm, load_tokenizer
    from pipeline.reward.training import reward_model_from

    config = stage_config(run)
    ours = load_tokenizer(run / "tokenizer")
    parents = {"data": open_artifact(run / "data", kind="dataset")}
    with begin(config, stage="sft", kind="causal-lm", parents=parents) as stage:
        model = build_causal_lm(Architecture(options=SIZES), tokenizer=ours, max_length=64, seed=0)
        model.save_pretrained(stage.path)
        ours.save_pretrained(stage.path)
        stage.finish("random", chosen={}, summary={}, card="# sft")
    parents["sft"] = open_artifact(run / "sft", kind="causal-lm")
    with begin(config, stage="reward", kind="reward", parents=parents) as stage:
        fresh = [reward_model_from(run / "sft", pad_id=0, seed=1) for _ in range(2)]
        wrapped = with_adapter(fresh[0], LoRA(rank=2), task="SEQ_CLS", seed=1)
        weights = get_peft_model_state_dict(wrapped, save_embedding_layers=False)
        folder = stage.path / ADAPTER
        write_adapter(folder, wrapped.peft_config["default"], weights, base=run / "sft")
        reward = merged(fresh[1], folder)
        reward.config.reward_mean, reward.config.reward_std = 0.0, 0.1
        reward.save_pretrained(stage.path)
        ours.save_pretrained(stage.path)
        stage.finish("random", chosen={}, summary={}, card="# reward")


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("ppo")
    plain = ["--recipe=smoke", f"--run={run}", "--tracking=none"]
    assert [stage.main(plain) for stage in (data, tokenizer)] == [0, 0]
    make_models(run)
    return run


def words(run: Path, *more: str) -> list[str]:
    sizes = ["--updates=4", "--saving.every=1", "--validate_every=2", "--threads=1"]
    return ["--recipe=smoke", f"--run={run}", "--tracking=none", *sizes, *more]


@pytest.fixture(scope="module")
def finished(run_folder) -> Path:
    assert ppo.main(words(run_folder)) == 0
    return run_folder / "ppo"


def test_policy_and_critic_load_with_plain_from_pretrained(finished):
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoTokenizer,
    )

    tokens = AutoTokenizer.from_pretrained(finished)
    policy = AutoModelForCausalLM.from_pretrained(finished)
    critic = AutoModelForSequenceClassification.from_pretrained(finished / "value")
    assert policy.config.vocab_size == len(tokens)
    assert critic.config.num_labels == 1
    assert policy.generation_config.eos_token_id == tokens.eos_token_id


def test_the_folder_follows_the_contract(finished):
    artifact = open_artifact(finished, kind="causal-lm")
    assert set(artifact.content["parents"]) == {"data", "sft", "reward"}
    assert artifact.content["chosen"]["precision"] == "fp32"
    rows = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "objective/kl" in row] == [1, 2, 3, 4]
    assert [row["step"] for row in rows if "validation/score" in row] == [0, 2, 4]
    assert {"validation/kl", "validation/eos_frac"} <= set(artifact.summary)
    clocks = [json.loads(line) for line in (finished / "timings.jsonl").read_text().splitlines()]
    assert [(row["step"], row["of"]) for row in clocks] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    sample = json.loads((finished / "samples.jsonl").read_text().splitlines()[0])
    assert {"prompt", "response", "score", "step"} == set(sample)
    assert not any("time/" in key for row in rows for key in row)
    kept = {name for name in artifact.content["files"] if name.startswith("rollouts/")}
    assert kept == {"rollouts/update-2.parquet", "rollouts/update-4.parquet"}


class Killed(Exception):
    """Stands for the end of the process."""


@pytest.mark.parametrize("last_point", [4, 12])  # four optimizer steps an update
def test_an_interrupted_stage_ends_in_the_same_bytes(finished, run_folder, monkeypatch, last_point):
    expected = open_artifact(finished, kind="causal-lm").content["files"]
    save_point = StageRun.save_point

    def dying(self, step, write):
        if step > last_point:
            raise Killed
        save_point(self, step, write)

    with monkeypatch.context() as patch:
        patch.setattr(StageRun, "save_point", dying)
        with pytest.raises(Killed):
            ppo.main(words(run_folder, "--force=true"))
    assert ppo.main(words(run_folder)) == 0
    assert open_artifact(finished, kind="causal-lm").content["files"] == expected


@pytest.mark.parametrize("steps", [0, 6, 9])
def test_a_signal_stops_after_the_optimizer_step(finished, run_folder, monkeypatch, caplog, steps):
    expected = open_artifact(finished, kind="causal-lm").content["files"]
    step, taken = Optimiser._step, []

    def stepping(self, *args, **named):
        metrics = step(self, *args, **named)
        taken.append(metrics)
        if len(taken) == steps:
            os.kill(os.getpid(), signal.SIGTERM)
        return metrics

    def sampling(self, *args, **named):
        if steps == 0 and named.get("name") is None:
            os.kill(os.getpid(), signal.SIGTERM)
        return sample(self, *args, **named)

    sample = PPOTrainer.sample
    arguments = words(run_folder, "--saving.every=0")
    with monkeypatch.context() as patch:
        patch.setattr(Optimiser, "_step", stepping)
        patch.setattr(PPOTrainer, "sample", sampling)
        assert ppo.main([*arguments, "--force=true"]) == STOPPED
    assert f"stopped after step {steps}, which is saved" in caplog.text
    assert len(taken) == steps
    (folder,) = (run_folder / "ppo" / "checkpoints").iterdir()
    assert folder.name == f"step-{steps}"
    with monkeypatch.context() as patch:
        patch.setattr(Optimiser, "_step", stepping)
        assert ppo.main(arguments) == 0
    assert len(taken) == 16
    assert open_artifact(run_folder / "ppo", kind="causal-lm").content["files"] == expected


OPTIONS = {
    "rloo": ["--advantage.estimator=rloo", "--advantage.responses_per_prompt=4"],
    "grpo": [
        "--advantage.estimator=grpo", "--advantage.responses_per_prompt=2",
        "--kl.penalty=k3_in_loss",
    ],
    "reinforce": ["--advantage.estimator=reinforce", "--kl.controller=fixed"],
    "raw": ["--reward.normalise=false", "--kl.penalty=k2_in_loss"],
    "trunk": ["--roles=trunk", "--optimisation.critic_warmup=1"],
    "lora": ["--roles=lora", "--lora.rank=4"],
    "reference": ["--kl.reference_rate=0.5", "--kl.reference_every=2"],
    "losses": [
        "--optimisation.ptx_coef=0.5", "--optimisation.entropy_coef=0.01",
        "--optimisation.clip_high=0.3", "--optimisation.dual_clip=3.0",
        "--optimisation.target_kl=0.5",
    ],
}  # fmt: skip
CRITICLESS = {"rloo", "grpo", "reinforce"}


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_makes_a_whole_folder(run_folder, tmp_path, name):
    run = copy_parents(run_folder, tmp_path / "run")
    assert ppo.main(words(run, *OPTIONS[name], "--updates=2")) == 0
    folder = open_artifact(run / "ppo", kind="causal-lm").path
    assert (folder / "value").exists() == (name not in CRITICLESS)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    names = {key for row in rows for key in row}
    assert ("value/loss" in names) == (name not in CRITICLESS)
    assert ("kl/loss" in names) == (name in {"grpo", "raw"})
    assert {"ptx/loss", "entropy/loss", "optim/steps"} <= names or name != "losses"
    moved = {path.stem for path in (folder / "checkpoints/step-8").glob("*.safetensors")}
    assert ("reference" in moved) == (name == "reference")
    assert (folder / "adapter").exists() == (name == "lora")
    assert all(row["validation/text_perplexity"] > 1 for row in rows if "validation/kl" in row)
    if name == "raw":
        config = json.loads((folder / "value/config.json").read_text())
        assert (config["reward_mean"], config["reward_std"]) == (0.0, 1.0)


def test_prompts_may_be_conversations_of_several_turns(run_folder, tmp_path):
    from pipeline.models import load_tokenizer
    from pipeline.ppo.inputs import read_prompts

    run = tmp_path / "run"
    start = ["--recipe=smoke", f"--run={run}", "--tracking=none"]
    assert data.main([*start, "--chats.context_turns=3"]) == 0
    assert tokenizer.main(start) == 0
    make_models(run)
    ours = load_tokenizer(run / "tokenizer")
    prompts = read_prompts(run / "data", split="train", tokenizer=ours, max_tokens=200).tokens
    roles = [ours.convert_tokens_to_ids(f"<|{name}|>") for name in ("user", "assistant")]
    turns = [[token for token in prompt if token in roles] for prompt in prompts]
    assert max(len(turn) for turn in turns) == 4  # user, assistant, user, and the reply to come
    for turn in turns:
        assert turn[::-1] == [roles[(index + 1) % 2] for index in range(len(turn))]
    assert ppo.main(words(run, "--updates=1", "--max_prompt_tokens=48")) == 0
    samples = (run / "ppo/samples.jsonl").read_text()
    assert samples.count("<|user|>") > samples.count('"response"')


def copy_parents(source: Path, run: Path) -> Path:
    for stage in ("data", "tokenizer", "sft", "reward"):
        shutil.copytree(source / stage, run / stage)
    return run


def test_a_tokenizer_that_does_not_match_is_refused(run_folder, monkeypatch):
    from pipeline import models

    load = models.load_tokenizer

    def other(path):
        loaded = load(path)
        if Path(path).name == "reward":
            loaded.add_tokens(["<|stranger|>"])
        return loaded

    monkeypatch.setattr(models, "load_tokenizer", other)
    config = ppo.Config(
        recipe="smoke", run=str(run_folder), tracking="none", threads=1, force=True,
        max_prompt_tokens=32, max_response_tokens=8,
    )  # fmt: skip
    parents = ppo.open_parents(config)
    with pytest.raises(UserError, match="reward has another tokenizer than .*sft.* make reward"):
        load_roles(
            parents["sft"], parents["reward"], wanted=config.wanted, device=torch.device("cpu")
        )


def test_every_role_is_a_model_of_its_own_and_only_two_are_trained(run_folder):
    sizes = {"max_prompt_tokens": 32, "max_response_tokens": 16, "threads": 1}
    config = ppo.Config(recipe="smoke", run=str(run_folder), tracking="none", **sizes)
    parents = ppo.open_parents(config)
    roles = load_roles(
        parents["sft"], parents["reward"], wanted=config.wanted, device=torch.device("cpu")
    )
    first = {name: next(model.parameters()) for name, model in vars(roles).items()}
    assert len({tensor.data_ptr() for tensor in first.values()}) == 4
    assert {name for name, tensor in first.items() if tensor.requires_grad} == {"policy", "value"}
    same = zip(roles.policy.parameters(), roles.reference.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in same)
    same = zip(roles.value.parameters(), roles.reward_model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in same)


def test_fewer_validation_prompts_than_processes_are_refused(run_folder, monkeypatch):
    from pipeline.models import load_tokenizer

    with pytest.raises(UserError, match="validation_prompts: 2 is less than the processes"):
        ppo.Config(validation_prompts=2, num_processes=3)
    monkeypatch.setattr(inputs, "world_size", lambda: 10**6)
    ours = load_tokenizer(run_folder / "sft")
    with pytest.raises(UserError, match="validation_prompts: only .* fewer than the processes"):
        inputs.read_inputs(
            run_folder / "data", tokenizer=ours, max_tokens=64, text_length=16, ptx=False
        )


def test_text_of_less_than_a_row_stops_ppo_ptx_alone_and_before_models_load(
    run_folder, monkeypatch, caplog
):
    def never(*_args, **_named):
        raise AssertionError("a model was read")

    caplog.set_level("INFO")
    monkeypatch.setattr("pipeline.ppo.loading.load_roles", never)
    more = ["--max_response_tokens=999968", "--force=true"]
    with pytest.raises(AssertionError, match="a model was read"):
        ppo.main(words(run_folder, *more))
    assert "1000000: validation/text_perplexity is left out" in caplog.text
    assert ppo.main(words(run_folder, *more, "--optimisation.ptx_coef=0.5")) == 2
    assert "less than one row of max_prompt_tokens + max_response_tokens 1000000" in caplog.text


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("--minibatch_size=5", "minibatch_size: 5 does not divide prompts_per_update 16"),
        ("--updates=0", "updates: must be positive, got 0"),
        ("--guard.every=-1", "guard.every: must be at least 0, got -1"),
        ("--guard.patience=0", "guard.patience: must be at least 1, got 0"),
        ("--guard.every=1", "reward_guard does not exist. Run: make reward_guard"),
        ("--keep_rollout_every=-1", "keep_rollout_every: must be at least 0, got -1"),
        ("--max_response_tokens=60", "92 exceeds the model's context 64"),
        ("--max_prompt_tokens=1", "none of the .* train prompts has at most 1 tokens"),
        ("--optimisation.compile=true --activation_checkpointing=true", "computes again would be"),
        ("--attention=half", "attention: must be one of auto, fp32, mixed, bf16, got 'half'"),
        ("--precision=half", "precision: must be one of auto, bf16, fp32, got 'half'"),
        ("--kl.coef=-1", "kl.coef: must be at least 0"),
        ("--kl.controller=pid", "kl.controller: must be fixed or adaptive, got 'pid'"),
        ("--kl.target=0", "kl.target: must be positive"),
        ("--kl.horizon=0", "kl.horizon: must be positive"),
        (
            "--kl.penalty=k2_in_loss --kl.length_compensation=0.5",
            "kl.length_compensation: 0.5 has no effect with kl.penalty k2_in_loss",
        ),
        ("--validation_prompts=0", "validation_prompts: must be positive, got 0"),
        ("--kl.length_compensation=2", "kl.length_compensation: must be between 0 and 1, got 2"),
        ("--reward.clip=-1", "reward.clip: must be at least 0"),
        ("--reward.lam=1.5", "reward.lam: must be between 0 and 1"),
        ("--advantage.responses_per_prompt=3", "3 does not divide prompts_per_update 16"),
        ("--optimisation.epochs=0", "optimisation.epochs: must be positive"),
        ("--optimisation.value_coef=0", "optimisation.value_coef: must be positive"),
        ("--optimisation.max_grad_norm=0", "optimisation.max_grad_norm: must be positive"),
        ("--roles=shared", "roles: must be one of separate, trunk, lora, got 'shared'"),
        ("--roles=lora", "lora.rank: roles lora needs it above 0, any other needs 0; got 0"),
        ("--lora.rank=4", "lora.rank: .*any other needs 0; got 4 with roles separate"),
        ("--lora.dropout=0.1", "lora.dropout: ppo reads all models without; set it to 0, not 0.1"),
        (
            "--roles=lora --lora.rank=4 --kl.reference_rate=0.5",
            "kl.reference_rate: with roles lora the reference is the frozen base",
        ),
        (
            "--roles=trunk --advantage.estimator=reinforce",
            "roles: trunk shares the policy with a critic, and reinforce has none",
        ),
        (
            "--optimisation.critic_warmup=1 --advantage.estimator=reinforce",
            "optimisation.critic_warmup: reinforce has no critic; set it to 0, not 1",
        ),
        (
            "--optimisation.critic_warmup=4",
            "optimisation.critic_warmup: 4 of 4 updates leave the policy none",
        ),
        ("--optimisation.critic_warmup=-1", "optimisation.critic_warmup: must be at least 0"),
        ("--optimisation.learning_rate=1.0e+30", "lower the learning rate"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_two(run_folder, tmp_path, caplog, word, message):
    run = copy_parents(run_folder, tmp_path / "run")
    assert ppo.main(words(run, *word.split())) == 2
    line = caplog.records[-1].getMessage()
    assert re.search(message, line), line
    assert "\n" not in line
    assert not (run / "ppo").exists()


def test_a_coefficient_that_cannot_rise_is_diagnosed_and_resume_tells_it_once(
    run_folder, tmp_path, monkeypatch, caplog
):
    import shutil

    run = tmp_path / "run"
    for stage in ("data", "tokenizer", "sft", "reward"):
        shutil.copytree(run_folder / stage, run / stage)
    faulty = words(
        run, "--updates=10", "--kl.coef=0", "--kl.target=0.05",
        "--optimisation.learning_rate=3.0e-2", "--validate_every=10", "--saving.every=3",
    )  # fmt: skip
    assert ppo.main(faulty) == 0
    straight = open_artifact(run / "ppo", kind="causal-lm").content["files"]
    rows = [json.loads(line) for line in (run / "ppo/metrics.jsonl").read_text().splitlines()]
    told = [row["step"] for row in rows if "diagnosis/kl_over_target" in row]
    assert [step < 9 for step in told] == [True]
    assert f"update {told[0]}: the KL to the reference is over 2 times its target" in caplog.text

    save_point = StageRun.save_point

    def dying(self, step, write):
        save_point(self, step, write)
        if step == 36:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(StageRun, "save_point", dying)
        with pytest.raises(Killed):
            ppo.main([*faulty, "--force=true"])
    assert ppo.main(faulty) == 0
    assert open_artifact(run / "ppo", kind="causal-lm").content["files"] == straight
