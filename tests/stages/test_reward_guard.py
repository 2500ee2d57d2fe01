"""The reward_guard stage: the reward model's making, on the guard's own texts."""

from pipeline.config import load
from stages import reward, reward_guard
from tests.stages.test_reward import SMOKE, config_of, parents, run_dir

__all__ = ["parents", "run_dir"]


def test_the_guard_learns_from_its_own_texts_beside_the_reward_model(run_dir):
    config = load(reward_guard.Config, [*SMOKE, f"--run={run_dir}"], stage="reward_guard")
    assert config.row_type == "guard_preferences"
    few = config_of(run_dir).training
    reward_guard.run(reward_guard.Config(**(vars(config) | {"training": few})))
    from pipeline.checkpoint import open_artifact
    from pipeline.models import load_reward_model
    from pipeline.storage import read_json

    guard = open_artifact(run_dir / "reward_guard", kind="reward")
    assert guard.stage == "reward_guard"
    assert set(guard.content["parents"]) == {"data", "sft"}
    sets = set(read_json(run_dir / "reward_guard" / "report.json")["sets"])
    assert sets == {"amazonReviewSnippets", "nytEditorialSnippets"}
    assert load_reward_model(run_dir / "reward_guard").config.reward_std > 0


def test_the_two_differ_in_nothing_but_their_rows():
    assert reward.Config().content() | {"row_type": "guard_preferences"} == (
        reward_guard.Config().content()
    )
