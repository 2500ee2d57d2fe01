"""Rehearsals: sizes by hand, and what two depths say of a third."""

import dataclasses

import pytest
import torch

from pipeline.doctor.blueprint import PACKED_BYTES, Blueprint
from pipeline.doctor.evaluating import rehearse_policies, rehearse_scoring
from pipeline.doctor.ledger import Ledger
from pipeline.doctor.machine import Rates
from pipeline.doctor.rehearsal import (
    Passes,
    Replies,
    rankings,
    rehearse_generation,
    rehearse_language_model,
    rehearse_ppo,
    rehearse_reward,
    training_rows,
)
from pipeline.lora import LoRA
from pipeline.ppo.settings import KL, Advantage, Optimisation, Reward, Settings
from pipeline.reward.scores import PASS_TOKENS
from pipeline.training import Training

pytestmark = pytest.mark.usefixtures("unchecked")

WIDTH, INNER, WORDS, HEADS = 32, 64, 300, 4
LAYER = 4 * WIDTH * WIDTH + 3 * WIDTH * INNER + 2 * WIDTH
OUTSIDE = 2 * WORDS * WIDTH + WIDTH  # embeddings, head, last norm
BLUEPRINT = Blueprint(
    model_type="llama",
    options={
        "vocab_size": WORDS,
        "hidden_size": WIDTH,
        "intermediate_size": INNER,
        "num_hidden_layers": 3,
        "num_attention_heads": HEADS,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
    },
    packs=True,
)
TRAINING = Training(minibatch_size=4, microbatch_size=2)
BUFFERS = 2 * 4 * WIDTH // HEADS // 2
"""Bytes of a Llama's rotary frequencies, kept twice."""


def ledger() -> Ledger:
    return Ledger(Rates(fp32_flops=1e9, bf16_flops=1e9, bandwidth=1e9))


NO_LORA = LoRA()
PLAIN = Passes()


def language_model(blueprint, lora=NO_LORA, passes=PLAIN):
    batch = training_rows(2, 16)
    return rehearse_language_model(
        blueprint, ledger(), training=TRAINING, lora=lora, batch=batch, passes=passes
    )


def test_a_language_model_is_four_copies_of_its_weights_and_what_a_pass_holds():
    seen = language_model(BLUEPRINT)
    weights = 4 * (3 * LAYER + OUTSIDE)
    assert seen.weights == weights + BUFFERS
    assert seen.gradients == weights
    assert seen.optimizer == pytest.approx(2 * weights, abs=500)  # and a count of steps each
    held = seen.weights + seen.gradients + seen.optimizer
    assert held < seen.moments["pass"].most < held + 1e6
    # 2 rows of 16 tokens through every matrix, forward once and backward twice; the head, whose
    # loss is computed with its gradient, meets 30 of them: the first token has no target
    matrices = 3 * (LAYER - 2 * WIDTH)
    attention = 3 * (2 + 5) * 2 * 2 * HEADS * 16 * 16 * (WIDTH // HEADS)
    flops = 6 * (matrices * 32 + WORDS * WIDTH * 30) + attention
    assert seen.moments["pass"].flops == pytest.approx(flops, rel=0.01)


def test_two_depths_say_what_five_layers_take():
    two, three, direct = (language_model(BLUEPRINT.of_depth(depth)) for depth in (2, 3, 5))
    drawn = two.at(5, three)
    assert drawn.weights == direct.weights
    assert drawn.optimizer == direct.optimizer
    for name, moment in direct.moments.items():
        assert dataclasses.astuple(drawn.moments[name]) == pytest.approx(
            dataclasses.astuple(moment), rel=1e-3
        )
    assert drawn.gathered == 4 * (2 * LAYER + OUTSIDE) + BUFFERS


def test_adapters_train_little_and_four_bits_weigh_an_eighth():
    lora = language_model(BLUEPRINT, LoRA(rank=2))
    per_layer = 2 * (4 * 2 * WIDTH + 3 * (WIDTH + INNER))  # rank 2, four square matrices and three
    assert lora.gradients == 4 * 3 * per_layer
    packed = language_model(BLUEPRINT, LoRA(rank=2, quantise="4bit"))
    matrices = 3 * (LAYER - 2 * WIDTH)
    saved = (4 - PACKED_BYTES) * matrices
    assert lora.weights - packed.weights == pytest.approx(saved, abs=25)


def test_gradients_that_are_there_already_count():
    fresh, added = (
        language_model(BLUEPRINT, passes=Passes(adds_up=adds)) for adds in (False, True)
    )
    assert added.moments["pass"].most > fresh.moments["pass"].most


@pytest.mark.parametrize("packed", [True, False])
def test_reward_scores_every_text_of_a_ranking(packed):
    batch = rankings(rows=1, texts=6, prompt=4, length=12, packed=packed)
    seen = rehearse_reward(
        BLUEPRINT, ledger(), training=TRAINING, lora=LoRA(), batch=batch, dropout=0.1, passes=PLAIN
    )
    body = 3 * LAYER + WORDS * WIDTH + WIDTH
    assert seen.gradients == 4 * (body + WIDTH)
    assert {"pass", "step", "validation"} == set(seen.moments)


def test_the_cache_of_a_generation_grows_with_the_reply():
    def last(response):
        replies = Replies(rows=4, prompt=8, response=response)
        return rehearse_generation(BLUEPRINT, ledger(), replies).moments["last token"].most

    # keys and values of 3 layers, 4 rows, 10 positions more, and what one step reads of them
    more = 2 * 3 * 4 * 10 * WIDTH * 4
    assert more <= last(30) - last(20) <= 2 * more


def settings(**more) -> Settings:
    return Settings(
        **{
            "seed": 0, "updates": 1, "prompts_per_update": 4, "minibatch_size": 4,
            "microbatch_size": 2, "max_response_tokens": 6, "temperature": 1.0,
            "precision": "fp32", "workers": 1, "kl": KL(), "reward": Reward(),
            "advantage": Advantage(), "optimisation": Optimisation(epochs=1),
        } | more
    )  # fmt: skip


def ppo(roles, precision="fp32", *, layers=1, divided=False):
    return rehearse_ppo(
        BLUEPRINT.of_depth(layers),
        ledger(),
        settings=settings(precision=precision),
        roles=roles,
        loras=(LoRA(rank=2), LoRA(rank=2)),
        replies=Replies(rows=4, prompt=8, response=6),
        divided=divided,
    )


def test_four_roles_are_four_models_or_three_or_one():
    apart, trunk, lora = (ppo(roles) for roles in ("separate", "trunk", "lora"))
    whole = 4 * (LAYER + OUTSIDE)
    scorer = 4 * (LAYER + WORDS * WIDTH + WIDTH + WIDTH)
    assert [role.trained for role in apart.roles.values()] == [whole, 0, 0, scorer]
    assert apart.weights == 2 * whole + 2 * scorer + 4 * BUFFERS
    assert trunk.weights == 2 * whole + scorer + 4 * WIDTH + 3 * BUFFERS
    adapter = 4 * 2 * (4 * 2 * WIDTH + 3 * (WIDTH + INNER))
    assert lora.weights == whole + BUFFERS + 3 * adapter + 2 * 4 * WIDTH
    assert lora.gradients == 2 * adapter + 4 * WIDTH
    assert lora.roles["reference"].weights == 0


def test_of_four_roles_the_largest_is_gathered_at_a_time():
    two, three = (ppo("separate", layers=layers) for layers in (2, 3))
    assert two.at(9, three).gathered == 4 * (2 * LAYER + OUTSIDE) + BUFFERS


def test_the_step_is_no_part_of_the_passes_before_it():
    one = {"prompts_per_update": 1, "minibatch_size": 1, "microbatch_size": 1}
    seen = rehearse_ppo(
        dataclasses.replace(BLUEPRINT.of_depth(4), packs=False),  # a GPU's optimizer
        ledger(),
        settings=settings(**one),
        roles="separate",
        loras=(LoRA(), LoRA()),
        replies=Replies(rows=1, prompt=2, response=2),
    )
    held, policy = seen.weights + seen.gradients + seen.optimizer, 4 * (4 * LAYER + OUTSIDE)
    assert seen.moments["step"].most >= held + policy  # roots of all its second moments
    assert seen.moments["optimise"].most < held + policy / 2
    assert seen.moments["optimise"].seconds > 0


@pytest.mark.parametrize("roles", ["separate", "lora"])
def test_what_replies_in_bfloat16_holds_its_products_in_it_once(roles):
    wide, narrow = (ppo(roles, precision) for precision in ("fp32", "bf16"))
    products = LAYER - 2 * WIDTH + WORDS * WIDTH
    adapters = 3 * 2 * (4 * 2 * WIDTH + 3 * (WIDTH + INNER)) if roles == "lora" else 0
    assert narrow.shared - wide.shared == 2 * (products + adapters)
    for name in ("first token", "last token"):
        more = narrow.moments[name].most - wide.moments[name].most
        assert more == pytest.approx(narrow.shared, rel=0.2), name


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_copy_that_replies_is_gone_before_anything_else(precision):
    apart, copied = (ppo("separate", precision, divided=divided) for divided in (False, True))
    whole = 4 * (LAYER + OUTSIDE) + BUFFERS
    narrow = 4 * (LAYER - 2 * WIDTH + WORDS * WIDTH) if precision == "bf16" else 0
    assert copied.shared - apart.shared == whole - narrow

    def working(seen, name):
        gradients = seen.gradients * (name == "optimise")
        return seen.moments[name].most - seen.weights - seen.optimizer - gradients

    for name in ("measure", "optimise", "text"):
        if precision == "fp32":
            assert working(copied, name) == working(apart, name)
        else:  # weights are read as they are; autocast made a copy of the trained ones
            assert working(copied, name) < working(apart, name)


def test_divided_roles_are_of_bfloat16_where_they_are_read():
    apart, parts = (ppo("separate", "bf16", divided=divided) for divided in (False, True))
    assert parts.gradients == apart.gradients / 2
    assert parts.optimizer == pytest.approx(apart.optimizer / 2, rel=1e-3)  # steps are counted
    assert parts.weights == apart.weights / 2


def test_a_model_in_bfloat16_weighs_half_and_casts_nothing():
    wide, cast, narrow = (
        language_model(BLUEPRINT, passes=passes)
        for passes in (PLAIN, Passes(bf16=True), Passes(bf16=True, narrow=True))
    )
    assert narrow.weights == wide.weights / 2
    assert narrow.gradients == wide.gradients / 2

    def working(seen):
        return seen.moments["pass"].most - seen.weights - seen.gradients - seen.optimizer

    # autocast keeps what it makes of the weights of all products but the head's
    assert working(cast) - working(narrow) > 2 * 3 * (LAYER - 2 * WIDTH)


def test_a_loss_of_all_logits_holds_them():
    words, rows = 40_000, 8
    blueprint = dataclasses.replace(BLUEPRINT, options=BLUEPRINT.options | {"vocab_size": words})
    few, whole = (
        rehearse_language_model(
            blueprint,
            ledger(),
            training=TRAINING,
            lora=NO_LORA,
            batch=training_rows(rows, LONG),
            passes=Passes(all_logits=whole),
        ).moments["pass"]
        for whole in (False, True)
    )
    assert whole.most - few.most > 4 * rows * LONG * words


def test_evaluation_holds_two_models_and_two_distributions():
    seen = rehearse_policies(BLUEPRINT.of_depth(1), ledger(), Replies(rows=4, prompt=8, response=6))
    assert seen.weights == 2 * 4 * (LAYER + OUTSIDE) + 2 * BUFFERS
    both = 2 * 4 * 6 * WORDS * 4  # log-probabilities of all words at every reply token, twice
    assert seen.moments["divergence"].most > seen.weights + both


def test_policies_on_one_base_are_one_model_and_an_adapter():
    replies, lora = Replies(rows=4, prompt=8, response=6), LoRA(rank=2)
    seen = rehearse_policies(BLUEPRINT.of_depth(1), ledger(), replies, lora=lora)
    adapter = 4 * 2 * (4 * 2 * WIDTH + 3 * (WIDTH + INNER))
    assert seen.weights == 4 * (LAYER + OUTSIDE) + BUFFERS + adapter
    tokens = {"first token", "last token", "lone token"}
    assert {"prefill", *tokens, "divergence", "text"} == set(seen.moments)


def test_evaluation_scores_all_rows_of_a_batch_together_however_long():
    half = PASS_TOKENS // 1024  # rows of what a pass of the reward stage reads at most

    def working(rows):
        seen = rehearse_scoring(
            dataclasses.replace(BLUEPRINT.of_depth(2), packs=False),
            ledger(),
            Replies(rows=rows, prompt=1000, response=24),
        )
        return seen.moments["scores"].most - seen.weights

    assert working(2 * half) == pytest.approx(2 * working(half), rel=0.01)


def test_a_reward_model_in_4_bits_keeps_its_adapter_and_two_heads():
    replies, lora = Replies(rows=4, prompt=8, response=6), LoRA(rank=2)
    plain, whole, packed = (
        rehearse_scoring(BLUEPRINT.of_depth(1), ledger(), replies, **more)
        for more in ({}, {"lora": lora}, {"lora": lora, "quantised": True})
    )
    adapter = 4 * 2 * (4 * 2 * WIDTH + 3 * (WIDTH + INNER))
    assert whole.weights - plain.weights == adapter + 4 * WIDTH  # peft trains a copy of the head
    saved = (4 - PACKED_BYTES) * (LAYER - 2 * WIDTH)
    assert whole.weights - packed.weights == pytest.approx(saved, abs=25)


def test_a_long_prompt_keeps_its_cache_alone_in_every_layer():
    replies = Replies(rows=4, prompt=40, response=2)
    two, three, six = (
        rehearse_generation(BLUEPRINT.of_depth(depth), ledger(), replies) for depth in (2, 3, 6)
    )
    most = [seen.moments["prefill"].most - seen.weights for seen in (two, three, six)]
    assert most[1] - most[0] == 2 * 4 * 40 * WIDTH * 4  # keys and values
    assert two.at(6, three).moments["prefill"].most - six.weights == most[2]


def test_the_real_pass_holds_what_the_rehearsal_says():
    """Weights, gradients and optimizer state of the same model made for real."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from pipeline.optim import build_optimizer

    model = LlamaForCausalLM(LlamaConfig(**BLUEPRINT.options))
    optimizer = build_optimizer(model, TRAINING)
    model(**training_rows(2, 16)).loss.backward()
    optimizer.step()
    state = [value for one in optimizer.state.values() for value in one.values()]
    seen = language_model(BLUEPRINT)
    assert seen.gradients == sum(p.grad.nbytes for p in model.parameters())
    assert seen.optimizer == sum(value.nbytes for value in state if torch.is_tensor(value))


LONG = 48
"""Tokens of rows whose activations outweigh the head's."""


def long_pass(layers, *, recomputes):
    return rehearse_language_model(
        BLUEPRINT.of_depth(layers),
        ledger(),
        training=TRAINING,
        lora=NO_LORA,
        batch=training_rows(4, LONG),
        passes=Passes(recomputes=recomputes),
    ).moments["pass"]


def test_layers_that_are_computed_again_keep_their_inputs_alone():
    kept, again = ([long_pass(n, recomputes=again) for n in (4, 5)] for again in (False, True))
    state = 4 * 4 * LONG * WIDTH  # bytes of one hidden state
    weights = 4 * 4 * LAYER  # a layer's weights, gradients and moments
    assert again[1].most - again[0].most - weights == pytest.approx(state, rel=0.02)
    assert kept[1].most - kept[0].most - weights > 10 * state
    # a layer goes forward once more, up to its last product, of which nothing is kept
    products = 2 * (LAYER - 2 * WIDTH - WIDTH * INNER) * 4 * LONG
    attention = 2 * 2 * 4 * HEADS * LONG * LONG * (WIDTH // HEADS)
    assert again[1].flops - kept[1].flops == pytest.approx(5 * (products + attention), rel=0.02)


def test_two_depths_say_what_recomputed_layers_take():
    two, three, five = (
        rehearse_reward(
            BLUEPRINT.of_depth(depth),
            ledger(),
            training=TRAINING,
            lora=LoRA(rank=2),
            batch=rankings(rows=2, texts=2, prompt=8, length=LONG, packed=False),
            dropout=0.0,
            passes=Passes(recomputes=True),
        )
        for depth in (2, 3, 5)
    )
    assert two.at(5, three).moments["pass"].most == pytest.approx(
        five.moments["pass"].most, rel=0.01
    )


@pytest.mark.parametrize("roles", ["separate", "trunk", "lora"])
def test_roles_that_are_computed_again_take_less_and_longer(roles):
    one_pass = settings(prompts_per_update=2, minibatch_size=2)
    kept, again = (
        rehearse_ppo(
            BLUEPRINT.of_depth(3),
            ledger(),
            settings=one_pass,
            roles=roles,
            loras=(LoRA(rank=2), LoRA(rank=2)),
            replies=Replies(rows=2, prompt=24, response=24),
            recomputes=recomputes,
        ).moments["optimise"]
        for recomputes in (False, True)
    )
    assert again.most < kept.most
    assert again.flops > 1.2 * kept.flops
