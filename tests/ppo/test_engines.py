"""Engines: what samples, when it gets the weights, and that its mismatch enters the update."""

import dataclasses
import math
import os
import sys

import pytest
import torch

from pipeline.errors import UserError
from pipeline.lora import LoRA
from pipeline.models import load_causal_lm
from pipeline.ppo.engine_settings import Engine, check_engine
from pipeline.ppo.engines import NativeEngine, corrected
from pipeline.ppo.passes import Crew, Job, Microbatch
from pipeline.ppo.rollout import ENGINE_LOGPROBS, Sampled, generate
from pipeline.ppo.settings import KL, Optimisation
from pipeline.ppo.sharing import whole_weights
from pipeline.ppo.vllm_engines import ColocatedEngine, ServerEngine, check_engine_is_there
from stages.ppo import Config
from tests.ppo.fake_vllm import FakeServer, write_package
from tests.ppo.worlds import EOS, PAD, TARGET, disturb, parents, trainer, weights
from tests.support import assert_close, tiny_llama

SMALL = {
    "prompts_per_update": 4,
    "minibatch_size": 4,
    "optimisation": Optimisation(learning_rate=3e-3, value_learning_rate=3e-3, epochs=1),
}


class Leaning:
    """An engine whose logits lean towards one token: what it says of itself is known exactly."""

    def __init__(self, ppo, lean: float) -> None:
        self.ppo, self.lean, self.synchronised = ppo, lean, 0
        self.config, self.device = ppo.roles.policy.config, ppo.roles.policy.device

    def synchronise(self) -> None:
        self.synchronised += 1

    def sample(self, prompts, *, uniforms) -> Sampled:
        made = generate(self, prompts, uniforms=uniforms, eos_id=EOS, pad_id=PAD)
        return Sampled(made.responses, {ENGINE_LOGPROBS: made.figures["logprobs"]})

    def __call__(self, **inputs):
        output = self.ppo.roles.policy(**inputs)
        output.logits[..., TARGET] += self.lean
        return output


def leaning(lean: float, *, engine: Engine | None = None, **changes):
    ppo = trainer(engine=engine or Engine(), **(SMALL | changes))
    ppo.engine = Leaning(ppo, lean)
    return ppo


def test_an_engine_that_is_the_policy_changes_nothing_but_what_is_logged():
    ours, theirs = trainer(double=True, **SMALL), leaning(0.0, double=True)
    plain, logged = ours.update(0).metrics, theirs.update(0).metrics
    assert_close(weights(theirs), weights(ours), tolerance=1e-9)
    assert set(logged) - set(plain) == {
        "engine/kl", "engine/gap_mean", "engine/gap_max", "engine/weight_mean",
        "engine/capped_frac", "engine/effective_frac",
    }  # fmt: skip
    assert logged["engine/gap_max"] < 1e-9
    assert logged["engine/weight_mean"] == pytest.approx(1.0)


def test_the_known_mismatch_is_measured():
    """By hand: log q / pi = lean [token = TARGET] - log E_pi[exp(lean [token = TARGET])]."""
    ppo = leaning(0.5, double=True)
    outcome = ppo.update(0)
    experience, mask = outcome.experience, outcome.experience.mask
    gap = (experience.engine_logprobs - experience.logprobs)[mask]
    rows = zip(experience.prompts, experience.responses, strict=True)
    reference, expected = ppo.roles.reference, []
    for prompt, response in rows:
        logits = reference(input_ids=torch.tensor([prompt + response])).logits[0]
        share = logits[len(prompt) - 1 : -1].softmax(dim=1)[:, TARGET]
        hit = (torch.tensor(response) == TARGET).double()
        expected.append(0.5 * hit - (1 + share * (math.exp(0.5) - 1)).log())
    expected = torch.cat(expected).detach()
    assert_close(gap, expected, tolerance=1e-9)
    assert outcome.metrics["engine/kl"] == pytest.approx(float(expected.mean()))
    assert outcome.metrics["engine/weight_mean"] == pytest.approx(
        float((-expected).exp().clamp(max=2.0).mean())
    )


def test_the_correction_enters_the_update_unless_it_is_off():
    ends = {
        tis: weights(run)
        for tis in ("token", "sequence", "none")
        if (run := leaning(0.5, engine=Engine(tis=tis), double=True)).update(0)
    }
    for one, other in (("token", "sequence"), ("token", "none"), ("sequence", "none")):
        assert (ends[one] - ends[other]).norm() > 1e-4


@pytest.mark.parametrize("penalty", ["k1_in_reward", "k3_in_loss"])
def test_the_weights_multiply_the_advantages_of_their_tokens(penalty):
    """With the penalty in the reward that is all they do; one in the loss is weighed itself."""
    ppo = leaning(0.5, engine=Engine(tis="sequence"), double=True, kl=KL(penalty=penalty))
    prompts = [ppo.prompts[row] for row in ppo.prompt_rows(0)]
    experience = ppo.measure(prompts, ppo.sample(prompts, update=0))
    shifted = dataclasses.replace(experience, ref_logprobs=experience.ref_logprobs - 0.1)
    lesson, _ = corrected(ppo.estimate(shifted, experience.kl + 1.0), ppo.settings.engine)
    multiplied = dataclasses.replace(
        lesson, advantages=lesson.advantages * lesson.weights, weights=None
    )
    found = [policy_gradient(ppo, one) for one in (lesson, multiplied)]
    same = torch.allclose(*found, rtol=1e-9, atol=1e-12)
    assert same == (penalty == "k1_in_reward")


def policy_gradient(ppo, lesson) -> torch.Tensor:
    rows = torch.arange(len(lesson.experience.prompts))
    micro = Microbatch.of(lesson, rows, roles=ppo.roles, pad_id=PAD)
    Crew(ppo.roles, ppo.settings).backward([Job("policy", micro, 10, ["policy"])])
    parameters = list(ppo.roles.policy.parameters())
    gradient = torch.cat([p.grad.flatten() for p in parameters])
    for parameter in parameters:
        parameter.grad = None
    return gradient


def test_weights_are_synchronised_before_the_first_rollout_and_after_every_change(tmp_path):
    ppo = leaning(0.1)
    ppo.sample(ppo.prompts[:2], update=0, name="validation")
    ppo.update(0)
    assert ppo.engine.synchronised == 1  # nothing had moved between the two
    ppo.sample(ppo.prompts[:2], update=0, name="validation")
    ppo.sample(ppo.prompts[:2], update=0, name="validation")
    assert ppo.engine.synchronised == 2
    ppo.save(tmp_path)
    ppo.load(tmp_path, step=1)
    ppo.update(1)
    assert ppo.engine.synchronised == 3


def test_a_run_with_an_engine_resumes_exactly_where_the_engine_draws_by_our_numbers(tmp_path):
    straight, resumed = leaning(0.3), leaning(0.3)
    straight.update(0)
    straight.save(tmp_path)
    straight.update(1)
    resumed.load(tmp_path, step=1)
    resumed.update(1)
    assert torch.equal(weights(resumed), weights(straight))


def test_an_update_left_between_two_steps_keeps_what_the_engine_said(tmp_path):
    """What it samples now would be other rows, so only the rollout that was kept can go on."""
    rates = dataclasses.replace(SMALL["optimisation"], epochs=3)
    straight, left, resumed = (leaning(0.3, optimisation=rates) for _ in range(3))
    straight.update(0)
    answers = iter([True, False])
    assert left.update(0, goes_on=lambda: next(answers)) is None
    left.save(tmp_path)
    resumed.load(tmp_path, step=1)
    resumed.engine.lean = 6.0
    metrics = resumed.update(0).metrics
    assert metrics["engine/gap_max"] > 0
    assert torch.equal(weights(resumed), weights(straight))


@pytest.mark.parametrize("broken", [6.0, float("nan")])
def test_an_engine_with_other_weights_is_noticed_before_anything_moves(broken):
    ppo = leaning(broken)
    before = weights(ppo)
    with pytest.raises(UserError, match="update 0: the engine and the policy differ by"):
        ppo.update(0)
    assert torch.equal(weights(ppo), before)


def test_the_native_engine_is_the_default():
    ppo = trainer()
    assert isinstance(ppo.engine, NativeEngine)
    assert ppo.update(0).experience.engine_logprobs is None


@pytest.fixture
def server():
    made = FakeServer(tiny_llama(seed=99))  # other weights than any policy
    yield made
    made.close()


def served(server, tmp_path, **changes):
    engine = Engine(name="vllm_server", server_url=server.url, weights_dir=str(tmp_path / "w"))
    return trainer(engine=engine, longest=20, **SMALL, **changes)


@pytest.mark.parametrize("sharing", ["separate", "lora"])
def test_a_server_samples_with_the_weights_of_every_update(server, tmp_path, sharing):
    ppo = served(server, tmp_path, temperature=0.8, sharing=sharing)
    gaps = [ppo.update(number).metrics["engine/gap_max"] for number in range(2)]
    assert max(gaps) < 1e-4
    assert server.asked[:2] == ["/v1/models", "/server_info?config_format=json"]
    assert server.asked[2:] == ["/collective_rpc", "/reset_prefix_cache", "/v1/completions"] * 2
    assert [p.name for p in (tmp_path / "w").iterdir()] == ["model.safetensors"]


def test_a_server_without_the_new_weights_is_noticed(server, tmp_path, monkeypatch):
    ppo = served(server, tmp_path)
    monkeypatch.setattr(server, "load", lambda folder: None)
    with pytest.raises(UserError, match="it has other weights, or changes what it samples from"):
        ppo.update(0)


def test_what_a_server_lacks_is_said_in_one_line(server, tmp_path):
    server.config["logprobs_mode"] = "raw_logprobs"
    with pytest.raises(UserError, match="are raw_logprobs; start it with --logprobs-mode proces"):
        served(server, tmp_path)
    server.config.update(logprobs_mode="processed_logprobs", max_model_len=19)
    with pytest.raises(UserError, match="reads 19 tokens, .* start it with --max-model-len 20"):
        served(server, tmp_path)
    server.config["max_model_len"] = 20
    ppo = served(server, tmp_path)
    server.busy = True
    with pytest.raises(UserError, match="engine: the server is busy"):
        ppo.update(0)
    server.busy, server.config["max_model_len"] = False, 9
    with pytest.raises(UserError, match="/v1/completions answers 400: .* maximum context length"):
        ppo.update(0)


def test_a_server_that_would_keep_old_output_weights_is_refused(server, tmp_path):
    """The build for processors packs them once; those of models that tie them stay behind."""
    server.device = "cpu"
    ppo = served(server, tmp_path)
    ppo.roles.policy.config.tie_word_embeddings = True
    with pytest.raises(UserError, match="does not take new output weights that are tied"):
        ServerEngine(ppo.roles.policy, ppo.settings, eos_id=EOS)


def test_an_answer_of_another_form_is_one_line(server, tmp_path, monkeypatch):
    ppo, own = served(server, tmp_path), server.complete
    for broken, message in (
        ({"choices": [{"index": 0}]}, "does not answer as vLLM 0.31 does .KeyError: 'token_ids'"),
        ([], "does not answer as vLLM 0.31 does"),
        ({"choices": own_choices(ppo, own)[:1]}, "4 prompts got 1 responses"),
        ({"choices": without_logprobs(own_choices(ppo, own))}, "or tokens without a log-probab"),
    ):
        monkeypatch.setattr(server, "complete", lambda body, broken=broken: (200, broken))
        with pytest.raises(UserError, match=message):
            ppo.update(0)


def own_choices(ppo, complete) -> list[dict]:
    body = {"model": "tiny", "logprobs": 0, "return_token_ids": True, "temperature": 1.0}
    body |= {"prompt": ppo.prompts[:4], "max_tokens": 8, "stop_token_ids": [EOS]}
    return complete(body)[1]["choices"]


def without_logprobs(choices: list[dict]) -> list[dict]:
    return [{**choice, "logprobs": {"token_logprobs": []}} for choice in choices]


def test_a_server_that_is_not_there(server):
    engine = Engine(name="vllm_server", server_url=server.url, weights_dir="w")
    check_engine_is_there(engine)
    server.close()
    with pytest.raises(UserError, match="engine.server_url: http://127.* does not answer"):
        check_engine_is_there(engine)


def test_colocation_needs_the_package_and_a_gpu(tmp_path, monkeypatch):
    engine = Engine(name="vllm_colocate")
    with pytest.raises(UserError, match="vllm_colocate needs vllm, which is not installed"):
        check_engine_is_there(engine)
    write_package(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="vllm_colocate needs a GPU, and there is none"):
        check_engine_is_there(engine)


@pytest.fixture
def vllm(tmp_path, monkeypatch):
    """The fake package, and TRL's helper read anew beside it; nothing of both stays behind."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setitem(os.environ, name, os.environ.get(name, "0"))
    before = {k: m for k, m in sys.modules.items() if k.split(".")[:2] == ["trl", "generation"]}
    for name in before:
        del sys.modules[name]
    write_package(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    import vllm as package

    yield package
    for name in [n for n in sys.modules if n.split(".")[0] == "vllm" or n.startswith("trl.gener")]:
        del sys.modules[name]
    sys.modules.update(before)


def test_colocated_vllm_that_would_rebuild_the_models_that_train_is_refused(vllm, monkeypatch):
    ppo = trainer(sharing="lora", **SMALL)
    settings = dataclasses.replace(ppo.settings, engine=Engine(name="vllm_colocate"), longest=20)
    monkeypatch.setattr(vllm.Runner, "__module__", "vllm.model_executor.models.transformers.causal")
    with pytest.raises(UserError, match="vLLM has no llama of its own and rebuilds the class"):
        ColocatedEngine(
            ppo.roles.policy, settings, accelerator=ppo.optimiser.accelerator, eos_id=EOS
        )


@pytest.mark.parametrize("sleep", [False, True])
def test_colocated_vllm_samples_with_the_weights_of_every_update(vllm, sleep):
    ppo = trainer(sharing="lora", temperature=0.8, **SMALL)
    engine = Engine(name="vllm_colocate", gpu_memory_frac=0.2, sleep=sleep)
    settings = dataclasses.replace(ppo.settings, engine=engine, longest=20)
    ppo.engine = ColocatedEngine(
        ppo.roles.policy, settings, accelerator=ppo.optimiser.accelerator, eos_id=EOS
    )
    gaps = [ppo.update(number).metrics["engine/gap_max"] for number in range(2)]
    assert max(gaps) < 1e-4
    (llm,) = vllm.MADE
    assert llm.config == {"max_model_len": 20, "memory": 0.2}
    assert llm.calls.count("reset_prefix_cache") == 2
    assert llm.calls.count("sleep 2") == 3 * sleep  # once made, and after each rollout


def test_whole_weights_of_an_adapted_policy_are_those_of_the_merged_model(tmp_path):
    ppo = trainer(sharing="lora")
    disturb(ppo.roles.policy)
    base = [p.clone() for p in ppo.roles.policy.base.model.parameters()]
    whole = dict(whole_weights(ppo.roles.policy))
    ppo.roles.policy.save_pretrained(tmp_path)
    expected = dict(load_causal_lm(tmp_path).named_parameters())
    assert whole.keys() == expected.keys()
    for name, weight in expected.items():
        assert_close(whole[name], weight, tolerance=1e-6)
    moved = load_causal_lm(parents() / "sft")
    assert any(not torch.equal(whole[n], p) for n, p in moved.named_parameters())
    now = ppo.roles.policy.base.model.parameters()
    assert all(torch.equal(before, after) for before, after in zip(base, now, strict=True))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "sglang"}, "engine.name: must be one of native, vllm_colocate, vllm_server"),
        ({"tis": "turn"}, "engine.tis: must be one of token, sequence, none, got 'turn'"),
        ({"tis_cap": 0.5}, "engine.tis_cap: must be at least 1, got 0.5"),
        ({"timeout_seconds": 0.0}, "engine.timeout_seconds: must be positive, got 0.0"),
        ({"gpu_memory_frac": 1.0}, "engine.gpu_memory_frac: must be between 0 and 1, got 1.0"),
        ({"name": "vllm_server"}, "engine.server_url: vllm_server needs it, and no other"),
        ({"weights_dir": "w"}, "engine.weights_dir: vllm_server needs it, and no other"),
        (
            {"name": "vllm_server", "server_url": "host:8000", "weights_dir": "w"},
            "engine.server_url: must begin with http:// or https://, got 'host:8000'",
        ),
    ],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(UserError, match=message):
        Engine(**settings)


def test_four_bits_have_no_whole_weights():
    lora = LoRA(rank=4, quantise="4bit")
    check_engine(Engine(), lora=lora)
    with pytest.raises(UserError, match="vllm_colocate takes whole weights, and lora.quantise"):
        check_engine(Engine(name="vllm_colocate"), lora=lora)


def test_where_an_engine_lies_does_not_change_what_is_made():
    here = Config(engine=Engine(name="vllm_server", server_url="http://a:1", weights_dir="x"))
    there = Config(engine=Engine(name="vllm_server", server_url="http://b:2", weights_dir="y"))
    assert here.content() == there.content()
    assert here.content()["engine"] == {"name": "vllm_server", "tis": "token", "tis_cap": 2.0}
    assert Config().content() != here.content()
