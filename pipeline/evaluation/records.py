"""What is measured on one prompt: a plain row that processes can exchange and files can hold."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.manifest import mending_command
from pipeline.shapes import holds, is_number, is_text, mapping
from pipeline.storage import read_jsonl

JUDGED = mapping({"text": holds(is_text), "gold": holds(is_number), "reward": holds(is_number)})
RECORD = mapping(
    {
        "prompt": holds(is_text),
        "group": holds(is_text),
        "kl": holds(is_number),
        "sft": JUDGED,
        "ppo": JUDGED,
    }
)
"""What is read again of a row of samples.jsonl."""


@dataclass(frozen=True, kw_only=True)
class Judged:
    """A reply and every figure that is measured on it alone."""

    text: str
    num_tokens: int
    """Tokens of the reply, EOS included where it ended."""
    ended: bool
    """Whether the reply ended with EOS within the length limit."""
    gold: float
    """VADER compound."""
    reward: float
    """Normalised score of the reward model."""
    nll: float
    """-log P(reply | prompt) under the pretrained model, in nats."""


@dataclass(frozen=True, kw_only=True)
class Draw:
    """One of the many SFT replies from which best-of-n chooses."""

    text: str
    gold: float
    reward: float


@dataclass(frozen=True, kw_only=True)
class Record:
    """One prompt with the reply of each policy."""

    row: int
    prompt: str
    group: str
    sft: Judged
    ppo: Judged
    kl: float
    """KL(PPO || SFT) over the vocabulary, summed over PPO's reply, in nats."""
    k1: float
    """log PPO - log SFT of PPO's reply, in nats."""
    draws: tuple[Draw, ...] = ()
    """Further SFT replies, independent of `sft`; empty where best-of-n is not measured."""


def read_records(folder: Path) -> list[dict[str, Any]]:
    """Returns the rows of an evaluation's samples.jsonl: a record each.

    Raises:
        UserError: there are none, or one is damaged.
    """
    path = folder / "samples.jsonl"
    rows = read_jsonl(path)
    if not rows:
        raise UserError(f"{path} holds no samples. Run: {mending_command(folder)} FORCE=1")
    for number, row in enumerate(rows, start=1):
        fault = RECORD(row)
        if fault is not None:
            raise UserError(
                f"{path}, line {number}: {fault} is damaged. Run: {mending_command(folder)} FORCE=1"
            )
    return rows
