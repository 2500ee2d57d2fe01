"""Training settings, reading order and the arguments they become."""

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import UserError
from pipeline.training import Training, padding_frac, row_order, trainer_arguments


def test_steps_win_over_epochs():
    assert Training(steps=7, epochs=3.0, minibatch_size=4).num_steps(100) == 7
    # 100 rows make 25 minibatches of 4; one and a half passes are 37 whole ones.
    assert Training(epochs=1.5, minibatch_size=4, microbatch_size=4).num_steps(100) == 37


def test_too_few_rows_are_refused():
    with pytest.raises(UserError, match="minibatch_size: 32 rows do not fit into the 31"):
        Training(minibatch_size=32).num_steps(31)


def test_a_warmup_over_all_steps_is_told_when_the_rows_are_known():
    training = Training(minibatch_size=8, epochs=2.0, warmup_steps=10)
    assert training.num_steps(48) == 12
    with pytest.raises(UserError, match="warmup_steps: 10 of 10 steps leave none at the peak"):
        training.num_steps(40)


def test_a_minibatch_is_divided_over_processes_and_microbatches():
    training = Training(minibatch_size=32, microbatch_size=4)
    assert training.accumulation(1) == 8
    assert training.accumulation(2) == 4


def test_sizes_that_do_not_divide_are_refused_with_one_that_does():
    training = Training(minibatch_size=32, microbatch_size=12)
    with pytest.raises(UserError, match=r"not a multiple of.*--training.microbatch_size=8"):
        training.accumulation(1)


@pytest.mark.parametrize(
    ("sizes", "processes", "mend"),
    [
        ((8, 4), 4, "--training.microbatch_size=2 or another size"),
        ((8, 4), 3, "--training.minibatch_size=12 or another number of processes"),
        ((2, 1), 3, "--training.minibatch_size=3 or another number of processes"),
    ],
)
def test_what_is_told_to_mend_sizes_mends_them(sizes, processes, mend):
    training = Training(minibatch_size=sizes[0], microbatch_size=sizes[1])
    with pytest.raises(UserError, match=f"use {mend}$"):
        training.accumulation(processes)
    name, _, size = mend.split()[0].removeprefix("--training.").partition("=")
    assert replace(training, **{name: int(size)}).accumulation(processes) >= 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"minibatch_size": 0}, "training.minibatch_size: must be at least 1, got 0"),
        ({"steps": -1}, "training.steps: must be at least 0, got -1"),
        ({"steps": 5, "warmup_steps": 5}, "training.warmup_steps: 5 of 5 steps leave none at"),
        ({"learning_rate": 0.0}, "training.learning_rate: must be above 0, got 0.0"),
        ({"epsilon": 0.0}, "training.epsilon: must be above 0, got 0.0"),
        ({"beta2": 1.0}, r"training.beta2: must be in \[0, 1\), got 1.0"),
        ({"optimizer": "sgd"}, "training.optimizer: must be one of adamw, muon, got 'sgd'"),
        ({"schedule": "step"}, "training.schedule: must be one of constant, linear"),
        ({"precision": "fp16"}, "training.precision: must be one of auto, bf16, fp32"),
    ],
)
def test_values_out_of_range_are_refused_by_name(settings, message):
    with pytest.raises(UserError, match=message):
        Training(**settings)


def test_arguments_read_rows_in_order_and_write_no_pickle_of_ours(tmp_path):
    arguments = trainer_arguments(
        Training(
            minibatch_size=32,
            microbatch_size=4,
            schedule="stable",
            decay_frac=0.5,
            precision="bf16",
        ),
        folder=tmp_path,
        seed=3,
        steps=40,
        world_size=2,
        recomputes=True,
    )
    assert arguments["gradient_accumulation_steps"] == 4
    assert arguments["lr_scheduler_kwargs"] == {"num_decay_steps": 20}
    assert arguments["train_sampling_strategy"] == "sequential"
    assert arguments["report_to"] == "none"
    assert arguments["activation_checkpointing"]
    assert arguments["bf16"]


ROWS = st.lists(st.integers(1, 50), min_size=4, max_size=60)


@given(lengths=ROWS, size=st.integers(1, 4), steps=st.integers(1, 30), seed=st.integers(0, 9))
def test_every_pass_reads_a_row_at_most_once(lengths, size, steps, seed):
    order = row_order(lengths, minibatch_size=size, steps=steps, seed=seed)
    assert len(order) == steps * size
    whole = len(lengths) // size * size
    for start in range(0, len(order), whole):
        assert max(Counter(order[start : start + whole]).values()) == 1


@given(lengths=ROWS, seed=st.integers(0, 9))
def test_a_longer_training_starts_with_the_same_rows(lengths, seed):
    long = row_order(lengths, minibatch_size=4, steps=20, seed=seed)
    assert row_order(lengths, minibatch_size=4, steps=5, seed=seed) == long[:20]


def test_another_seed_reads_in_another_order():
    orders = [row_order([1] * 50, minibatch_size=5, steps=10, seed=seed) for seed in (1, 2)]
    assert orders[0] != orders[1]


def test_minibatches_hold_rows_of_similar_length():
    lengths = list(range(1, 401))
    order = row_order(lengths, minibatch_size=8, steps=50, seed=1)
    ordered = [lengths[row] for row in order]
    # Sorted in one window, eight neighbours of 1..400 differ by 7 and waste at most 28 of 8 n.
    assert padding_frac(ordered, microbatch_size=8) < 0.02
    starts = ordered[::8]
    assert starts != sorted(starts)


def test_padding_is_counted_by_hand():
    # (2 + 4) of 2 * 4 positions and (3 + 3) of 2 * 3: 12 of 14.
    assert padding_frac([2, 4, 3, 3], microbatch_size=2) == pytest.approx(2 / 14)
