"""Many rows out of few, and models that no stage could make."""

import pytest

from pipeline.doctor import scaling
from pipeline.doctor.machine import Sharding, gpus
from pipeline.doctor.rehearsal import Passes, rankings, rehearse_language_model, training_rows
from pipeline.doctor.scaling import Scaling
from pipeline.errors import UserError
from pipeline.lora import LoRA
from stages.doctor import Config, main, recipe_of
from tests.doctor.test_rehearsal import BLUEPRINT, TRAINING
from tests.reward.encoders import save_encoder
from tests.support import tiny_llama

LENGTH = 16


def rehearsed(rows: int, *, length: int = LENGTH):
    """A language model's training with so many rows a pass."""
    whole = Scaling(
        blueprint=BLUEPRINT, machine=gpus("a100", processes=1, memory=0, sharding=Sharding())
    )
    return whole.rehearse(
        lambda blueprint, ledger, rows: rehearse_language_model(
            blueprint,
            ledger,
            training=TRAINING,
            lora=LoRA(),
            batch=training_rows(rows, length),
            passes=Passes(),
        ),
        rows=rows,
        length=length,
    )


def test_few_rows_say_what_many_take(monkeypatch):
    direct = rehearsed(60)
    monkeypatch.setattr(scaling, "MOST_ROWS", 8)
    drawn = rehearsed(60)
    assert (drawn.weights, drawn.optimizer) == (direct.weights, direct.optimizer)
    for name, moment in direct.moments.items():
        assert drawn.moments[name].most == pytest.approx(moment.most, rel=0.02)
        assert drawn.moments[name].flops == pytest.approx(moment.flops, rel=0.02)
        assert drawn.moments[name].seconds == pytest.approx(moment.seconds, rel=0.05)


def test_a_billion_rows_are_answered_for():
    thousand, billion = rehearsed(10**3), rehearsed(10**9)
    ratio = billion.moments["pass"].flops / thousand.moments["pass"].flops
    assert ratio == pytest.approx(10**6, rel=0.01)
    assert billion.moments["pass"].most > 10**9 * LENGTH * 4 * 300  # logits alone


def test_rows_that_are_too_long_to_be_looked_at_are_one_line():
    with pytest.raises(UserError, match=r"rows of 1,000,000,000 tokens are more than the doctor"):
        rehearsed(1, length=10**9)


def test_a_mask_of_long_texts_is_never_made():
    # 40 rows of 50,000 squared would be 100 GB
    batch = rankings(rows=10, texts=4, prompt=10, length=50_000, packed=True)
    assert batch["rows"]["attention_mask"].numel() == 40 * 50_000**2
    assert batch["last"].shape == (40, 2)


def test_the_model_to_start_from_says_alone_what_it_is(tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    words = (f"--pretrain.init_from={tmp_path}", "--pretrain.architecture.options={}")
    found = recipe_of(Config(recipe="smoke", words=words)).blueprint(packs=False)
    assert found.causal_lm().lm_head.weight.shape == (24, 16)
    assert found.classifier().score.weight.shape == (1, 16)  # its config.json names PAD too


def test_a_model_that_no_stage_could_train_is_one_line(tmp_path, caplog):
    encoder = save_encoder(tmp_path / "bert")
    options = "--pretrain.architecture.options={}"
    for words, told in (
        ([f"--pretrain.init_from={encoder}"], f"doctor: {encoder}: bert is an encoder"),
        (
            ["--pretrain.architecture.model_type=bert"],
            "architecture.model_type: bert is an encoder",
        ),
        (["--pretrain.architecture.model_type=mamba"], "mamba keeps no cache of keys and values"),
        (
            ["--pretrain.architecture.model_type=distilbert"],
            "no causal language model of distilbert",
        ),
    ):
        caplog.clear()
        assert main(["--recipe=smoke", f"--run={tmp_path}", options, *words]) == 2
        assert told in caplog.text


def test_packing_that_a_model_does_not_read_is_one_line(tmp_path, caplog):
    options = '--pretrain.architecture.options={"hidden_size": 16, "n_layer": 2, "n_head": 2}'
    words = ["--recipe=smoke", f"--run={tmp_path}", options]
    assert main([*words, "--pretrain.architecture.model_type=bloom"]) == 2
    assert "doctor: pack: bloom does not read texts side by side" in caplog.text
