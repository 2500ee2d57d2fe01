"""What ppo keeps on disk: its models, and rollouts with every number about each token."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.distributed import is_main
from pipeline.storage import fsync

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from pipeline.ppo.trainer import Outcome, PPOTrainer

FOLDER = "rollouts"
"""Folder of the kept rollouts below the ppo folder: update-N.parquet each."""

NUMBERS = ("logprobs", "ref_logprobs", "kl", "values", "advantages", "rewards")
"""Numbers of a token, in the order they are computed; 0 on a prompt's tokens."""


def keep_rollout(
    stage_folder: Path, outcome: "Outcome", *, update: int, tokenizer: "PreTrainedTokenizerFast"
) -> None:
    """Writes rollouts/update-N.parquet: a row per response, in the rollout's order, atomically.

    The lists of a row run over prompt and response: token_ids, tokens (their texts), mask (True
    where a token counts), and the NUMBERS; `score` and `ended` are the response's.
    """
    import pyarrow as pa
    from pyarrow import parquet

    lists = {name: pa.list_(pa.float32()) for name in NUMBERS}
    schema = pa.schema(
        {
            "token_ids": pa.list_(pa.int32()),
            "tokens": pa.list_(pa.string()),
            "mask": pa.list_(pa.bool_()),
            **lists,
            "score": pa.float32(),
            "ended": pa.bool_(),
        }
    )
    table = pa.Table.from_pylist(_rows(outcome, tokenizer=tokenizer), schema=schema)
    folder = stage_folder / FOLDER
    folder.mkdir(exist_ok=True)
    temporary = folder / f".update-{update}.tmp"
    parquet.write_table(table, temporary)
    fsync(temporary)
    temporary.replace(folder / f"update-{update}.parquet")


def kept_rollouts(stage_folder: Path) -> dict[int, Path]:
    """Returns the files of the kept rollouts by update, in order."""
    files = (stage_folder / FOLDER).glob("update-*.parquet")
    found = {int(path.stem.removeprefix("update-")): path for path in files}
    return dict(sorted(found.items()))


def _rows(outcome: "Outcome", *, tokenizer: "PreTrainedTokenizerFast") -> list[dict[str, Any]]:
    experience = outcome.experience
    numbers = {
        "logprobs": experience.logprobs,
        "ref_logprobs": experience.ref_logprobs,
        "kl": experience.kl,
        "values": experience.values,
        "advantages": outcome.advantages,
        "rewards": outcome.rewards,
    }
    rows = []
    for row, (prompt, response) in enumerate(
        zip(experience.prompts, experience.responses, strict=True)
    ):
        ids, width = [*prompt, *response], len(response)
        rows.append(
            {
                "token_ids": ids,
                "tokens": [tokenizer.decode([token]) for token in ids],
                "mask": [False] * len(prompt) + experience.mask[row, :width].tolist(),
                **{
                    name: [0.0] * len(prompt) + values[row, :width].tolist()
                    for name, values in numbers.items()
                },
                "score": float(experience.scores[row]),
                "ended": bool(experience.ended[row]),
            }
        )
    return rows


def keep_models(folder: Path, trainer: "PPOTrainer", *, sft: Path) -> None:
    """Writes the policy with its tokenizer, and the critic where there is one.

    Args:
        folder: of the stage.
        trainer: whose roles they are; every process must call it.
        sft: folder of the tokenizer.
    """
    from pipeline.models import load_tokenizer
    from pipeline.sharding import save_role

    for place, role in {
        folder: trainer.roles.policy,
        folder / "value": trainer.roles.value,
    }.items():
        if role is not None:
            save_role(role, place)
            if is_main():
                load_tokenizer(sft).save_pretrained(place)
