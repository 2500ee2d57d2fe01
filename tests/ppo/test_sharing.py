"""Roles that share weights: they are the models they are written as, and only what should moves."""

import dataclasses

import pytest
import torch
from peft import PeftModel

from pipeline.errors import UserError
from pipeline.lora import LoRA
from pipeline.models import load_causal_lm, load_reward_model, score_responses
from pipeline.ppo.experience import Roles, measure, state_values
from pipeline.ppo.settings import KL
from pipeline.ppo.sharing import share_base
from pipeline.sequences import collate, response_states
from tests.ppo.test_options import RATES
from tests.ppo.worlds import PAD, PROMPTS, disturb, parents, trainer
from tests.support import assert_close

RESPONSES = [[5 + row % 7, *range(4, 4 + row % 5), 1] for row in range(len(PROMPTS))]


def flat(model) -> torch.Tensor:
    return torch.cat([p.detach().flatten().clone() for p in model.parameters()])


def measured(roles: Roles) -> dict[str, torch.Tensor]:
    found = measure(roles, PROMPTS, RESPONSES, temperature=0.8, pad_id=PAD, batch_size=6)
    for row in (row for rows in found.values() for row in rows):
        assert row.untyped_storage().nbytes() == row.nbytes  # nothing else is sent with it
    scores = score_responses(roles.reward_model, PROMPTS, RESPONSES, pad_id=PAD)
    return {**{name: torch.cat(rows) for name, rows in found.items()}, "scores": scores}


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
def test_roles_on_one_base_measure_what_the_models_do_that_they_are_written_as(tmp_path):
    roles = trainer(sharing="lora").roles
    disturb(roles.policy)
    torch.nn.init.normal_(roles.value.score.weight)
    for name, role in (("policy", roles.policy), ("value", roles.value)):
        role.save_pretrained(tmp_path / name)
    sft, reward = parents() / "sft", parents() / "reward"
    apart = Roles(
        policy=load_causal_lm(tmp_path / "policy"),
        reference=load_causal_lm(sft),
        reward_model=load_reward_model(reward),
        value=load_reward_model(tmp_path / "value"),
    )
    ours, theirs = measured(roles), measured(apart)
    for name, values in ours.items():
        assert_close(values, theirs[name], tolerance=1e-4)
    assert float((ours["logprobs"] - ours["ref_logprobs"]).abs().max()) > 0.01
    adapted = PeftModel.from_pretrained(load_causal_lm(sft), tmp_path / "policy" / "adapter")
    ids = torch.tensor([[3, 4, 5, 6]])
    with torch.no_grad():
        assert_close(adapted(ids).logits, apart.policy(ids).logits, tolerance=1e-4)


def test_a_head_on_the_trunk_is_written_as_a_classifier(tmp_path):
    roles = trainer(sharing="trunk").roles
    batch = collate(PROMPTS, RESPONSES, pad_id=PAD)
    states = response_states(roles.policy, batch)
    assert not state_values(roles.value, states).any()  # a new head says 0 everywhere
    torch.nn.init.normal_(roles.value.score.weight)
    roles.value.save_pretrained(tmp_path)
    alone = load_reward_model(tmp_path)
    values = state_values(alone, response_states(alone, batch))
    assert_close(values.detach(), state_values(roles.value, states).detach())


@pytest.mark.parametrize("sharing", ["trunk", "lora"])
def test_the_first_update_starts_at_the_reference_and_moves_what_it_should(sharing):
    ppo = trainer(sharing=sharing)
    roles, names = ppo.roles, ("policy", "value", "reward_model")
    before = {name: flat(getattr(roles, name)) for name in names}
    frozen = measured(dataclasses.replace(roles, policy=roles.reference, value=None))
    metrics = ppo.update(0).metrics
    assert metrics["objective/kl"] == pytest.approx(0.0, abs=1e-6)
    assert metrics["policy/first_approx_kl"] == pytest.approx(0.0, abs=1e-6)
    for name in ("policy", "value"):
        assert not torch.equal(flat(getattr(roles, name)), before[name])
    assert torch.equal(flat(roles.reward_model), before["reward_model"])
    after = measured(dataclasses.replace(roles, policy=roles.reference, value=None))
    assert all(torch.equal(after[name], frozen[name]) for name in ("ref_logprobs", "scores"))


def test_only_adapters_and_heads_are_trained_on_a_shared_base():
    ppo = trainer(sharing="lora")
    trained = {id(p) for model in ppo.optimiser.models.values() for p in model.parameters()}
    ppo.update(0)
    base = ppo.roles.policy.base.model
    for name, parameter in base.named_parameters():
        moves = name.endswith((".policy.weight", ".value.weight"))
        assert (id(parameter) in trained) == moves == parameter.requires_grad, name


@pytest.mark.parametrize("sharing", ["separate", "trunk", "lora"])
def test_the_policy_stands_still_while_the_critic_warms_up(sharing):
    kl = KL(coef=0.1, controller="adaptive", target=0.01, horizon=100.0)
    rates = dataclasses.replace(RATES, critic_warmup=1)
    ppo = trainer(sharing=sharing, kl=kl, optimisation=rates)
    policy, value = flat(ppo.roles.policy), flat(ppo.roles.value)
    ppo.update(0)
    assert torch.equal(flat(ppo.roles.policy), policy)
    assert not torch.equal(flat(ppo.roles.value), value)
    assert ppo.kl.coef == 0.1
    ppo.update(1)
    assert not torch.equal(flat(ppo.roles.policy), policy)
    assert ppo.kl.coef != 0.1


def test_a_reward_model_without_an_adapter_is_refused(tmp_path):
    with pytest.raises(UserError, match="roles: lora needs .*adapter. Set lora.rank in the recipe"):
        share_base(
            parents() / "sft", tmp_path, lora=LoRA(rank=4), seed=0, device="cpu", critic=True
        )
