"""The evaluate stage on one base: the figures of the merged folders, and what is refused."""

import importlib.util
import json
import shutil

import pytest
import torch

from pipeline.checkpoint import open_artifact
from pipeline.evaluation import judge
from pipeline.evaluation.loading import Loader, base_of
from pipeline.lora import ADAPTER
from pipeline.models import load_tokenizer
from stages.evaluate import PARENTS, main
from tests.evaluation.fake_chain import AdaptedChainConfig, FourBitChainConfig, make_chain

SMALL = [
    "--recipe=smoke",
    "--tracking=none",
    "--threads=2",
    "--num_prompts=12",
    "--batch_size=4",
    "--bootstrap_samples=100",
]
ON_ONE_BASE = "--on_one_base=true"


def made(tmp_path_factory, kind):
    return make_chain(tmp_path_factory.mktemp("runs") / "adapted", kind_of_config=kind)


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    return made(tmp_path_factory, AdaptedChainConfig)


@pytest.fixture(scope="module")
def merged(chain):
    """The evaluation of the models that the folders hold."""
    assert main([f"--run={chain}", *SMALL]) == 0
    found = results_of(chain), records_of(chain)
    shutil.rmtree(chain / "evaluate")
    return found


def copy(chain, tmp_path):
    return shutil.copytree(chain, tmp_path / "run", ignore=shutil.ignore_patterns("evaluate"))


def results_of(run):
    return json.loads((run / "evaluate" / "results.json").read_text())


def records_of(run):
    return list(map(json.loads, (run / "evaluate" / "samples.jsonl").read_text().splitlines()))


def parents_of(run):
    return {name: open_artifact(run / name, kind=kind) for name, kind in PARENTS.items()}


def numbers(results):
    """All numbers of nested results by their places."""
    if isinstance(results, dict):
        results = list(results.items())
    elif isinstance(results, list):
        results = list(enumerate(results))
    else:
        return {"": results} if isinstance(results, int | float) else {}
    return {f"{key}.{k}": v for key, value in results for k, v in numbers(value).items()}


def test_adapters_on_one_base_have_the_figures_of_the_merged_models(merged, chain, tmp_path):
    results, records = merged
    run = copy(chain, tmp_path)
    assert main([f"--run={run}", *SMALL, ON_ONE_BASE]) == 0
    shared = results_of(run)
    assert shared.pop("on_one_base") == "none"
    assert "on_one_base" not in results
    assert results["comparison"]["kl"]["value"] > 0.1
    assert results["alignment_tax"]["ratio"] != pytest.approx(1, abs=1e-3)
    for ours, theirs in zip(records_of(run), records, strict=True):
        assert ours["sft"]["text"] == theirs["sft"]["text"]
        assert ours["ppo"]["text"] == theirs["ppo"]["text"]
        assert [one["text"] for one in ours["draws"]] == [one["text"] for one in theirs["draws"]]
        assert ours["kl"] == pytest.approx(theirs["kl"], abs=1e-4)
    assert numbers(shared) == pytest.approx(numbers(results), abs=1e-4, rel=1e-3)
    card = (run / "evaluate" / "README.md").read_text()
    assert "reward model were read as adapters on one base." in card
    assert open_artifact(run / "evaluate", kind="report").config["on_one_base"] is True


def test_without_the_setting_nothing_tells_of_it(merged, chain, tmp_path):
    run = copy(chain, tmp_path)
    assert main([f"--run={run}", *SMALL]) == 0
    assert results_of(run) == merged[0]
    assert "one base" not in (run / "evaluate" / "README.md").read_text()


def test_roles_on_one_base_are_not_read_side_by_side(chain, monkeypatch):
    """Each pass switches what all threads read by."""
    seen = []

    def noted(*args, batching, **named):
        seen.append(batching.workers)
        return divergence(*args, batching=batching, **named)

    divergence = judge.divergence
    monkeypatch.setattr(judge, "divergence", noted)
    parents = parents_of(chain)
    tokenizer = load_tokenizer(chain / "sft")
    prompts = judge.Prompts(rows=[0], texts=["love"], groups=["a"], tokens=[[5, 6]])
    sampling = judge.Sampling(seed=1, max_response_tokens=4, workers=2)
    for lora in (None, base_of(parents["ppo"], parents["reward"])):
        policies = Loader(
            parents=parents, policy=parents["ppo"].path, device=torch.device("cpu"), lora=lora
        ).policies(tokenizer)
        judge.converse(policies, prompts=prompts, sampling=sampling, draws=0, draw_rows=[])
    assert seen == [2, 1]


def test_in_4_bits_everything_is_read_and_nothing_says_the_same(tmp_path_factory):
    pytest.importorskip("bitsandbytes", reason="the extra qlora is not installed")
    run = made(tmp_path_factory, FourBitChainConfig)
    assert main([f"--run={run}", *SMALL]) == 0
    whole = results_of(run)
    shutil.rmtree(run / "evaluate")
    assert main([f"--run={run}", *SMALL, ON_ONE_BASE]) == 0
    packed = results_of(run)
    assert packed["on_one_base"] == "4bit"
    assert "in 4 bits as the pretrained model was" in (run / "evaluate" / "README.md").read_text()
    for of in ("alignment_tax", "comparison", "policies"):
        assert numbers(packed[of]).keys() == numbers(whole[of]).keys()
        assert numbers(packed[of]) != numbers(whole[of])
    for name in ("sft", "ppo"):
        assert packed["alignment_tax"][name] == pytest.approx(whole["alignment_tax"][name], rel=0.2)
        assert packed["alignment_tax"][name] != whole["alignment_tax"][name]


def test_in_4_bits_every_model_is(tmp_path_factory):
    pytest.importorskip("bitsandbytes", reason="the extra qlora is not installed")
    run = made(tmp_path_factory, FourBitChainConfig)
    parents = parents_of(run)
    lora = base_of(parents["ppo"], parents["reward"])
    models = Loader(
        parents=parents, policy=parents["ppo"].path, device=torch.device("cpu"), lora=lora
    )
    base = models.policies(load_tokenizer(run / "sft")).ppo.base.model
    layers = base.model.layers, models.pretrained().model.layers, models.reward_model().model.layers
    adapted, plain, scoring = (stack[0].self_attn.q_proj for stack in layers)
    for layer in (adapted.base_layer, plain, scoring.base_layer):
        assert layer.weight.dtype == torch.uint8
    assert set(adapted.lora_A) == {"policy"}
    assert set(scoring.lora_A) == {"default"}


def complaint(caplog, *words):
    """The one line a mistake is told in."""
    caplog.clear()
    assert main(list(words)) == 2
    return caplog.records[-1].getMessage()


def test_models_that_were_not_trained_on_one_base_are_refused(tmp_path, caplog):
    run = make_chain(tmp_path / "run")
    told = complaint(caplog, f"--run={run}", *SMALL, ON_ONE_BASE)
    assert "ppo was trained with roles separate, not lora. Set it to false" in told
    assert not (run / "evaluate").exists()


def test_a_reward_model_without_an_adapter_is_refused(chain, tmp_path, caplog, monkeypatch):
    run = copy(chain, tmp_path)
    shutil.rmtree(run / "reward" / ADAPTER)
    monkeypatch.setattr("stages.evaluate.open_artifact", unverified)
    told = complaint(caplog, f"--run={run}", *SMALL, ON_ONE_BASE)
    assert f"on_one_base: there is no {run / 'reward' / ADAPTER}. Set it to false" in told


def unverified(path, *, kind):
    from pipeline.checkpoint import Artifact
    from pipeline.manifest import read_manifest

    return Artifact(path, read_manifest(path))


def test_4_bits_without_their_library_are_refused(tmp_path_factory, caplog, monkeypatch):
    run = made(tmp_path_factory, FourBitChainConfig)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    told = complaint(caplog, f"--run={run}", *SMALL, ON_ONE_BASE)
    assert "on_one_base: 4bit needs bitsandbytes, which is missing; set it to false" in told
    assert not (run / "evaluate").exists()
