"""How ppo attends in bf16 is measured when it begins, and kept to when it goes on."""

from pipeline import attention
from pipeline.checkpoint import open_artifact
from pipeline.ppo import fast_attention
from pipeline.stopping import STOPPED
from stages import data, ppo, tokenizer
from tests.stages.test_ppo import make_models, words


def test_attention_is_measured_once_and_kept_to(tmp_path, monkeypatch, caplog):
    plain = ["--recipe=smoke", f"--run={tmp_path}", "--tracking=none"]
    assert data.main(plain) == 0
    assert tokenizer.main(plain) == 0
    make_models(tmp_path)
    attends, pack = [], attention.pack

    def packed(model, *, precision):
        attends.append(precision)
        return pack(model, precision=precision)

    def measured(kind):
        monkeypatch.setattr(fast_attention, "fastest_attention", lambda *_, **__: kind)

    monkeypatch.setattr(attention, "pack", packed)
    arguments = words(tmp_path, "--precision=bf16")
    measured("mixed")
    assert ppo.main([*arguments, "--saving.deadline=1"]) == STOPPED
    measured("bf16")
    with caplog.at_level("INFO"):
        assert ppo.main(arguments) == 0
    assert "goes on with attention mixed, as it began; here it would be bf16" in caplog.text
    assert set(attends) == {"mixed"}
    chosen = open_artifact(tmp_path / "ppo", kind="causal-lm").content["chosen"]
    assert (chosen["precision"], chosen["attention"]) == ("bf16", "mixed")
