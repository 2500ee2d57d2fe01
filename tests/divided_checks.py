"""What two real processes that hold models in parts must agree on with whole models (together.py).

Every check runs on both processes at the same time; test_sharding.py reports on each.
"""

import copy
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, TrainingArguments

from pipeline.callbacks import FiniteGradients
from pipeline.distributed import even_share, gather_objects, in_step, is_main, on_main, rank
from pipeline.language_loss import LanguageModelTrainer, mean_nll
from pipeline.optim import build_optimizer
from pipeline.ppo.experience import Roles
from pipeline.ppo.settings import KL, Optimisation
from pipeline.ppo.trainer import PPOTrainer
from pipeline.reward.data import RankingCollator
from pipeline.reward.scores import raw_scores
from pipeline.reward.training import RankingTrainer
from pipeline.sharding import Sharded, layers_of, recompute, whole, whole_tensor
from pipeline.training import Training
from tests.ppo import worlds
from tests.support import assert_close, tiny_llama, tiny_reward_model

CPU = torch.device("cpu")
UNEVEN = {"prompts_per_update": 13, "minibatch_size": 5, "microbatch_size": 2}
"""Seven responses and six; of a minibatch three and two, so two passes and one."""
EVERYTHING = {
    "kl": KL(coef=0.1, controller="fixed", penalty="k3_in_loss", reference_rate=0.3),
    "optimisation": Optimisation(
        learning_rate=3e-3, value_learning_rate=3e-3, epochs=2, max_grad_norm=0.5,
        entropy_coef=0.01, ptx_coef=0.5, critic_warmup=1,
    ),
}  # fmt: skip
WEIGHTS = 1e-5
"""As in test_invariance.py: AdamW's steps of 3e-3, off by a gradient's rounding over epsilon."""


def text() -> Tensor:
    return torch.arange(7 * 6).reshape(7, 6) % 20 + 2


def trainer(*, divides: bool, precision: str = "fp32", again: bool = False, **changes: Any) -> Any:
    """A trainer of tiny models, whole ones or parts of them."""
    ptx = changes.get("optimisation", Optimisation()).ptx_coef > 0
    ppo = worlds.trainer(text=text() if ptx else None, precision=precision, **changes)
    roles = ppo.roles
    if again:
        for model in (roles.policy, roles.value):
            recompute(model)
    if not divides:
        return ppo
    for model in (roles.reference, roles.reward_model):
        model.requires_grad_(False)
    parts = {
        name: Sharded(model, device=CPU, precision=precision) for name, model in vars(roles).items()
    }
    return PPOTrainer(
        Roles(**parts), worlds.PROMPTS, settings=ppo.settings, accelerator=Accelerator(cpu=True),
        eos_id=worlds.EOS, pad_id=worlds.PAD, text=ppo.optimiser.text,
    )  # fmt: skip


def weights(ppo: PPOTrainer) -> Tensor:
    models = [*ppo.optimiser.models.values(), ppo.roles.reference]
    parts = [p.detach() for model in models for p in model.parameters()]
    return torch.cat([whole_tensor(part, CPU).flatten() for part in parts])


def same_course(**changes: Any) -> None:
    """Two updates, of whole models and of parts."""
    ours, theirs = (trainer(divides=divides, **changes) for divides in (True, False))
    assert torch.equal(weights(ours), weights(theirs))
    start = weights(ours)
    for number in range(2):
        found, expected = ours.update(number), theirs.update(number)
        assert found.experience.responses == expected.experience.responses
        if number == 0:
            for name in ("logprobs", "ref_logprobs", "values", "scores"):
                a, b = (getattr(outcome.experience, name) for outcome in (found, expected))
                assert_close(a, b, tolerance=1e-6)
        assert found.metrics.keys() == expected.metrics.keys()
        for name, value in expected.metrics.items():
            assert_close(torch.tensor(found.metrics[name]), value, tolerance=1e-4)
        assert_close(weights(ours), weights(theirs), tolerance=WEIGHTS)
    assert (weights(ours) - start).abs().max() > 0.01
    text_rows = text()
    assert_close(torch.tensor(ours.text_perplexity(text_rows)), theirs.text_perplexity(text_rows))


def check_ppo_takes_the_course_of_whole_models():
    same_course(**UNEVEN)


def check_ppo_with_every_loss_a_warmup_a_moving_reference_and_layers_computed_again():
    same_course(**UNEVEN, **EVERYTHING, again=True)


def check_ppo_of_a_row_more_than_processes():
    same_course(prompts_per_update=3, minibatch_size=1, microbatch_size=1)


def check_a_process_holds_half_of_the_weights_and_of_the_moments():
    ppo = trainer(divides=True)
    ppo.update(0)
    for role in vars(ppo.roles).values():
        held = sum(p.to_local().numel() for p in role.parameters())
        total = sum(p.numel() for p in role.parameters())
        assert abs(held / total - 0.5) < 0.02
    moments = [
        moment
        for optimizer in ppo.optimiser.optimizers.values()
        for of_one in optimizer.state.values()
        for name, moment in of_one.items()
        if name != "step"
    ]
    assert all(isinstance(moment, DTensor) for moment in moments)
    assert len(moments) == 2 * sum(1 for m in ppo.optimiser.models.values() for _ in m.parameters())


def check_in_bf16_weights_are_read_in_it_and_kept_in_float32():
    ppo, read = trainer(divides=True, precision="bf16"), []
    layer = layers_of(ppo.roles.policy.model)[0]
    layer.self_attn.q_proj.register_forward_hook(lambda _, args, out: read.append(out.dtype))
    before = weights(ppo)
    metrics = ppo.update(0).metrics
    assert set(read) == {torch.bfloat16}
    assert {p.dtype for p in ppo.roles.policy.parameters()} == {torch.float32}
    assert all(torch.isfinite(torch.tensor(value)) for value in metrics.values())
    wide = trainer(divides=True)
    wide.update(0)
    moved, wanted = weights(ppo) - before, weights(wide) - before
    assert torch.cosine_similarity(moved, wanted, dim=0) > 0.9


def shared_folder() -> Path:
    return Path(on_main(tempfile.mkdtemp))


def check_a_resume_point_is_the_same_file_and_goes_on_either_way():
    straight, folder = trainer(divides=True, **UNEVEN), shared_folder()
    straight.update(0)
    straight.save(folder)
    gather_objects(None)
    plain = worlds.trainer(**UNEVEN)
    assert {file.name for file in folder.iterdir()} == {
        "policy.safetensors", "value.safetensors", "state.pt"
    }  # fmt: skip
    state = torch.load(folder / "state.pt", weights_only=True)
    assert state.keys() == {*plain.optimiser.state(), "kl", "baseline", "updates", "midway"}
    straight.update(1)
    for divides in (True, False):
        resumed = trainer(divides=divides, **UNEVEN)
        resumed.load(folder, step=straight.settings.steps_per_update)
        resumed.update(1)
        if divides:
            assert torch.equal(weights(resumed), weights(straight))
        assert_close(weights(resumed), weights(straight), tolerance=WEIGHTS)


def check_the_folder_holds_a_whole_model():
    ppo, folder = trainer(divides=True), shared_folder()
    ppo.update(0)
    ppo.roles.policy.save_pretrained(folder)
    gather_objects(None)
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert loaded.config.architectures == ["LlamaForCausalLM"]
    parts = ppo.roles.policy.parameters()
    for found, part in zip(loaded.parameters(), parts, strict=True):
        assert torch.equal(found, whole_tensor(part.detach(), CPU))


def check_a_whole_copy_is_this_processs_own_and_is_freed():
    model = tiny_llama()
    model.config.tie_word_embeddings = True
    model.tie_weights()
    expected, role = copy.deepcopy(model), Sharded(model, device=CPU)
    ids = torch.tensor([[3, 4, 5]])
    with whole(role) as copied:
        assert copied.lm_head.weight is copied.model.embed_tokens.weight
        if is_main():  # the other process makes no pass
            assert torch.equal(copied(input_ids=ids).logits, expected(input_ids=ids).logits)
    assert not any(p.numel() for p in copied.parameters())
    assert_close(role(input_ids=ids).logits, expected(input_ids=ids).logits)


def check_a_whole_copy_is_gathered_as_products_read_it():
    for tied in (False, True):
        model = tiny_llama()
        if tied:
            model.lm_head.weight = model.model.embed_tokens.weight
        expected, role = copy.deepcopy(model), Sharded(model, device=CPU, precision="bf16")
        ids = torch.tensor([[3, 4, 5]])
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), whole(role) as copied:
            types = {name: weight.dtype for name, weight in copied.named_parameters()}
            assert types["model.layers.0.mlp.up_proj.weight"] == torch.bfloat16
            assert types["model.embed_tokens.weight"] == torch.float32
            assert types.get("lm_head.weight") == (None if tied else torch.bfloat16)
            assert torch.equal(copied(input_ids=ids).logits, expected(input_ids=ids).logits)


def wrapped(model: Any) -> Any:
    """A model as Accelerate divides it: gradients are means over processes."""
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, reshard_after_forward=True, cpu_ram_efficient_loading=False,
        auto_wrap_policy="transformer_based_wrap", state_dict_type="FULL_STATE_DICT",
    )  # fmt: skip
    state = SimpleNamespace(fsdp_plugin=plugin)
    return fsdp2_prepare_model(SimpleNamespace(state=state, mixed_precision="no"), model)


def check_validation_makes_as_many_passes_on_every_process():
    plain, divided = tiny_llama(), wrapped(tiny_llama())
    batches = [
        {"input_ids": ids, "labels": ids.masked_fill(ids % 3 == 0, -100)}
        for ids in (torch.arange(12).reshape(2, 6) % 20 + 2 + n for n in range(3))
    ]
    total, count = 0.0, 0
    for batch in batches:
        logprobs = plain(batch["input_ids"]).logits[:, :-1].detach().log_softmax(dim=-1)
        targets = batch["labels"][:, 1:]
        chosen = logprobs.gather(2, targets.clamp(min=0)[:, :, None])[:, :, 0]
        total -= float(chosen[targets != -100].sum())
        count += int((targets != -100).sum())
    loss, tokens = mean_nll(divided, batches)
    assert tokens == count
    assert_close(torch.tensor(loss), total / count)
    assert_close(torch.tensor(mean_nll(divided, batches[:1])[0]), mean_nll(plain, batches[:1])[0])


def check_scoring_makes_as_many_passes_on_every_process():
    plain, divided = tiny_reward_model(), wrapped(tiny_reward_model())
    texts = [[2 + n % 7] * (n % 4 + 1) for n in range(9)]
    expected = raw_scores(plain, texts, pad_id=0, batch_size=3)
    found = raw_scores(divided, texts, pad_id=0, batch_size=3)
    assert_close(torch.tensor(found), expected, tolerance=1e-5)


def same_gradients(divided: Any, plain: Any) -> None:
    """The divided model's gradients are those of the whole one, which saw all processes' rows."""
    for (name, ours), theirs in zip(divided.named_parameters(), plain.parameters(), strict=True):
        assert theirs.grad.any(), name
        assert_close(whole_tensor(ours.grad, CPU), theirs.grad, tolerance=1e-5)


def arguments() -> TrainingArguments:
    return TrainingArguments(
        tempfile.mkdtemp(), use_cpu=True, report_to="none", label_smoothing_factor=0.1
    )


def check_the_language_models_loss_and_gradients():
    divided, plain = wrapped(tiny_llama()), tiny_llama()
    ours, theirs = (
        LanguageModelTrainer(language_model=model, model=model, args=arguments())
        for model in (divided, plain)
    )
    assert ours.plain_head
    rows = [torch.arange(18).reshape(3, 6) % 20 + 2, torch.arange(10).reshape(2, 5) % 19 + 3]
    batches = [{"input_ids": ids, "labels": ids.masked_fill(ids % 5 == 0, -100)} for ids in rows]
    count = torch.tensor(sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches))
    ours.accelerator.state._shared_state["num_processes"] = 2
    mine = ours.compute_loss(divided, batches[rank()], num_items_in_batch=count)
    mine.backward()
    for batch in batches:
        logits = plain(batch["input_ids"]).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum",
            label_smoothing=0.1,
        ) / count  # fmt: skip
        loss.backward()
    same_gradients(divided, plain)
    assert theirs.plain_head
    FiniteGradients().on_pre_optimizer_step(None, None, None, model=divided)


def check_muon_moves_divided_matrices_as_whole_ones():
    divided, plain = wrapped(tiny_llama()), tiny_llama()
    training = Training(optimizer="muon", weight_decay=0.1, precision="fp32")
    ids = torch.arange(18).reshape(3, 6) % 20 + 2
    for model in (divided, plain):
        optimizer = build_optimizer(model, training)
        for _ in range(3):
            logits = model(ids).logits[:, :-1]
            torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
            optimizer.step()
            optimizer.zero_grad()
    untrained = dict(tiny_llama().named_parameters())
    for (name, ours), theirs in zip(divided.named_parameters(), plain.parameters(), strict=True):
        assert not torch.equal(theirs, untrained[name]), name
        assert_close(whole_tensor(ours.detach(), CPU), theirs.detach(), tolerance=WEIGHTS)


def rankings() -> list[list[dict[str, Any]]]:
    """The rows of two processes: two texts for the first, 40 for the second."""

    def row(count: int) -> dict[str, Any]:
        texts = [[2, 3, *range(4, 6 + n % 9), 1] for n in range(count)]
        return {
            "sequences": texts,
            "starts": [2] * count,
            "better": torch.arange(1, count),
            "worse": torch.arange(count - 1),
            "targets": torch.ones(count - 1),
        }

    return [[row(2)], [row(40)]]


def same_ranking_loss(*, packed: bool) -> None:
    divided, plain = wrapped(tiny_reward_model()), tiny_reward_model()
    trainer = RankingTrainer(model=divided, args=arguments())
    collate = RankingCollator(pad_id=0, packed=packed)
    batches = [collate(rows) for rows in rankings()]
    count = sum(len(batch["labels"]) for batch in batches)
    mine = trainer.compute_loss(divided, batches[rank()], num_items_in_batch=count)
    mine.backward()
    total = torch.zeros(())
    for rows in rankings():
        for one in rows:
            scores = torch.stack(
                [plain(input_ids=torch.tensor([ids])).logits[0, 0] for ids in one["sequences"]]
            )
            margins = scores[one["better"]] - scores[one["worse"]]
            total = total - torch.nn.functional.logsigmoid(margins).sum() / count
    total.backward()
    assert_close(torch.tensor(sum(gather_objects(float(mine)))) / 2, float(total))
    same_gradients(divided, plain)


def check_the_rankings_loss_and_gradients_of_packed_texts():
    same_ranking_loss(packed=True)


def check_the_rankings_loss_and_gradients_of_uneven_numbers_of_chunks():
    same_ranking_loss(packed=False)


def check_work_is_dealt_and_filled_up():
    assert even_share(list("abcde")) == (["a", "c", "e"] if is_main() else ["b", "d", "a"])
    assert even_share([]) == []
    assert in_step(["x", "y", "z"][: 1 + 2 * rank()]) == (
        ["x", "x", "x"] if is_main() else ["x", "y", "z"]
    )
