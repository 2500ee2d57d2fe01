"""Instruction tuning on a tiny model: masks by hand, padding, resuming, and what is refused."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import stages.data
import stages.pretrain
import stages.tokenizer
from pipeline import checkpoint, instructions
from pipeline.config import load
from pipeline.errors import UserError
from pipeline.lora import LoRA
from pipeline.models import load_tokenizer
from pipeline.saving import Saving
from pipeline.tokenizer import encode_conversation, encode_prompt, encode_response
from stages import sft
from tests.support import SMOKE, assert_close, tiny_llama

IGNORED = -100


@pytest.fixture(scope="module")
def parents(tmp_path_factory):
    """A run folder with the smoke recipe's data, tokenizer and a barely pretrained model."""
    folder = tmp_path_factory.mktemp("run")
    for stage in ("data", "tokenizer", "pretrain"):
        module = getattr(stages, stage)
        fewer = ["--training.steps=2", "--training.warmup_steps=0"] if stage == "pretrain" else []
        module.run(load(module.Config, [*SMOKE, *fewer, f"--run={folder}"], stage=stage))
    return folder


@pytest.fixture(scope="module")
def tokenizer(parents):
    return load_tokenizer(parents / "pretrain")


@pytest.fixture
def run_dir(parents, tmp_path):
    """A run folder of a test's own with the same parents."""
    for stage in ("data", "pretrain"):
        shutil.copytree(parents / stage, tmp_path / stage)
    return tmp_path


def config_of(folder: Path, **training) -> sft.Config:
    config = load(sft.Config, [*SMOKE, f"--run={folder}"], stage="sft")
    fewer = {"steps": 8, "log_every": 2, "eval_every": 4}
    config = replace(config, saving=Saving(every=5))
    return replace(config, training=replace(config.training, **(fewer | training)))


def rows(folder: Path, name: str = "metrics.jsonl"):
    return [json.loads(line) for line in (folder / "sft" / name).read_text().splitlines()]


def test_only_the_reply_and_its_end_are_learned(tokenizer):
    row = {"prompt": "how are you?", "completion": " fine thanks "}
    (example,) = instructions.encode_rows(tokenizer, [row])
    prompt = encode_prompt(tokenizer, "how are you?")
    reply = encode_response(tokenizer, "fine thanks")
    assert example.input_ids == prompt + reply
    assert example.labels == [IGNORED] * len(prompt) + reply
    assert tokenizer.convert_ids_to_tokens(example.input_ids[len(prompt) - 1]) == "<|assistant|>"
    assert example.labels[-1] == tokenizer.eos_token_id


def test_a_prompt_of_several_turns_is_read_and_its_last_reply_learned(tokenizer):
    prompt = [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "hi"},
        {"role": "user", "content": "any plans?"},
    ]
    completion = [{"role": "assistant", "content": "none at all"}]
    rows_ = [{"prompt": prompt, "completion": completion}]
    (example,) = instructions.encode_rows(tokenizer, rows_)
    assert example.input_ids == encode_conversation(tokenizer, prompt + completion)[0]
    learned = [token for token in example.labels if token != IGNORED]
    assert learned == encode_response(tokenizer, "none at all")


def test_every_reply_of_a_conversation_is_learned(tokenizer):
    messages = [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "hi"},
        {"role": "user", "content": "any plans?"},
        {"role": "assistant", "content": "none"},
    ]
    (example,) = instructions.encode_rows(tokenizer, [{"messages": messages}])
    learned = [token for token in example.labels if token != IGNORED]
    assert learned == encode_response(tokenizer, "hi") + encode_response(tokenizer, "none")


def test_collated_rows_are_padded_on_the_right_and_padding_never_counts():
    batch = instructions.collate(
        [
            {"input_ids": [5, 6, 7], "labels": [IGNORED, 6, 7]},
            {"input_ids": [8, 1], "labels": [IGNORED, 1]},
        ],
        pad_id=0,
    )
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 1, 0]]
    assert batch["labels"].tolist() == [[IGNORED, 6, 7], [IGNORED, 1, IGNORED]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]


@pytest.mark.parametrize("lora", [LoRA(), LoRA(rank=4)], ids=["all weights", "lora"])
def test_an_interrupted_run_ends_in_the_same_bytes(run_dir, monkeypatch, lora):
    config = replace(config_of(run_dir), lora=lora)
    sft.run(config)
    artifact = checkpoint.open_artifact(run_dir / "sft", kind="causal-lm")
    shutil.rmtree(run_dir / "sft")
    publish = checkpoint.StageRun.save_point

    def save_point(self, number, write):
        publish(self, number, write)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.StageRun, "save_point", save_point)
        with pytest.raises(KeyboardInterrupt):
            sft.run(config)
    sft.run(config)
    again = checkpoint.open_artifact(run_dir / "sft", kind="causal-lm")
    assert again.digest == artifact.digest
    assert not (run_dir / "sft" / ".trainer").exists()


def test_the_figures_hold_and_samples_are_written(run_dir, tokenizer):
    from transformers import AutoModelForCausalLM

    config = config_of(run_dir)
    sft.run(config)
    artifact = checkpoint.open_artifact(run_dir / "sft", kind="causal-lm")
    assert artifact.summary["padding_frac"] < 0.05
    validation = instructions.read_examples(
        run_dir / "data" / "instructions-validation.parquet",
        tokenizer=tokenizer,
        max_length=config.max_length,
    )
    model = AutoModelForCausalLM.from_pretrained(run_dir / "sft")
    total = sum(reply_loss(model, row) for row in validation.rows)
    count = sum(label != IGNORED for row in validation.rows for label in row.labels)
    assert artifact.summary["loss"] == pytest.approx(total / count, rel=1e-5)
    samples = rows(run_dir, "samples.jsonl")
    assert len(samples) == config.samples
    assert samples[0]["prompt"].endswith("<|end|><|assistant|>")
    assert samples[0]["human"]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
def test_an_adapter_is_trained_and_written_beside_the_merged_model(run_dir, tokenizer):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    sft.run(replace(config_of(run_dir, learning_rate=1e-2), lora=LoRA(rank=4, alpha=8)))
    ids = torch.tensor([encode_prompt(tokenizer, "how are you?")])
    base = AutoModelForCausalLM.from_pretrained(run_dir / "pretrain")
    merged = AutoModelForCausalLM.from_pretrained(run_dir / "sft")
    with torch.no_grad():
        before, after = base(ids).logits, merged(ids).logits
        adapted = PeftModel.from_pretrained(base, run_dir / "sft" / "adapter")(ids).logits
    assert_close(adapted, after, tolerance=1e-4)
    assert float((after - before).abs().max()) > 0.01
    config = json.loads((run_dir / "sft" / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["base_model_name_or_path"]) == (4, "pretrain")
    assert config["target_modules"] == sorted(config["target_modules"])


def test_a_divided_models_samples_are_drawn_on_the_processor(run_dir, tokenizer, monkeypatch):
    """A GPU, for which the empty device stands here, has no room for a whole model."""
    monkeypatch.setattr("pipeline.sharding.is_divided", lambda _model: True)
    shutil.copytree(run_dir / "pretrain", run_dir / "sft")
    said = instructions.encode_rows(tokenizer, [{"prompt": "hello", "completion": "hi"}])
    config = config_of(run_dir)
    run = checkpoint._stage_run(config, stage="sft", kind="causal-lm", parents={})
    sft.write_samples(
        config, tiny_llama().to("meta"), tokenizer=tokenizer, rows=said, run=run, step=1
    )
    assert [row["human"] for row in rows(run_dir, "samples.jsonl")] == ["hi"]


def test_samples_end_where_the_models_context_does(run_dir, tokenizer):
    shutil.copytree(run_dir / "pretrain", run_dir / "sft")
    said = instructions.encode_rows(tokenizer, [{"prompt": "hello", "completion": "hi"}])
    config = replace(config_of(run_dir), sample_tokens=1000)
    run = checkpoint._stage_run(config, stage="sft", kind="causal-lm", parents={})
    sizes = {"n_embd": 8, "n_layer": 1, "n_head": 1, "n_positions": 24}
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **sizes))
    sft.write_samples(config, model, tokenizer=tokenizer, rows=said, run=run, step=1)
    assert rows(run_dir, "samples.jsonl")[-1]["response"]


def reply_loss(model, row):
    """The sum of -log p of the learned tokens, one position at a time, without padding."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([row.input_ids])).logits[0]
    logprobs = logits.double().log_softmax(dim=-1)
    return -sum(
        float(logprobs[i - 1, label]) for i, label in enumerate(row.labels) if label != IGNORED
    )


def test_microbatches_change_nothing_but_rounding(run_dir):
    losses = []
    for size in (8, 2):
        sft.run(replace(config_of(run_dir, microbatch_size=size, steps=4), force=True))
        losses.append([row["train/loss"] for row in rows(run_dir) if "train/loss" in row])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_several_turn_rows_train(run_dir, tokenizer, monkeypatch):
    monkeypatch.setattr(sft, "open_artifact", unverified)
    messages = [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "hi"},
        {"role": "user", "content": "any plans?"},
        {"role": "assistant", "content": "none"},
    ]
    for split in ("train", "validation"):
        table = pyarrow.Table.from_pylist([{"messages": messages}] * 16)
        pyarrow.parquet.write_table(table, run_dir / "data" / f"instructions-{split}.parquet")
    sft.run(config_of(run_dir))
    losses = [row["train/loss"] for row in rows(run_dir) if "train/loss" in row]
    assert losses[-1] < losses[0]


def unverified(path, kind):
    """The artifact of a folder whose files a test has changed on purpose."""
    manifest = json.loads((path / "manifest.json").read_text())
    return checkpoint.Artifact(path, manifest)


def test_rows_too_long_are_dropped_and_counted(run_dir, tokenizer):
    path = run_dir / "data" / "instructions-validation.parquet"
    everything = instructions.read_examples(path, tokenizer=tokenizer, max_length=1000)
    limit = sorted(everything.lengths)[len(everything.lengths) // 2]
    some = instructions.read_examples(path, tokenizer=tokenizer, max_length=limit)
    assert max(some.lengths) == limit
    assert some.num_dropped == len(everything.rows) - len(some.rows) > 0


def test_no_row_that_fits_and_no_file_are_refused(run_dir, tokenizer):
    path = run_dir / "data" / "instructions-validation.parquet"
    with pytest.raises(UserError, match=r"max_length: none of the \d+ rows"):
        instructions.read_examples(path, tokenizer=tokenizer, max_length=2)
    with pytest.raises(UserError, match=r"nowhere.parquet does not exist"):
        instructions.read_examples(run_dir / "nowhere.parquet", tokenizer=tokenizer, max_length=64)


def test_a_row_longer_than_the_models_context_is_refused(run_dir):
    with pytest.raises(UserError, match=r"max_length: 129 is longer than the context of 128"):
        sft.run(replace(config_of(run_dir), max_length=129))
    assert not (run_dir / "sft").exists()


def test_rows_are_read_before_the_model(run_dir, monkeypatch):
    monkeypatch.setattr(sft, "load_model", None)
    with pytest.raises(UserError, match=r"max_length: none of the \d+ rows"):
        sft.run(replace(config_of(run_dir), max_length=2))


def test_sizes_that_do_not_divide_are_refused(run_dir):
    with pytest.raises(UserError, match=r"training.minibatch_size: 8 is not a multiple"):
        sft.run(config_of(run_dir, microbatch_size=3))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_length": 1}, "max_length: must be at least 2, got 1"),
        ({"eval_rows": 0}, "eval_rows: must be at least 1, got 0"),
        ({"sample_tokens": 0}, "sample_tokens: must be at least 1, got 0"),
        ({"samples": -1}, "samples: must be at least 0, got -1"),
    ],
)
def test_values_out_of_range_are_refused_by_name(settings, message):
    with pytest.raises(UserError, match=message):
        sft.Config(**settings)
