"""The alignment tax on rows whose perplexity is known."""

import math

import pyarrow
import pyarrow.parquet
import pytest
import torch

from pipeline.corpus import read_corpus
from pipeline.evaluation import alignment_tax as module
from pipeline.evaluation.alignment_tax import alignment_tax
from pipeline.tokenizer import train_tokenizer
from tests.support import tiny_llama


@pytest.fixture
def text(tmp_path):
    rows = [{"text": f"how are you today my friend number {number}"} for number in range(40)]
    path = tmp_path / "text-test.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def test_a_policy_that_forgot_everything_has_the_vocabulary_as_perplexity(text, monkeypatch):
    monkeypatch.setattr(module, "ROWS", 2)
    tokenizer = train_tokenizer(["how are you"] * 5, vocabulary_size=270)
    size = len(tokenizer)
    sft, blank = tiny_llama(vocabulary=size), tiny_llama(vocabulary=size, seed=1)
    torch.nn.init.zeros_(blank.get_output_embeddings().weight)
    settings = {"text": text, "tokenizer": tokenizer, "length": 16}
    found = alignment_tax(sft, blank, num_rows=5, **settings)
    assert found["ppo"] == pytest.approx(size, rel=1e-5)
    assert found["ratio"] == found["ppo"] / found["sft"]
    # The same by hand: the mean over the tokens of five rows, evenly spaced.
    rows = read_corpus(text, tokenizer=tokenizer, length=16).rows
    chosen = torch.stack([rows[index * len(rows) // 5] for index in range(5)])
    with torch.no_grad():
        logprobs = sft(input_ids=chosen).logits[:, :-1].log_softmax(-1)
    nll = -logprobs.gather(2, chosen[:, 1:, None]).mean()
    assert found["sft"] == pytest.approx(math.exp(float(nll)), rel=1e-5)


def test_all_rows_are_read_where_there_are_fewer_than_asked_for(text):
    tokenizer = train_tokenizer(["how are you"] * 5, vocabulary_size=270)
    models = [tiny_llama(vocabulary=len(tokenizer), seed=seed) for seed in (0, 1)]
    settings = {"text": text, "tokenizer": tokenizer, "length": 16}
    rows = len(read_corpus(text, tokenizer=tokenizer, length=16).rows)
    most = alignment_tax(*models, num_rows=10**6, **settings)
    assert most == alignment_tax(*models, num_rows=rows, **settings)


def test_a_run_without_text_has_none(tmp_path):
    settings = {"tokenizer": None, "length": 16, "num_rows": 5}
    assert alignment_tax(None, None, text=tmp_path / "missing.parquet", **settings) is None


def test_text_of_less_than_a_row_has_none_and_says_so(text, caplog):
    tokenizer = train_tokenizer(["how are you"] * 5, vocabulary_size=270)
    with caplog.at_level("INFO"):
        found = alignment_tax(
            None, None, text=text, tokenizer=tokenizer, length=9999999, num_rows=5
        )
    assert found is None
    assert "less than one row of 9999999: the alignment tax is left out" in caplog.text


def test_rows_of_many_words_are_read_few_at_a_time():
    assert module.rows_per_pass(96, vocabulary=8192) == 8
    assert module.rows_per_pass(1536, vocabulary=128_256) == 2  # 394 million logits
    assert module.rows_per_pass(10**6, vocabulary=10**6) == 1
