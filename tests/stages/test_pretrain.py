"""Pretraining on a tiny model: packing, validation figures, resuming, and what is refused."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import stages.data
import stages.tokenizer
from pipeline import checkpoint, corpus
from pipeline.config import load
from pipeline.errors import UserError
from pipeline.fitting import FiniteGradients
from pipeline.saving import Saving
from stages import pretrain
from tests import gguf_files
from tests.support import SMOKE, copy_corpus, make_corpus


@pytest.fixture(scope="module")
def parents(tmp_path_factory):
    """A run folder with the smoke recipe's data and tokenizer."""
    folder = tmp_path_factory.mktemp("run")
    make_corpus(folder)
    return folder


@pytest.fixture
def run_dir(parents, tmp_path):
    """A run folder of a test's own with the same parents."""
    copy_corpus(parents, tmp_path)
    return tmp_path


def config_of(folder: Path, **training) -> pretrain.Config:
    config = load(pretrain.Config, [*SMOKE, f"--run={folder}"], stage="pretrain")
    fewer = {"steps": 12, "log_every": 2, "eval_every": 4, "warmup_steps": 2}
    config = replace(config, saving=Saving(every=5))
    return replace(config, training=replace(config.training, **(fewer | training)))


def weights(folder: Path) -> bytes:
    return (folder / "pretrain" / "model.safetensors").read_bytes()


def rows(folder: Path, name: str = "metrics.jsonl"):
    return [json.loads(line) for line in (folder / "pretrain" / name).read_text().splitlines()]


def interrupt_at(step: int, monkeypatch):
    """Raises as if the process were killed right after the step's resume point."""
    publish = checkpoint.StageRun.save_point

    def save_point(self, number, write):
        publish(self, number, write)
        if number == step:
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint.StageRun, "save_point", save_point)


def test_packing_keeps_every_token_in_order_and_counts_the_rest():
    packed, dropped = corpus.pack([[1, 2, 3], [4, 5], [6, 7, 8]], length=3)
    assert packed.tolist() == [[1, 2, 3], [4, 5, 6]]
    assert dropped == 2


def test_documents_are_the_chat_template_and_texts_end_with_eos(parents):
    from pipeline.models import load_tokenizer
    from pipeline.tokenizer import encode_conversation, encode_response

    tokenizer = load_tokenizer(parents / "tokenizer")
    messages = [
        {"role": "user", "content": "hello there"},
        {"role": "assistant", "content": "hi!"},
    ]
    documents = [{"messages": messages}, {"text": " plain words "}]
    assert corpus.encode_documents(tokenizer, documents) == [
        encode_conversation(tokenizer, messages)[0],
        encode_response(tokenizer, "plain words"),
    ]
    assert corpus.texts_of(documents) == ["hello there", "hi!", " plain words "]


def test_an_interrupted_run_ends_in_the_same_bytes(run_dir, monkeypatch):
    pretrain.run(config_of(run_dir))
    straight, metrics = weights(run_dir), rows(run_dir)
    shutil.rmtree(run_dir / "pretrain")
    with monkeypatch.context() as patch:
        interrupt_at(5, patch)
        with pytest.raises(KeyboardInterrupt):
            pretrain.run(config_of(run_dir))
    assert not (run_dir / "pretrain" / "manifest.json").exists()
    pretrain.run(config_of(run_dir))
    assert weights(run_dir) == straight
    assert rows(run_dir) == metrics


def test_the_folder_is_complete_and_its_figures_hold(run_dir):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config = config_of(run_dir)
    pretrain.run(config)
    folder = run_dir / "pretrain"
    artifact = checkpoint.open_artifact(folder, kind="causal-lm")
    assert not (folder / ".trainer").exists()
    assert not list(folder.rglob("training_args.bin"))
    assert artifact.content["chosen"] == {"precision": "fp32"}
    assert {row["of"] for row in rows(run_dir, "timings.jsonl")} == {12}
    figures = artifact.summary
    seen = 12 * config.training.minibatch_size * config.sequence_length
    assert figures["tokens_per_parameter"] == pytest.approx(seen / figures["parameters"])
    assert figures["perplexity"] == pytest.approx(math.exp(figures["loss"]))
    model, tokenizer = (
        auto.from_pretrained(folder) for auto in (AutoModelForCausalLM, AutoTokenizer)
    )
    text = corpus.read_corpus(
        run_dir / "data" / "text-validation.parquet",
        tokenizer=tokenizer,
        length=config.sequence_length,
    )
    nll = sum(loss_of(model, row) for row in text.rows)
    predicted = len(text.rows) * (config.sequence_length - 1)
    assert figures["loss"] == pytest.approx(nll / predicted, rel=1e-5)
    bits = figures["loss"] / math.log(2) * text.num_tokens / text.num_bytes
    assert figures["bits_per_byte"] == pytest.approx(bits)


def loss_of(model, row):
    """The sum of -log p of a row's tokens, one position at a time."""
    with torch.no_grad():
        logprobs = model(input_ids=row[None]).logits[0].double().log_softmax(dim=-1)
    return -sum(float(logprobs[i, token]) for i, token in enumerate(row[1:]))


def test_microbatches_change_nothing_but_rounding(run_dir):
    losses = []
    for size in (8, 2):
        pretrain.run(replace(config_of(run_dir, microbatch_size=size, steps=4), force=True))
        losses.append([row["train/loss"] for row in rows(run_dir) if "train/loss" in row])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_bf16_stays_near_fp32_and_keeps_float32_weights(run_dir):
    from safetensors.torch import load_file

    losses = []
    for precision in ("fp32", "bf16"):
        pretrain.run(replace(config_of(run_dir, precision=precision, steps=4), force=True))
        losses.append([row["train/loss"] for row in rows(run_dir) if "train/loss" in row])
    assert losses[0] == pytest.approx(losses[1], rel=2e-2)
    assert losses[0] != losses[1]
    saved = load_file(run_dir / "pretrain" / "model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    assert "attn_implementation" not in (run_dir / "pretrain" / "config.json").read_text()


def test_adamw_dropout_and_smoothing_train(run_dir):
    config = replace(
        config_of(run_dir, optimizer="adamw", steps=4), dropout=0.1, label_smoothing=0.1
    )
    pretrain.run(config)
    assert json.loads((run_dir / "pretrain" / "config.json").read_text())[
        "attention_dropout"
    ] == pytest.approx(0.1)


def test_init_from_goes_on_from_a_folder(run_dir, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    pretrain.run(config_of(run_dir))
    first = rows(run_dir)[-1]["validation/loss"]
    (run_dir / "pretrain").rename(run_dir / "base")
    pretrain.run(replace(config_of(run_dir), init_from=str(run_dir / "base")))
    assert rows(run_dir)[-1]["validation/loss"] < first


def test_init_from_with_another_tokenizer_is_refused(run_dir):
    from pipeline.tokenizer import train_tokenizer

    pretrain.run(config_of(run_dir, steps=2, warmup_steps=1))
    (run_dir / "pretrain").rename(run_dir / "base")
    other = train_tokenizer(["some other words altogether"] * 3, vocabulary_size=300)
    other.save_pretrained(run_dir / "base")
    with pytest.raises(UserError, match=r"init_from: .*base was trained with another tokenizer"):
        pretrain.run(replace(config_of(run_dir), init_from=str(run_dir / "base")))
    assert not (run_dir / "pretrain").exists()


def test_init_from_without_a_tokenizer_is_refused(run_dir):
    pretrain.run(config_of(run_dir, steps=2, warmup_steps=1))
    (run_dir / "pretrain").rename(run_dir / "base")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (run_dir / "base" / name).unlink()
    with pytest.raises(UserError, match=r"init_from: no tokenizer at .*base"):
        pretrain.run(replace(config_of(run_dir), init_from=str(run_dir / "base")))


@pytest.fixture
def gguf_run(parents, tmp_path):
    """A run folder whose tokenizer is that of a tiny model in a GGUF file, and that file."""
    shutil.copytree(parents / "data", tmp_path / "data")
    file = tmp_path / "tiny.gguf"
    gguf_files.write_gguf(file, gguf_files.tiny_model())
    argv = [*SMOKE, f"--run={tmp_path}", f"--init_from={file}"]
    stages.tokenizer.run(load(stages.tokenizer.Config, argv, stage="tokenizer"))
    return tmp_path, file


def test_a_model_taken_as_it_is_keeps_its_weights_and_gets_our_pad(gguf_run):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, file = gguf_run
    config = replace(config_of(folder), init_from=str(file), take_as_is=True, sequence_length=32)
    pretrain.run(config)
    artifact = checkpoint.open_artifact(folder / "pretrain", kind="causal-lm")
    model = AutoModelForCausalLM.from_pretrained(artifact.path)
    expected = gguf_files.tiny_model()
    assert model.state_dict().keys() == expected.state_dict().keys()
    assert all(torch.equal(model.state_dict()[k], v) for k, v in expected.state_dict().items())
    tokenizer = AutoTokenizer.from_pretrained(artifact.path)
    for settings in (model.config, model.generation_config):
        assert (settings.pad_token_id, settings.eos_token_id) == (tokenizer.pad_token_id, 2)
    assert tokenizer.pad_token_id != 2
    text = corpus.read_corpus(
        folder / "data" / "text-validation.parquet", tokenizer=tokenizer, length=32
    )
    nll = sum(loss_of(expected, row) for row in text.rows) / (len(text.rows) * 31)
    assert artifact.summary["loss"] == pytest.approx(nll, rel=1e-5)
    assert (artifact.summary["steps"], artifact.summary["tokens_seen"]) == (0, 0)
    card = (artifact.path / "README.md").read_text()
    assert "What it follows already it brought along" in card


def test_the_end_of_sequence_learns_where_pad_was_it(gguf_run):
    folder, file = gguf_run
    from pipeline.models import load_tokenizer

    config = replace(config_of(folder), init_from=str(file), sequence_length=32)
    model = pretrain.build_model(config, load_tokenizer(folder / "tokenizer"))
    embeddings = model.get_input_embeddings()
    embeddings(torch.tensor([2])).sum().backward()
    assert embeddings.weight.grad[2].abs().sum() > 0


def test_a_token_that_was_added_gets_a_row(gguf_run):
    from pipeline.models import load_tokenizer

    folder, file = gguf_run
    tokenizer = load_tokenizer(folder / "tokenizer")
    tokenizer.add_special_tokens({"pad_token": "<|a new one|>"})
    config = replace(config_of(folder), init_from=str(file), sequence_length=32)
    model = pretrain.build_model(config, tokenizer)
    assert model.get_input_embeddings().num_embeddings == len(tokenizer)
    assert model.get_output_embeddings().out_features == len(tokenizer)
    assert model.config.pad_token_id == len(tokenizer) - 1


def test_a_row_longer_than_the_models_context_is_refused(run_dir):
    pretrain.run(config_of(run_dir, steps=2, warmup_steps=1))
    (run_dir / "pretrain").rename(run_dir / "base")
    config = replace(
        config_of(run_dir),
        init_from=str(run_dir / "base"),
        sequence_length=129,
        context_length=0,
    )
    with pytest.raises(UserError, match=r"129 is longer than the model's context of 128"):
        pretrain.run(config)


def test_a_diverging_run_stops_before_the_weights_move(run_dir):
    config = config_of(run_dir, optimizer="adamw", learning_rate=1e38, max_grad_norm=0.0)
    with pytest.raises(UserError, match=r"not finite at step \d+ on rank 0 .*learning_rate"):
        pretrain.run(config)
    assert not (run_dir / "pretrain").exists()


def test_a_non_finite_gradient_is_named():
    model = torch.nn.Linear(2, 1)
    model(torch.full((1, 2), float("nan"))).sum().backward()
    state = type("State", (), {"global_step": 4})()
    with pytest.raises(UserError, match=r"at step 5 on rank 0 \(first seen in weight\)"):
        FiniteGradients().on_pre_optimizer_step(None, state, None, model=model)


def test_replies_that_people_rated_are_read_behind_the_text(run_dir, parents):
    from pipeline.data.formats import read_rows
    from pipeline.models import load_tokenizer

    tokenizer = load_tokenizer(parents / "tokenizer")
    config = config_of(run_dir)
    (plain, alone), (more, other) = (
        pretrain.read_text(
            replace(config, rated_passes=passes), run_dir / "data", tokenizer=tokenizer
        )
        for passes in (0, 2)
    )
    replies = [
        text
        for row in read_rows(run_dir / "data", "preferences", split="train")
        for text in row["responses"]
    ]
    ids = [token for text in replies for token in tokenizer(text.strip()).input_ids]
    assert more.num_documents == plain.num_documents + 2 * len(replies)
    assert more.num_tokens == plain.num_tokens + 2 * (len(ids) + len(replies))  # and EOS of each
    assert torch.equal(more.rows[: len(plain.rows)], plain.rows)
    assert torch.equal(alone.rows, other.rows)


def test_missing_or_short_text_is_refused(run_dir, parents):
    from pipeline.models import load_tokenizer

    tokenizer = load_tokenizer(parents / "tokenizer")
    with pytest.raises(UserError, match=r"nowhere.parquet does not exist"):
        corpus.read_corpus(run_dir / "nowhere.parquet", tokenizer=tokenizer, length=8)
    with pytest.raises(UserError, match=r"tokens, less than one row of sequence_length 9999999"):
        corpus.read_corpus(
            run_dir / "data" / "text-validation.parquet", tokenizer=tokenizer, length=9999999
        )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sequence_length": 1}, "sequence_length: must be at least 2, got 1"),
        ({"rated_passes": -1}, "rated_passes: must be at least 0, got -1"),
        ({"sequence_length": 300, "context_length": 256}, "300 is longer than the model's"),
        ({"eval_rows": 0}, "eval_rows: must be at least 1, got 0"),
        ({"take_as_is": True}, "take_as_is: only with init_from"),
        ({"quantise": "8bit"}, "quantise: must be none or 4bit, got '8bit'"),
        ({"quantise": "4bit"}, "quantise: 4bit is for take_as_is; a model in 4 bits cannot be"),
        (
            {"quantise": "4bit", "take_as_is": True, "init_from": "a.gguf"},
            "quantise: a.gguf is read in full precision alone; set it to none",
        ),
        ({"dropout": 1.0}, r"dropout: must be in \[0, 1\), got 1.0"),
        ({"label_smoothing": -0.1}, r"label_smoothing: must be in \[0, 1\), got -0.1"),
    ],
)
def test_values_out_of_range_are_refused_by_name(settings, message):
    with pytest.raises(UserError, match=message):
        pretrain.Config(**settings)
