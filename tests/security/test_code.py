"""Python code that a model brings runs only where the configuration names that model."""

import io
import sys

import pytest
from transformers import AutoTokenizer, dynamic_module_utils

from pipeline import pretrained
from pipeline.command import command
from pipeline.config import StageConfig
from pipeline.errors import UserError
from pipeline.evaluation.sampling import load_any
from pipeline.models import load_causal_lm, load_classifier, load_origin, load_tokenizer
from pipeline.origin import load_origin_tokenizer, locate
from pipeline.reward.reading import load_reading
from pipeline.tokenizer import encode_conversation, encode_prompt
from stages import chat, evaluate
from tests.evaluation.fakes import save_language_model, tiny_tokenizer
from tests.security.plants import change, plant_code
from tests.support import tiny_reward_model

LOADERS = {
    "load_causal_lm": load_causal_lm,
    "load_tokenizer": load_tokenizer,
    "load_origin": lambda folder: load_origin(locate(str(folder))),
    "load_origin_tokenizer": lambda folder: load_origin_tokenizer(locate(str(folder))),
    "load_reading": load_reading,
    "load_any": lambda folder: load_any(str(folder)),
}


@pytest.fixture
def mark(tmp_path):
    """The file that the planted code makes."""
    return tmp_path / "the-code-ran"


@pytest.fixture
def folder(tmp_path, mark, monkeypatch):
    """A language model that brings code; Transformers copies code it runs into a folder of ours."""
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr("builtins.input", lambda _: "y")  # Transformers asks; nobody may answer
    pretrained.permit(())
    yield plant_code(save_language_model(tmp_path / "model"), mark)
    pretrained.permit(())
    for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
        del sys.modules[name]


@pytest.mark.parametrize("loader", LOADERS)
def test_code_does_not_run_unasked(folder, mark, loader):
    with pytest.raises(
        UserError, match="brings Python code of its own, .*trust_remote_code: "
    ) as e:
        LOADERS[loader](folder)
    assert "\n" not in str(e.value)
    assert not mark.exists()


@pytest.mark.parametrize("loader", LOADERS)
def test_code_runs_where_the_model_is_named_and_that_is_said_once(folder, mark, loader, caplog):
    pretrained._announced.clear()
    pretrained.permit([f"{folder}/"])
    for _ in range(2):
        LOADERS[loader](folder)
    assert mark.exists()
    said = [line.getMessage() for line in caplog.records if line.name == "pipeline.pretrained"]
    assert said == [f"{folder}: Python code that it brings runs now, as trust_remote_code permits"]


def test_another_models_name_permits_nothing(folder, mark):
    pretrained.permit([str(folder.parent), f"{folder}-2", "model"])
    with pytest.raises(UserError, match="brings Python code of its own"):
        load_causal_lm(folder)
    assert not mark.exists()


def test_a_reward_source(tmp_path, folder, mark):
    tiny_reward_model().save_pretrained(folder)
    plant_code(folder, mark)
    with pytest.raises(UserError, match="brings Python code of its own"):
        load_classifier(folder)
    assert not mark.exists()
    pretrained.permit([str(folder)])
    assert type(load_classifier(folder)).__name__ == "Scorer"
    assert mark.exists()


def test_a_known_architecture_loads_without_its_code(tmp_path, mark):
    folder = plant_code(save_language_model(tmp_path / "model"), mark)
    change(folder / "config.json", model_type="llama")
    assert type(load_causal_lm(folder)).__name__ == "LlamaForCausalLM"
    assert not mark.exists()


def test_code_that_needs_what_is_missing_is_one_line(folder):
    code = folder / "modeling_planted.py"
    code.write_text("import no_such_package\n" + code.read_text(encoding="utf-8"), encoding="utf-8")
    pretrained.permit([str(folder)])
    with pytest.raises(UserError, match="its code needs what is not installed .*no_such_package"):
        load_causal_lm(folder)


REACHING = {
    "classes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ raise_exception.__globals__['__builtins__']['open']('%s', 'w') }}",
    "functions": "{{ cycler.__init__.__globals__.os.mkdir('%s') }}",
    "import": "{% import '/etc/hostname' as x %}",
}


@pytest.mark.parametrize("reach", REACHING)
def test_a_chat_template_reaches_no_python(tmp_path, mark, reach):
    template = REACHING[reach] % str(mark) if "%s" in REACHING[reach] else REACHING[reach]
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    turns = [{"role": "user", "content": "hi"}]
    refused = pytest.raises(UserError, match="its chat template fails .* Mend chat_template.jinja")
    for use in (
        lambda: load_tokenizer(tmp_path),
        lambda: encode_prompt(loaded, "hi"),
        lambda: encode_conversation(loaded, turns),
    ):
        with refused as caught:
            use()
        assert "\n" not in str(caught.value)
    assert not mark.exists()


@pytest.mark.parametrize("named", ["pretrain", "other"])
def test_a_stage_is_permitted_by_its_name(folder, mark, named, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs" / "cpu").mkdir(parents=True)
    (tmp_path / "configs" / "cpu" / "toy.yaml").write_text(f"trust_remote_code: [{named}]\n")
    (tmp_path / "run").mkdir()
    folder.rename(tmp_path / "run" / "pretrain")

    def run(config: StageConfig) -> None:
        load_causal_lm(config.folder("pretrain"))

    code = command(StageConfig, run, ["--run=run", "--tracking=none"], stage="toy")
    assert (code, mark.exists()) == ((0, True) if named == "pretrain" else (2, False))


def test_replies_in_bulk(folder, mark, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("love you\n", encoding="utf-8")
    words = ["--recipe=smoke", f"--generate.model={folder}", f"--generate.prompts={prompts}"]
    words += [f"--generate.output={tmp_path / 'replies.jsonl'}", "--tracking=none"]
    words += ["--generate.max_response_tokens=8"]
    assert evaluate.main(words) == 2
    assert not mark.exists()
    assert evaluate.main([*words, f"--trust_remote_code=[{folder}]"]) == 0
    assert mark.exists()


def test_chat(folder, mark, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n/quit\n"))
    assert chat.main(["--models", str(folder)]) == 2
    assert not mark.exists()
    assert chat.main(["--models", str(folder), "--trust_remote_code", str(folder)]) == 0
    assert mark.exists()
