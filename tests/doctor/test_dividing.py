"""What is held of a model in parts: bytes by hand, and who divides at all."""

import dataclasses

import pytest

from pipeline.doctor.blueprint import Blueprint
from pipeline.doctor.dividing import BUCKET, LIVE, asked, in_parts
from pipeline.doctor.machine import Sharding, gpus
from pipeline.doctor.needs import Planner
from pipeline.doctor.seen import Moment, Rehearsal
from stages.ppo import Config as PPOConfig
from stages.sft import Config as SFTConfig

SEEN = Rehearsal(
    weights=1000.0,
    gradients=1000.0,
    optimizer=2000.0,
    moments={
        "pass": Moment(4500.0, 2.0, 0.0),
        "step": Moment(4600.0, 0.5, 0.0),
        "validation": Moment(3200.0, 1.0, 0.0),
    },
    gathered=300.0,
)
"""A pass works on 500 beside weights, gradients and moments, a step on 600, validation on 200."""


def parts(kind: str, *, narrow: bool) -> tuple[float, ...]:
    """Weights, gradients, moments; and the most of a pass, of a step and of validation."""
    found = in_parts(SEEN, kind=kind, narrow=narrow)
    most = [moment.most for moment in found.moments.values()]
    return (found.weights, found.gradients, found.optimizer, *most)


def test_what_is_read_in_float32_by_fsdp_or_not_divided_is_held_as_it_is():
    assert in_parts(SEEN, kind="none", narrow=False) == SEEN
    assert in_parts(SEEN, kind="fsdp", narrow=False) == SEEN


def test_fsdp_holds_float32_of_what_it_gathers_in_bfloat16():
    # 2000 + 2000 + 4000 and the work; a step works on float32, twice as wide
    assert parts("fsdp", narrow=True) == (2000, 2000, 4000, 8500, 8000 + 2 * 600, 6200)
    assert in_parts(SEEN, kind="fsdp", narrow=True).gathered == 300


@pytest.mark.parametrize("kind", ["zero2", "zero3"])
def test_zero_in_bfloat16_holds_float32_masters_and_moments_beside_bfloat16(kind):
    # 500 weights of 2 bytes: masters 2000, two moments 4000; a step makes gradients float32, 2000
    held = 1000 + 1000 + 6000
    assert parts(kind, narrow=True) == (
        1000, 1000, 6000, held + 500 + 2 * BUCKET, held + 2 * 600 + 2000, 7000 + 200,
    )  # fmt: skip


def test_zero_in_float32_has_masters_of_its_own_where_weights_stay_whole():
    # 250 weights of 4 bytes; what ZeRO 3 divides are the masters
    assert parts("zero2", narrow=False) == (
        1000, 1000, 3000, 5000 + 500 + 4 * BUCKET, 5000 + 600, 4000 + 200,
    )  # fmt: skip
    assert parts("zero3", narrow=False) == (
        1000, 1000, 2000, 4000 + 500 + 4 * BUCKET, 4600, 3200,
    )  # fmt: skip


def test_zero_3_leaves_a_billion_weights_whole_once_they_were_read():
    assert in_parts(SEEN, kind="zero3", narrow=True).gathered == 1000  # all there are
    large = dataclasses.replace(SEEN, weights=140e9)
    for narrow, size in ((True, 2), (False, 4)):
        assert in_parts(large, kind="zero3", narrow=narrow).gathered == size * LIVE
    assert in_parts(SEEN, kind="zero2", narrow=True).gathered == 300


@pytest.mark.parametrize("kind", ["fsdp", "zero2", "zero3"])
def test_one_process_of_ppo_has_whole_models_unless_it_is_told_otherwise(kind):
    def found(processes: int, sharding: str = "auto") -> str:
        machine = gpus("", processes=processes, memory=0, sharding=Sharding(kind=kind))
        return asked(machine, "ppo", {"ppo": PPOConfig(sharding=sharding)}).kind

    assert (found(1), found(2)) == ("none", "fsdp")
    assert found(1, "fsdp2") == "fsdp"


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("none", (False, False)),
        ("fsdp", (True, False)),
        ("zero2", (True, False)),
        ("zero3", (True, True)),
    ],
)
def test_divided_models_are_read_in_bfloat16_and_zero_3_makes_its_loss_of_all_logits(
    kind, expected
):
    machine = gpus("", processes=2, memory=0, sharding=Sharding(kind=kind))
    blueprint = Blueprint(model_type="llama", options={}, packs=False)
    passes = Planner(blueprint=blueprint, machine=machine, ranking=2)._passes(SFTConfig())
    assert (passes.narrow, passes.all_logits) == expected
