"""Seconds of steps, updates and runs out of those of their moments, in round numbers."""

from pipeline.doctor.lengths import UNKNOWN, Lengths
from pipeline.doctor.seen import Moment
from pipeline.doctor.timing import reply_seconds, run_seconds, step_seconds, update_seconds
from pipeline.ppo.settings import Optimisation
from pipeline.training import Training
from stages.evaluate import BestOf
from stages.evaluate import Config as EvaluateConfig
from stages.ppo import Config as PPOConfig

SECONDS = {
    "prefill": 3.0, "first token": 1.0, "last token": 2.0, "lone token": 0.5,
    "measure": 4.0, "optimise": 8.0, "step": 0.5, "scores": 1.0,
    "divergence": 2.0, "likelihood": 3.0, "pass": 6.0,
}  # fmt: skip
MOMENTS = {name: Moment(0.0, seconds, 0.0) for name, seconds in SECONDS.items()}
PPO = PPOConfig(
    prompts_per_update=64, minibatch_size=32, microbatch_size=8, max_prompt_tokens=20,
    max_response_tokens=11, optimisation=Optimisation(epochs=3),
)  # fmt: skip
SHORT = Lengths(rows={"sft": 25.0}, prompt=10.0, reply=5.5)
"""Half of everything."""


def replying(lengths: Lengths, *, batches: float) -> float:
    return reply_seconds(MOMENTS, PPO, lengths, batches=batches)


def test_replies_take_a_step_a_token():
    assert replying(UNKNOWN, batches=1.0) == 3 + 10 * 1.5
    assert replying(UNKNOWN, batches=3.0) == 3 * 18


def test_a_batch_goes_on_until_its_longest_reply_with_fewer_and_fewer_rows():
    # half a prompt, 10 steps of what does not depend on rows, 4.5 tokens of each row
    assert replying(SHORT, batches=1.0) == 3 / 2 + 10 * 0.5 + 4.5 * 1.0


def test_a_smaller_batch_has_as_many_steps():
    assert replying(UNKNOWN, batches=0.25) == 3 / 4 + 10 * 0.5 + 10 / 4 * 1.0
    assert replying(UNKNOWN, batches=1.5) == 1.5 * 3 + 2 * 10 * 0.5 + 1.5 * 10 * 1.0


def test_a_step_takes_all_its_passes():
    training = Training(minibatch_size=64, microbatch_size=2)
    whole = step_seconds(MOMENTS, training, processes=4, share=1.0)
    assert whole == 8 * 6 + 0.5
    assert step_seconds(MOMENTS, training, processes=4, share=0.5) == 4 * 6 + 0.5


def test_an_update_replies_measures_and_learns_in_every_epoch():
    # 64 replies, 32 at a time; 8 passes to measure them; 4 more each of 6 steps
    expected = 2 * 18 + 8 * 4 + 6 * (4 * 8 + 0.5)
    found = update_seconds(MOMENTS, PPO, UNKNOWN, processes=1, batch=32, passes=1)
    assert found == expected
    halved = update_seconds(MOMENTS, PPO, UNKNOWN, processes=2, batch=32, passes=1)
    assert halved == 18 + 4 * 4 + 6 * (2 * 8 + 0.5)
    of_two = update_seconds(MOMENTS, PPO, UNKNOWN, processes=1, batch=32, passes=2)
    assert of_two == 2 * 18 + 8 * 2 + 6 * (4 * 4 + 0.5)
    short = update_seconds(MOMENTS, PPO, SHORT, processes=1, batch=32, passes=1)
    assert short == 2 * 11 + 8 * 2 + 6 * (4 * 4 + 0.5)


def test_evaluate_replies_for_both_policies_and_the_best_of_n():
    config = EvaluateConfig(
        num_prompts=32, batch_size=8, best_of=BestOf(sizes=[2, 4], num_prompts=4)
    )
    assert len(config.draw_rows) == 4  # 16 replies more, in 2 batches
    found = run_seconds(MOMENTS, config, PPO, UNKNOWN, processes=1)
    assert found == (8 + 2) * (18 + 1) + 4 * (2 + 2 * 3)
