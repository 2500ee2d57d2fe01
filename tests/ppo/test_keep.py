"""Kept rollouts: what their rows hold, and that the same rollout gives the same bytes."""

import pytest
from pyarrow import parquet

from pipeline.ppo.keep import FOLDER, NUMBERS, keep_rollout, kept_rollouts
from stages.ppo import Config
from tests.ppo.worlds import EOS, TARGET, Speller, invented_outcome, trainer


def test_a_row_holds_prompt_and_response_with_their_mask(tmp_path):
    outcome = invented_outcome(3)
    keep_rollout(tmp_path, outcome, update=7, tokenizer=Speller())
    row = parquet.read_table(kept_rollouts(tmp_path)[7]).to_pylist()[1]
    assert row["token_ids"] == [2, 3, 4, TARGET, EOS]
    assert row["tokens"] == [" word"] * 5
    assert row["mask"] == [False, False, False, True, True]
    assert (row["score"], row["ended"]) == (1.0, False)
    expected = {
        "logprobs": outcome.experience.logprobs,
        "ref_logprobs": outcome.experience.ref_logprobs,
        "kl": outcome.experience.logprobs - outcome.experience.ref_logprobs,
        "values": outcome.experience.values,
        "advantages": outcome.advantages,
        "rewards": outcome.rewards,
    }
    assert set(expected) == set(NUMBERS)
    for name, values in expected.items():
        assert row[name] == [0.0, 0.0, 0.0, *values[1, :2].tolist()], name


def test_the_same_rollout_gives_the_same_bytes_and_leaves_nothing_else(tmp_path):
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        keep_rollout(tmp_path / name, invented_outcome(5), update=1, tokenizer=Speller())
    first, second = (kept_rollouts(tmp_path / name)[1] for name in ("first", "second"))
    assert first.read_bytes() == second.read_bytes()
    assert [path.name for path in (tmp_path / "first" / FOLDER).iterdir()] == ["update-1.parquet"]


def test_rollouts_are_found_in_the_order_of_updates(tmp_path):
    assert kept_rollouts(tmp_path) == {}
    for update in (10, 9, 100):
        keep_rollout(tmp_path, invented_outcome(1), update=update, tokenizer=Speller())
    assert list(kept_rollouts(tmp_path)) == [9, 10, 100]


def test_what_a_real_update_reports_adds_up():
    outcome = trainer().update(0)
    mask, rewards = outcome.experience.mask, outcome.rewards
    assert not rewards[~mask].any()
    assert not outcome.advantages[~mask].any()
    assert float(outcome.advantages[mask].mean()) == pytest.approx(0.0, abs=1e-6)
    total = float(rewards.sum(dim=1).mean())
    assert total == pytest.approx(outcome.metrics["objective/reward"], abs=1e-5)


@pytest.mark.parametrize(("every", "kept"), [(0, []), (1, [10, 20, 30]), (2, [20])])
def test_rollouts_are_kept_at_looks_only(every, kept):
    config = Config(validate_every=10, keep_rollout_every=every)
    assert [update for update in range(1, 40) if config.keeps(update)] == kept
