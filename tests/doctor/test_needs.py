"""Needs: what is divided, kept elsewhere and added, in round numbers."""

import dataclasses
import inspect

import pytest

from pipeline.doctor import needs, rehearsal
from pipeline.doctor.blueprint import PACKED_BYTES, Blueprint
from pipeline.doctor.dividing import BUCKET
from pipeline.doctor.holding import REPLYING, peak_of
from pipeline.doctor.machine import GPU_CONTEXT, GPU_SLACK, GPUS, Sharding, gpus, this_machine
from pipeline.doctor.need import Need, Peak
from pipeline.doctor.needs import Planner
from pipeline.doctor.seen import Moment, Rehearsal, Role
from pipeline.errors import UserError
from pipeline.lora import LoRA
from pipeline.ppo.engine_settings import Engine
from pipeline.ppo.guard import Guard
from pipeline.ppo.rollout import generate
from pipeline.ppo.settings import Reward, Source
from pipeline.reward.scores import raw_scores
from pipeline.training import Training
from stages.evaluate import Config as EvaluateConfig
from stages.ppo import Config as PPOConfig
from stages.pretrain import Config as PretrainConfig
from stages.reward import Config as RewardConfig
from stages.sft import Config as SFTConfig

pytestmark = pytest.mark.usefixtures("unchecked")

SEEN = Rehearsal(
    weights=1000.0,
    gradients=800.0,
    optimizer=1600.0,
    moments={"pass": Moment(3900.0, 2.0, 0.0), "step": Moment(3500.0, 0.5, 0.0)},
    gathered=300.0,
)
TRAINING = Training(minibatch_size=64, microbatch_size=2, steps=10)
BLUEPRINT = Blueprint(model_type="llama", options={}, packs=False)


def planner(processes=4, **sharding) -> Planner:
    machine = gpus("a100", processes=processes, memory=0, sharding=Sharding(**sharding))
    return Planner(blueprint=BLUEPRINT, machine=machine, ranking=2)


def peak(ours: Planner) -> tuple[float, ...]:
    found = next(iter(ours._training(SEEN, TRAINING)))
    return dataclasses.astuple(found)[1:]


def test_whole_models_are_held_and_a_bucket_of_gradients_with_them():
    # 3900 - 1000 - 800 - 1600 = 500 of work, and DistributedDataParallel's 800
    assert peak(planner()) == (1000, 800, 1600, 1300)
    assert peak(planner(processes=1)) == (1000, 800, 1600, 500)


def test_what_is_divided_is_a_quarter_on_four():
    assert peak(planner(kind="zero2")) == (1000, 200, 400, 500)
    assert peak(planner(kind="zero3")) == (250, 200, 400, 800)  # 300 are gathered
    assert peak(planner(kind="fsdp")) == (250, 200, 400, 1100)  # and their gradients, whole


def test_what_the_host_keeps_is_not_on_the_device():
    assert peak(planner(kind="zero3", offload_optimizer=True)) == (250, 0, 0, 800)
    everything = {"offload_weights": True, "offload_optimizer": True}
    assert peak(planner(kind="fsdp", **everything)) == (0, 0, 0, 1100)


def test_a_step_takes_all_its_passes():
    seen = dataclasses.replace(SEEN, moments={**SEEN.moments, "validation": SEEN.moments["pass"]})
    normalising = Peak(moment="normalise", weights=1e9)
    config = SFTConfig(training=TRAINING)
    found = planner()._trained("sft", seen, config, normalising, allowed=100)
    assert found.seconds == 64 / 2 / 4 * 2.0 + 0.5
    assert (found.unit, found.units) == ("step", 10)
    assert found.total == pytest.approx(1e9 * (1 + GPU_SLACK) + GPU_CONTEXT)
    assert found.fits


def test_a_second_worker_holds_its_own_gradients_and_pass():
    found = peak_of(planner(processes=1).machine, SEEN, "pass", gradients=True, workers=2)
    assert found.working == 2 * 500 + 800


def test_workers_that_reply_share_the_weights_that_they_read():
    moments = dict.fromkeys(("last token", "measure"), Moment(3200.0, 1.0, 0.0))
    seen = dataclasses.replace(SEEN, moments=moments, shared=400.0)
    machine = planner(processes=1).machine
    found = [peak_of(machine, seen, name, workers=2).working for name in moments]
    assert found == [400 + 2 * 200, 2 * 600]  # 3200 - 1000 - 1600


def test_workers_are_not_side_by_side_where_models_are_divided():
    here = this_machine(2, sharding=Sharding(kind="fsdp"))
    divided, whole = (
        dataclasses.replace(planner(), machine=dataclasses.replace(here, sharding=sharding))
        for sharding in (here.sharding, Sharding())
    )
    config = PPOConfig(threads=2)
    assert (divided._workers(config), whole._workers(config)) == (1, 2)


ADAPTED = {
    "ppo": PPOConfig(roles="lora", lora=LoRA(rank=4)),
    "reward": RewardConfig(lora=LoRA(rank=4)),
}
TAKEN = PretrainConfig(
    init_from="a/b", take_as_is=True, training=Training(minibatch_size=2, microbatch_size=2)
)


def small_planner(**sharding) -> Planner:
    options = {
        "vocab_size": 300, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4,
        "num_attention_heads": 4, "tie_word_embeddings": False,
    }  # fmt: skip
    blueprint = Blueprint(model_type="llama", options=options, packs=False)
    machine = gpus("a100", processes=4, memory=0, sharding=Sharding(**sharding))
    return Planner(blueprint=blueprint, machine=machine, ranking=2)


UPDATED = Rehearsal(
    weights=4000.0,
    gradients=800.0,
    optimizer=1600.0,
    moments={
        **dict.fromkeys((*REPLYING, "measure", "text"), Moment(7000.0, 1.0, 0.0)),
        **dict.fromkeys(("optimise", "step"), Moment(7200.0, 1.0, 0.0)),
    },
    roles={
        "policy": Role(weights=1000.0, trained=500.0),
        "value": Role(weights=1000.0, trained=300.0),
    },
    gathered=300.0,
    shared=1000.0,
)
"""An update of ppo: 1400 of work beside weights and moments, 800 beside gradients too."""
SMALL_COPY = 4 * (4 * (4 * 64 * 64 + 3 * 64 * 128 + 2 * 64) + 2 * 300 * 64 + 64)
"""Bytes of the policy of `small_planner`: four layers, embeddings, a head, and the last norm."""
SMALL_BUFFERS = 2 * 4 * 64 // 4 // 2
"""Those of its rotary frequencies, kept twice."""


def updating(config: PPOConfig | None = None, **sharding) -> dict[str, tuple[float, ...]]:
    peaks = small_planner(**sharding)._updating(UPDATED, config or PPOConfig())
    return {one.moment: dataclasses.astuple(one)[1:] for one in peaks}


@pytest.mark.parametrize("moment", REPLYING)
def test_a_divided_policy_replies_as_a_whole_copy_on_every_device(moment):
    assert updating()[moment] == (4000, 0, 1600, 1400)
    assert updating(kind="fsdp")[moment] == (1000, 0, 400, 1400)  # 1000 of them the copy
    offload = {"offload_weights": True, "offload_optimizer": True}
    assert updating(kind="fsdp", **offload)[moment] == (0, 0, 0, 1400)


def test_divided_roles_are_gathered_layer_by_layer_to_be_read():
    divided = updating(kind="fsdp")
    assert divided["measure"] == divided["text"] == (1000, 0, 400, 1400 + 300)
    assert divided["optimise"] == (1000, 200, 400, 800 + 2 * 300)  # and their gradients


def test_gradients_are_laid_end_to_end_where_they_are_not_divided():
    assert updating()["reduce gradients"] == (4000, 800, 1600, 2 * 500)
    assert "reduce gradients" not in updating(kind="fsdp")


def test_a_step_works_on_this_devices_part():
    assert updating()["step"] == (4000, 800, 1600, 800)
    assert updating(kind="fsdp")["step"] == (1000, 200, 400, 200)  # nothing is gathered
    found = list(planner(kind="zero2")._training(SEEN, TRAINING))[1]
    assert dataclasses.astuple(found)[1:] == (1000, 200, 400, 25)  # 3500 - 1000 - 800 - 1600
    away = {"kind": "zero2", "offload_optimizer": True}
    found = list(planner(**away)._training(SEEN, TRAINING))[1]
    assert dataclasses.astuple(found)[1:] == (1000, 0, 0, 0)


def test_models_that_judge_lie_beside_the_roles_whole_on_every_device():
    watched = PPOConfig(guard=Guard(every=1))
    sources = [Source(model="reward"), Source(model="reward_guard"), Source(function="m:f")]
    judged = PPOConfig(reward=Reward(sources=sources))
    for sharding in ({}, {"kind": "fsdp"}):
        plain = updating(**sharding)
        for config in (watched, judged):
            more = updating(config, **sharding)
            assert {name: (*held, working) for name, (*held, working) in more.items()} == {
                name: (*held, working + SMALL_COPY) for name, (*held, working) in plain.items()
            }


def test_replies_of_vllm_take_its_share_of_the_device_or_nothing_of_it():
    place = {"server_url": "http://10.0.0.1:8000", "weights_dir": "/dev/shm/w"}
    apart = updating(PPOConfig(engine=Engine(name="vllm_server", **place)))
    plain = updating()
    assert apart == {name: peak for name, peak in plain.items() if name not in REPLYING}
    share = 0.25 * small_planner().machine.memory
    for sleep in (True, False):
        engine = Engine(name="vllm_colocate", gpu_memory_frac=0.25, sleep=sleep)
        here = updating(PPOConfig(engine=engine))
        assert here.pop("replies by vLLM") == (4000, 0, 1600, share)
        kept = 0 if sleep else share
        assert here == {name: (*held, work + kept) for name, (*held, work) in apart.items()}
    found = weights("ppo", {**ADAPTED, "ppo": PPOConfig(engine=engine)})
    assert found == weights("ppo", {**ADAPTED, "ppo": PPOConfig()})


def test_ppos_own_setting_says_how_it_is_divided_whatever_the_file_says():
    def found(config: PPOConfig, **sharding) -> float:
        return weights("ppo", {**ADAPTED, "ppo": config}, **sharding)

    whole = found(PPOConfig())
    assert found(PPOConfig(sharding="fsdp2")) == found(PPOConfig(), kind="fsdp") == whole / 4
    assert found(PPOConfig(), kind="zero2") == found(PPOConfig(), kind="zero3") == whole / 4
    assert found(PPOConfig(), kind="zero2", offload_optimizer=True) == 0
    assert found(PPOConfig(sharding="fsdp2_offload")) == 0
    assert found(PPOConfig(sharding="none"), kind="fsdp") == whole
    lora = PPOConfig(sharding="fsdp2", roles="lora", lora=LoRA(rank=4))
    assert found(lora) == found(dataclasses.replace(lora, sharding="none"))  # ppo refuses it


def test_adapters_on_one_base_need_that_of_reward():
    configs = {"ppo": ADAPTED["ppo"], "reward": RewardConfig()}
    with pytest.raises(UserError, match="ppo: roles lora reads .* Set reward.lora.rank above 0"):
        small_planner().need("ppo", configs)


def test_replies_of_divided_models_are_planned_with_the_copy():
    config = PPOConfig(max_response_tokens=200, minibatch_size=4, microbatch_size=1)
    configs = {"ppo": config, "reward": RewardConfig()}
    whole, divided = (small_planner(**kind).need("ppo", configs) for kind in ({}, {"kind": "fsdp"}))
    assert whole.peak.moment == divided.peak.moment == "last token"
    assert divided.peak.weights == whole.peak.weights / 4
    assert divided.peak.working - whole.peak.working == SMALL_COPY + SMALL_BUFFERS


def test_divided_roles_in_bfloat16_are_held_in_float32_and_have_no_second_copy():
    sizes = {"minibatch_size": 4, "microbatch_size": 1, "max_response_tokens": 200}
    reward = {"reward": RewardConfig()}
    wide, narrow = (
        small_planner(kind="fsdp").need("ppo", reward | {"ppo": PPOConfig(precision=name, **sizes)})
        for name in ("fp32", "bf16")
    )
    for held in ("weights", "optimizer"):
        assert getattr(narrow.peak, held) == pytest.approx(getattr(wide.peak, held), rel=1e-3)
    assert narrow.trained == wide.trained
    assert narrow.roles["policy"].trained == wide.roles["policy"].trained


def test_a_look_at_more_prompts_than_an_update_has_is_counted():
    def planned(looked_at: int) -> Need:
        config = PPOConfig(
            prompts_per_update=64, validation_prompts=looked_at, minibatch_size=4,
            microbatch_size=1, max_response_tokens=200,
        )  # fmt: skip
        need = small_planner().need("ppo", {"ppo": config, "reward": RewardConfig()})
        assert need.peak.moment == "last token"
        return need

    least, few, many = (planned(looked_at) for looked_at in (4, 64, 256))
    assert least.peak.working == few.peak.working
    assert many.peak.working == pytest.approx(4 * few.peak.working, rel=0.1)
    assert many.seconds == pytest.approx(few.seconds, rel=0.02)  # which the update's own take


def test_a_copy_that_replies_in_bfloat16_holds_what_products_read_in_it_alone():
    sizes = {"minibatch_size": 4, "microbatch_size": 1, "max_response_tokens": 200}
    configs = {"ppo": PPOConfig(precision="bf16", **sizes), "reward": RewardConfig()}
    whole, divided = (small_planner(**kind).need("ppo", configs) for kind in ({}, {"kind": "fsdp"}))
    assert whole.peak.moment == divided.peak.moment == "last token"
    products = 4 * (4 * 64 * 64 + 3 * 64 * 128) + 300 * 64  # all but embeddings and norms
    # both hold products in bfloat16; whole roles have the float32 ones anyway, and so the copy's
    # other weights are what it takes beside
    assert divided.peak.working - whole.peak.working == SMALL_COPY - 4 * products + SMALL_BUFFERS


@pytest.mark.parametrize("kind", ["zero2", "zero3"])
def test_deepspeed_in_bfloat16_holds_masters_and_moments_in_float32(kind):
    config = SFTConfig(training=dataclasses.replace(TRAINING, precision="bf16"))
    whole, parts = (
        small_planner(**some).need("sft", {"sft": config}) for some in ({}, {"kind": kind})
    )
    number, share = SMALL_COPY / 4, 1 if kind == "zero2" else 1 / 4
    assert parts.peak.moment == "pass"
    assert parts.peak.weights == pytest.approx(2 * share * number, rel=0.01)
    assert parts.peak.gradients == 2 * number / 4
    assert parts.peak.optimizer == pytest.approx((4 + 8) * number / 4, rel=0.01)
    assert parts.peak.working > 2 * BUCKET
    assert parts.trained == whole.trained == SMALL_COPY


def weights(stage: str, configs, **sharding) -> float:
    return small_planner(**sharding).need(stage, configs).peak.weights


def test_models_on_one_base_are_held_once_and_in_4_bits_less():
    evaluate = EvaluateConfig(batch_size=2)
    shared = dataclasses.replace(evaluate, on_one_base=True)
    apart, once = (weights("evaluate", ADAPTED | {"evaluate": e}) for e in (evaluate, shared))
    copy = small_planner().copy_bytes
    assert apart == pytest.approx(2 * copy, rel=0.01)
    adapter = 4 * 4 * (4 * 2 * 64 + 3 * (64 + 128)) * 4  # rank 4, four matrices and three, 4 layers
    assert once == pytest.approx(copy + adapter, rel=0.01)
    packed = PPOConfig(roles="lora", lora=LoRA(rank=4, quantise="4bit"))
    assert weights("evaluate", ADAPTED | {"ppo": packed, "evaluate": shared}) < 0.6 * once
    without = ADAPTED | {"ppo": PPOConfig(), "evaluate": shared}  # as the check tells
    assert weights("evaluate", without) == apart


def test_a_model_that_is_measured_in_4_bits_weighs_less():
    packed = dataclasses.replace(TAKEN, quantise="4bit")
    whole, less = (weights("pretrain", {"pretrain": one}) for one in (TAKEN, packed))
    assert whole == pytest.approx(small_planner().copy_bytes, rel=0.01)
    matrices = 4 * (4 * 64 * 64 + 3 * 64 * 128)
    assert whole - less == pytest.approx((4 - PACKED_BYTES) * matrices, rel=0.001)


def test_stages_that_do_not_divide_their_models_hold_them_whole():
    fsdp = {"kind": "fsdp"}
    adapters = {"sft": SFTConfig(lora=LoRA(rank=4), training=TRAINING)}
    whole = {"sft": SFTConfig(training=TRAINING)}
    assert weights("sft", whole, **fsdp) == weights("sft", whole) / 4
    assert weights("sft", adapters, **fsdp) == weights("sft", adapters)
    assert weights("pretrain", {"pretrain": TAKEN}, **fsdp) == weights(
        "pretrain", {"pretrain": TAKEN}
    )
    configs = ADAPTED | {"evaluate": EvaluateConfig(batch_size=2)}
    assert weights("evaluate", configs, **fsdp) == weights("evaluate", configs)


def test_batches_are_planned_as_large_as_they_are_by_themselves():
    for action, planned in ((generate, needs.MOST_ROWS), (raw_scores, rehearsal.PASS_TEXTS)):
        assert inspect.signature(action).parameters["batch_size"].default == planned


def test_gpus_of_the_data_sheets_are_in_order():
    assert GPUS["h100"].rates.bf16_flops > GPUS["a100"].rates.bf16_flops
