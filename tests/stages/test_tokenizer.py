"""The tokenizer stage: the real run() on made-up data, and on mistakes."""

import pytest
from transformers import AutoTokenizer

import stages.data
import stages.tokenizer
from pipeline.checkpoint import open_artifact
from pipeline.errors import UserError
from pipeline.tokenizer import SMALLEST_VOCABULARY, train_tokenizer
from stages.tokenizer import Config, run
from tests import gguf_files


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run folder with small made-up data."""
    path = tmp_path_factory.mktemp("run")
    stages.data.run(
        stages.data.Config(
            recipe="smoke",
            run=str(path),
            tracking="none",
            chats=stages.data.Chats(source="synthetic", synthetic_conversations=40),
            ratings=stages.data.Ratings(source="synthetic", synthetic_texts=20, ranking_size=4),
        )
    )
    return path


def config_of(folder, **settings) -> Config:
    chosen = {"vocabulary_size": 300, "force": True} | settings
    return Config(recipe="smoke", run=str(folder), tracking="none", **chosen)


def test_trains_measures_and_saves(folder):
    run(config_of(folder))
    artifact = open_artifact(folder / "tokenizer", kind="tokenizer")
    assert len(AutoTokenizer.from_pretrained(artifact.path)) == 300
    assert artifact.summary["not_round_tripping"] == 0
    summary = artifact.summary
    assert summary["bytes_per_token"] == summary["num_bytes"] / summary["num_tokens"] > 1
    assert "bytes per token" in (artifact.path / "README.md").read_text()


def test_same_content_is_the_same_artifact(folder):
    digests = set()
    for _ in range(2):
        run(config_of(folder))
        digests.add(open_artifact(folder / "tokenizer", kind="tokenizer").digest)
    assert len(digests) == 1


def test_lossy_tokenizer_is_reported(folder, tmp_path):
    tokenizer = train_tokenizer(["a"], vocabulary_size=SMALLEST_VOCABULARY)
    from tokenizers import normalizers

    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("o", "0")
    tokenizer.save_pretrained(tmp_path)
    run(config_of(folder, init_from=str(tmp_path)))
    summary = open_artifact(folder / "tokenizer", kind="tokenizer").summary
    assert summary["vocabulary_size"] == SMALLEST_VOCABULARY
    assert 0 < summary["not_round_tripping"] <= summary["num_texts"]
    assert all("o" in text for text in summary["not_round_tripping_examples"])
    assert len(summary["not_round_tripping_examples"]) == stages.tokenizer.NUM_EXAMPLES


def test_what_was_mended_is_said(folder, tmp_path):
    gguf_files.write_gguf(tmp_path / "tiny.gguf", gguf_files.tiny_model())
    run(config_of(folder, init_from=str(tmp_path / "tiny.gguf"), drop_default_system=True))
    artifact = open_artifact(folder / "tokenizer", kind="tokenizer")
    assert artifact.summary["mended"] == [
        "the chat template marks what the assistant writes",
        "the chat template inserts no system message of its own",
        "PAD is <|endoftext|>; it was <|im_end|>",
    ]
    card = (artifact.path / "README.md").read_text()
    assert "Changed: PAD is <|endoftext|>; it was <|im_end|>." in card


def test_template_without_eos_is_refused(folder, tmp_path):
    tokenizer = train_tokenizer(["a"], vocabulary_size=SMALLEST_VOCABULARY)
    tokenizer.chat_template = (
        "{% for m in messages %}{% generation %}{{ m['content'] }}{% endgeneration %}{% endfor %}"
    )
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="does not end a reply with the EOS token"):
        run(config_of(folder, init_from=str(tmp_path)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"vocabulary_size": 100}, "vocabulary_size: must be at least 261"),
        ({"rows": ()}, "rows: name at least one row type"),
        ({"drop_default_system": True}, "drop_default_system: only with init_from"),
        ({"chat_template": "plain"}, "chat_template: only with init_from"),
        ({"chat_template": "alpaca"}, "chat_template: must be one of chatml, llama3, plain or a"),
        (
            {"chat_template": "plain", "drop_default_system": True, "init_from": "x"},
            "drop_default_system: is about the model's own template",
        ),
    ],
)
def test_settings_out_of_range(folder, settings, message):
    with pytest.raises(UserError, match=message):
        config_of(folder, **settings)


def test_rows_that_data_does_not_hold(folder):
    with pytest.raises(UserError, match="has no letters rows for train"):
        run(config_of(folder, rows=("letters",)))


def test_missing_data(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        run(config_of(tmp_path))
