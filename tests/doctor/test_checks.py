"""What the doctor finds wrong beside sizes: every finding, good and bad."""

import dataclasses
import sys
from pathlib import Path

import huggingface_hub
import pytest

from pipeline.doctor import checks, recipe
from pipeline.doctor.machine import GPUS, Machine, Sharding
from pipeline.doctor.need import Need, Peak
from pipeline.errors import UserError
from pipeline.models import load_tokenizer
from pipeline.tokenizer import train_tokenizer
from stages.doctor import Config, recipe_of
from tests.reward.encoders import word_pieces


def machine(processes: int = 1, **more) -> Machine:
    return Machine(
        name="test",
        processes=processes,
        memory=10**9,
        rates=GPUS["a100"].rates,
        is_gpu=True,
        **more,
    )


def of(*words: str, run: Path | str = "runs/none", name: str = "smoke") -> recipe.Recipe:
    return recipe_of(Config(recipe=name, run=str(run), words=words))


def only(findings) -> tuple[str, str]:
    (found,) = findings
    return found.state, found.text


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run with a tokenizer, and sft and reward that hold it too."""
    folder = tmp_path_factory.mktemp("run")
    tokenizer = train_tokenizer(["hello there, how are you"] * 4, vocabulary_size=300)
    for stage in ("tokenizer", "sft", "reward"):
        tokenizer.save_pretrained(folder / stage)
    return folder


def test_what_is_not_there_yet_is_said_to_be_so():
    absent = of()
    assert only(checks.tokens(absent, machine()))[0] == "unknown"
    state, text = only(checks.agreement(absent, machine()))
    assert (state, text) == ("unknown", "reward model reward: made from sft, with its tokenizer")


def test_our_own_tokenizer_passes(run):
    states = [found.state for found in checks.tokens(of(run=run), machine())]
    assert states == ["good", "good"]
    assert only(checks.agreement(of(run=run), machine())) == (
        "good", "reward model reward reads the policy's tokens",
    )  # fmt: skip


def test_a_template_that_marks_no_reply_is_wrong(run, monkeypatch):
    monkeypatch.setattr(checks, "encode_conversation", lambda *_: ([5, 6], [False, False]))
    found = list(checks.tokens(of(run=run), machine()))[-1]
    assert found.state == "wrong"
    assert "does not mark a reply and its EOS. Run: make tokenizer" in found.text


def test_texts_that_do_not_come_back_are_wrong(run, monkeypatch):
    monkeypatch.setattr(checks, "SAYING", ("  spaces around are lost  ",))
    found = list(checks.tokens(of(run=run), machine()))[-1]
    assert found.state == "wrong"
    assert "does not come through the tokenizer as it is" in found.text


def test_a_reward_model_of_another_tokenizer_is_wrong(run, tmp_path):
    other = train_tokenizer(["something else entirely"] * 4, vocabulary_size=290)
    other.save_pretrained(tmp_path / "reward")
    (tmp_path / "sft").symlink_to(run / "sft")
    state, text = only(checks.agreement(of(run=tmp_path), machine()))
    assert state == "wrong"
    assert text.startswith(f"{tmp_path / 'reward'} has another tokenizer than ")
    assert text.endswith(f". Run: make reward RUN={tmp_path} FORCE=1")


def test_a_reward_model_with_a_tokenizer_of_its_own_reads_the_text_anew(run, tmp_path):
    (tmp_path / "sft").symlink_to(run / "sft")
    word_pieces().save_pretrained(tmp_path / "reward")  # no chat template, and no EOS
    encoder = of("--reward.init_from=a/bert", run=tmp_path)
    anew = ("good", "reward model reward reads the text anew")
    assert only(checks.agreement(encoder, machine())) == anew
    elsewhere = of(f"--ppo.reward.sources=[{{model: {tmp_path / 'reward'}}}]", run=tmp_path)
    assert only(checks.agreement(elsewhere, machine())) == anew


def test_another_chat_template_reads_the_text_anew(run, tmp_path):
    (tmp_path / "sft").symlink_to(run / "sft")
    tokenizer = load_tokenizer(run / "sft")
    tokenizer.chat_template += "{{ '' }}"
    tokenizer.save_pretrained(tmp_path / "reward")
    other = of("--reward.init_from=a/b", run=tmp_path)
    assert only(checks.agreement(other, machine()))[1].endswith("reads the text anew")


def test_a_reward_model_that_cannot_be_read_is_wrong_and_the_next_is_looked_at(run, tmp_path):
    tokenizer = word_pieces()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path / "bare")
    words = f"--ppo.reward.sources=[{{model: {tmp_path / 'bare'}}}, {{model: reward}}]"
    bare, ours = checks.agreement(of(words, run=run), machine())
    assert (bare.state, ours.state) == ("wrong", "good")
    assert bare.text.endswith("bare: the tokenizer's PAD must be a token of its own, not EOS")


def test_a_source_that_the_recipe_has_no_stage_for_is_wrong():
    words = "--ppo.reward.sources=[{model: reward_guard}]"
    state, text = only(checks.agreement(of(words, name="pythia-1b-tldr"), machine()))
    assert state == "wrong"
    assert text == (
        "reward.sources: reward_guard: there is no configs/pythia-1b-tldr/reward_guard.yaml. "
        "Write it, or name another source"
    )


@pytest.fixture
def base(tmp_path) -> Path:
    """A base model's tokenizer: no chat template, and PAD is EOS."""
    tokenizer = train_tokenizer(["hello there, how are you"] * 4, vocabulary_size=300)
    tokenizer.pad_token, tokenizer.chat_template = tokenizer.eos_token, None
    tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def test_a_tokenizer_that_is_to_be_taken_is_looked_at_as_the_stage_would_write_it(base):
    taken = f"--tokenizer.init_from={base}"
    good, back = checks.tokens(of(taken, "--tokenizer.chat_template=plain"), machine())
    assert (good.state, back.state) == ("good", "good")
    assert good.text.startswith(f"{base}: PAD is not EOS, a prompt is rendered; the chat template")
    assert "; PAD is <" in good.text
    (bare,) = [f for f in checks.examine(of(taken), machine(), [], copy=0.0) if "no chat" in f.text]
    assert (bare.state, bare.text[:21]) == ("wrong", "tokenizer: init_from:")


def test_a_tokenizer_on_the_hub_is_looked_at_where_the_cache_has_it(base, monkeypatch):
    asked = []

    def cached(*words, **more):
        asked.append((*words, more))
        return str(base / "tokenizer_config.json") if len(asked) > 1 else None

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", cached)
    hub = of("--tokenizer.init_from=owner/base@0123abc", "--tokenizer.chat_template=plain")
    assert only(checks.tokens(hub, machine()))[0] == "unknown"
    assert next(checks.tokens(hub, machine())).text.startswith("owner/base@0123abc: PAD is not EOS")
    assert asked == 2 * [("owner/base", "tokenizer_config.json", {"revision": "0123abc"})]


def test_pad_that_is_eos_is_found(run, tmp_path, monkeypatch):
    tokenizer = train_tokenizer(["hello"] * 4, vocabulary_size=290)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    found = checks.examine(of(run=tmp_path), machine(), [], copy=0.0)
    assert any(f.state == "wrong" and "PAD must be a token of its own" in f.text for f in found)


def test_batches_that_do_not_divide_are_wrong():
    assert only(checks.batches(of(), machine(2)))[0] == "good"
    found = checks.examine(of(), machine(3), [], copy=0.0)
    assert any(f.state == "wrong" and "training.minibatch_size: 8 is not" in f.text for f in found)
    few = ["--pretrain.training.minibatch_size=12", "--sft.training.minibatch_size=12"]
    few += ["--reward.training.minibatch_size=3", "--reward_guard.training.minibatch_size=3"]
    state, text = only(checks.batches(of(*few), machine(3)))
    assert state == "wrong"
    assert text.startswith("ppo: minibatch_size 8 is no multiple of 3; ")


def test_rows_beyond_the_context_are_wrong():
    assert only(checks.contexts(of(), machine()))[0] == "good"
    state, text = only(checks.contexts(of("--sft.max_length=200"), machine()))
    assert state == "wrong"
    assert text.startswith("sft: max_length 200: beyond the model's context of 128 positions")


def test_stages_that_cannot_divide_their_models_are_named():
    adapters = ("--ppo.roles=lora", "--ppo.lora.rank=4", "--reward.lora.rank=4")

    def named(kind, *words):
        found = list(checks.sharding(of(*words), machine(2, sharding=Sharding(kind=kind))))
        assert {one.state for one in found} <= {"wrong"}
        return [one.text.split()[0] for one in found]

    assert named("none") == []
    assert named("fsdp") == []
    assert named("fsdp", *adapters) == ["reward", "ppo"]
    assert named("fsdp", "--sft.lora.rank=4") == ["sft"]
    adamw = [f"--{stage}.training.optimizer=adamw" for stage in checks.TRAINED]
    assert named("zero3", *adamw) == []
    assert named("zero3", *adamw, *adapters) == ["reward", "ppo"]
    guard = "--reward_guard.lora.rank=4"
    assert named("zero3", *adamw, guard) == ["reward_guard"]
    assert named("zero2", *adamw[1:]) == ["pretrain:"]
    assert named("fsdp", *adamw[1:]) == []


def test_ppos_own_sharding_is_held_against_what_it_goes_with():
    def looked(*words, processes=2):
        fsdp = Sharding(kind="fsdp")
        found = checks.examine(of(*words), machine(processes, sharding=fsdp), [], copy=0.0)
        return [one.text for one in found if "sharding" in one.text or "refuses" in one.text]

    assert looked() == looked(processes=1) == []  # one process keeps its models whole
    (alone,) = looked("--ppo.sharding=fsdp2", processes=1)
    assert alone.startswith("sharding: fsdp2 divides models over processes, and there is one")
    (engine,) = looked("--ppo.engine.name=vllm_colocate")
    assert engine.startswith("engine.name: vllm_colocate takes whole weights")
    assert looked("--ppo.engine.name=vllm_colocate", "--ppo.sharding=none") == []
    lora = ("--ppo.sharding=fsdp2", "--ppo.roles=lora", "--ppo.lora.rank=4")
    found = list(checks.sharding(of(*lora, "--reward.lora.rank=4"), machine(2)))
    assert [one.text[:28] for one in found] == ["ppo of smoke keeps its model"]


def test_a_guard_that_the_recipe_does_not_train_is_wrong():
    word, qwen = "--ppo.guard.every=1", "qwen2.5-0.5b-hh"
    assert not list(checks.guard(of(word), machine()))
    assert not list(checks.guard(of(name=qwen), machine()))
    state, text = only(checks.guard(of(word, name=qwen), machine()))
    assert state == "wrong"
    assert f"no configs/{qwen}/reward_guard.yaml" in text


def test_evaluate_on_one_base_needs_adapters_of_ppo_and_reward():
    word = "--evaluate.on_one_base=true"
    assert not list(checks.one_base(of(), machine()))
    state, text = only(checks.one_base(of(word), machine()))
    assert state == "wrong"
    assert text.startswith("evaluate: on_one_base needs ppo.roles lora and reward.lora.rank above")
    words = ("--ppo.roles=lora", "--ppo.lora.rank=4", "--reward.lora.rank=4", word)
    assert only(checks.one_base(of(*words), machine()))[0] == "good"


def test_other_libraries_than_the_tested_are_named(monkeypatch):
    assert only(checks.libraries(of(), machine()))[0] == "good"
    monkeypatch.setattr(checks.importlib.metadata, "version", lambda name: "9.9+cpu")
    state, text = only(checks.libraries(of(), machine()))
    assert state == "wrong"
    assert "torch 9.9 (tested: " in text


def test_libraries_that_settings_need_are_looked_for(monkeypatch):
    more = of("--ppo.engine.name=vllm_colocate", "--sft.tracking=trackio")
    monkeypatch.setattr(checks.importlib.util, "find_spec", lambda name: None)
    measured = of(
        "--pretrain.quantise=4bit", "--pretrain.take_as_is=true", "--pretrain.init_from=a/b"
    )
    assert "bitsandbytes is not" in list(checks.libraries(measured, machine()))[-1].text
    assert len(list(checks.libraries(of(), machine()))) == 1
    four_bit = of("--sft.lora.rank=4", "--sft.lora.quantise=4bit")
    found = list(checks.libraries(four_bit, machine(sharding=Sharding(kind="zero2"))))[1:]
    install = f"{sys.executable} -m pip install -c constraints.txt"
    assert [one.text for one in found] == [
        f"bitsandbytes is not installed. Run: {install} -e '.[qlora]'",
        f"deepspeed is not installed. Run: {install} -e '.[deepspeed]'",
    ]
    assert [one.text for one in list(checks.libraries(more, machine()))[1:]] == [
        "vllm is not installed. docs/engines.md says how, or set ppo.engine.name to native",
        f"trackio is not installed. Run: {install} -e '.[trackio]'",
    ]


@pytest.mark.parametrize(
    ("key", "tracking", "text"),
    [
        (True, "wandb", "wandb has a key"),
        (False, "wandb", "wandb has no key: it writes offline, and stages say how to sync"),
        (False, "auto", "wandb has no key: it writes offline, and stages say how to sync"),
    ],
)
def test_the_key_of_wandb_is_looked_for(monkeypatch, key, tracking, text):
    monkeypatch.setattr(checks, "key_is_configured", lambda: key)
    found = checks.tracking(of(f"--ppo.tracking={tracking}"), machine())
    assert only(found) == ("good", text)


def test_where_nothing_is_tracked_no_key_is_missed():
    quiet = of(*(f"--{stage}.tracking=none" for stage in ("data", "tokenizer", "report")))
    assert not list(checks.tracking(quiet, machine()))


def test_a_disk_that_is_too_small_is_found(monkeypatch):
    peak = Peak(moment="pass")
    one = Need(stage="sft", peak=peak, base=0.0, room=1.0, seconds=1.0, unit="step", trained=100.0)
    here = machine(is_here=True)
    # the model of 1000 bytes, and three copies of what is trained in each of two points and one
    for free, state in ((1900, "good"), (1899, "wrong")):
        monkeypatch.setattr(
            checks.shutil, "disk_usage", lambda _, free=free: type("Usage", (), {"free": free})
        )
        assert checks.disk(of(), here, [one], copy=1000.0).state == state
    assert checks.disk(of(), machine(), [one], copy=1000.0).state == "unknown"


def test_a_run_folder_that_cannot_be_made_is_found(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    recipe = dataclasses.replace(of(), folder=tmp_path / "file" / "run")
    found = checks.disk(recipe, machine(is_here=True), [], copy=1000.0)
    assert (found.state, "file is no folder. Choose another" in found.text) == ("wrong", True)
    monkeypatch.setattr(checks.os, "access", lambda *_: False)
    recipe = dataclasses.replace(of(), folder=tmp_path / "run")
    found = checks.disk(recipe, machine(is_here=True), [], copy=1000.0)
    assert found.text == f"disk: {tmp_path} is not writable. Choose another one with RUN="


def test_ppo_keeps_its_critic_and_the_policy_that_a_guard_likes_best():
    one = Need(
        stage="ppo", peak=Peak(moment="text"), base=0.0, room=1.0, seconds=1.0, unit="update"
    )
    for every, size in ((0, 2), (1, 3)):
        recipe = of(f"--ppo.guard.every={every}")
        assert f" {size}.0 GB" in checks.disk(recipe, machine(), [one], copy=1e9).text


def test_the_hubs_model_is_held_against_the_recipe(tmp_path):
    from transformers import LlamaConfig

    LlamaConfig(hidden_size=64).save_pretrained(tmp_path)
    words = [f"--pretrain.init_from={tmp_path}", "--pretrain.architecture.model_type=llama"]
    for width, state in ((64, "good"), (65, "wrong")):
        given = of(*words, f'--pretrain.architecture.options={{"hidden_size": {width}}}')
        assert only(checks.architecture(given, machine()))[0] == state


def test_a_model_that_is_not_reached_is_believed_or_refused(monkeypatch):
    monkeypatch.setattr(recipe, "config_folder", lambda init_from: None)
    assert only(checks.architecture(of(name="pythia-1b-tldr"), machine()))[0] == "unknown"
    unknown = of("--pretrain.architecture.options={}", name="pythia-1b-tldr")
    with pytest.raises(
        UserError, match="is not reached from here. Say in its section architecture"
    ):
        unknown.blueprint(packs=True)


def test_an_unknown_architecture_is_refused():
    with pytest.raises(UserError, match="architecture.model_type: 'nonsense' unknown"):
        of("--pretrain.architecture.model_type=nonsense").blueprint(packs=True)


@pytest.mark.parametrize("init_from", ["", "package:a==1/b.gguf", "model.gguf", "/none/of/it"])
def test_what_is_no_model_on_the_hub_is_not_asked_for(init_from):
    assert recipe.config_folder(init_from) is None


def test_a_pinned_models_configuration_is_looked_for_at_its_commit(monkeypatch, tmp_path):
    asked = []

    def cached(*words, **more):
        asked.append((*words, more))
        return str(tmp_path / "config.json")

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", cached)
    assert recipe.config_folder("owner/pinned@0123abc") == tmp_path
    assert asked == [("owner/pinned", "config.json", {"revision": "0123abc"})]


def test_the_vocabulary_is_the_tokenizers_or_the_most_it_may_have(run):
    assert of().vocabulary() == 512
    assert of(run=run).vocabulary() <= 300
