"""How long a run's rows are, of what settings allow: time goes with them, memory with the longest.

They are read where the run's data and tokenizer are there; else every row counts as long as it may.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from pipeline.config import require
from pipeline.data.formats import read_rows, rows_file
from pipeline.doctor.checks import Finding
from pipeline.doctor.recipe import Recipe
from pipeline.errors import UserError
from pipeline.instructions import IGNORED, encode_rows
from pipeline.manifest import MANIFEST, mending_command, read_manifest
from pipeline.reward.data import encode, read_rankings
from pipeline.reward.reading import TokenReading
from pipeline.spacing import evenly_spaced
from pipeline.storage import inside
from pipeline.tokenizer import encode_prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

LOOKED_AT = 512
"""Rows of a kind that are read, at even distances."""
RANKED = {"reward": "preferences", "reward_guard": "guard_preferences"}
"""Rows that reward stages read."""


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """Mean tokens of what stages read; what is not known counts as long as it may be.

    Attributes:
        rows: of a row by stage: sft's conversations, the reward stages' rankings with all texts.
        prompt: of a prompt of ppo.
        reply: of a reply, where those of sft are what the policy writes.
    """

    rows: Mapping[str, float] = field(default_factory=dict)
    prompt: float = 0.0
    reply: float = 0.0

    def row_share(self, stage: str, allowed: int) -> float:
        """Returns the share of the tokens of a row that a stage allows."""
        return min(1.0, self.rows.get(stage, allowed) / allowed)

    def reply_tokens(self, allowed: int) -> float:
        """Returns the tokens of a reply."""
        return min(float(allowed), self.reply or float(allowed))

    def prompt_tokens(self, allowed: int) -> float:
        """Returns the tokens of a prompt."""
        return min(float(allowed), self.prompt or float(allowed))

    def exchange_share(self, config: Any) -> float:
        """Returns the share of prompt and reply of the tokens that ppo allows for both."""
        told = self.prompt_tokens(config.max_prompt_tokens)
        return (told + self.reply_tokens(config.max_response_tokens)) / config.longest


UNKNOWN = Lengths()


def looked_at(recipe: Recipe) -> tuple[Lengths, list[Finding]]:
    """Returns how long rows are, and what is wrong with them where they cannot be read."""
    try:
        return lengths_of(recipe), []
    except UserError as error:
        return UNKNOWN, [Finding("wrong", str(error))]


def lengths_of(recipe: Recipe) -> Lengths:
    """Returns how long the rows of a recipe's run are, or `UNKNOWN` before they are there.

    Raises:
        UserError: rows or the tokenizer are damaged.
    """
    from pipeline.models import load_tokenizer

    data, own = recipe.folder / "data", recipe.folder / "tokenizer"
    if not all((folder / MANIFEST).is_file() for folder in (data, own)):
        return UNKNOWN
    for folder in (data, own):
        _check_whole(folder)
    tokenizer, configs = load_tokenizer(own), recipe.configs
    rows, replies = _conversations(data, tokenizer, limit=configs["sft"].max_length)
    found = {"sft": rows} if rows else {}
    for stage, kind in RANKED.items():
        config = configs.get(stage)
        if config is not None and not config.init_from:
            reading = TokenReading(tokenizer)
            if ranking := _rankings(data, kind, reading, config=config):
                found[stage] = ranking
    prompts = [encode_prompt(tokenizer, row["prompt"]) for row in _some(data, "prompts")]
    prompt = _mean([len(ids) for ids in prompts], limit=configs["ppo"].max_prompt_tokens)
    return Lengths(rows=found, prompt=prompt, reply=replies)


def _check_whole(folder: Path) -> None:
    """Checks that a finished folder's files are there, by their sizes alone.

    Raises:
        UserError: one is not.
    """
    for name, expected in read_manifest(folder)["content"]["files"].items():
        file = inside(folder, name)
        require(
            file.is_file() and file.stat().st_size == expected["size"],
            f"{file} is missing or was altered. Run: {mending_command(folder)} FORCE=1",
        )


def _conversations(data: Path, tokenizer: "Tokenizer", *, limit: int) -> tuple[float, float]:
    """Returns the mean tokens of rows that fit, and of the replies in them."""
    examples = encode_rows(tokenizer, _some(data, "instructions"))
    fitting = [one for one in examples if len(one.input_ids) <= limit]
    learned = [label != IGNORED for one in fitting for label in [IGNORED, *one.labels]]
    replies = sum(now and not before for before, now in pairwise(learned))
    return _mean([len(one.input_ids) for one in fitting]), sum(learned) / max(1, replies)


def _rankings(data: Path, kind: str, reading: TokenReading, *, config: Any) -> float:
    """Returns the mean tokens of a ranking's texts that fit; packed, they share their prompt."""
    some = _some(data, kind, read=read_rankings)
    encoded = encode(some, reading=reading, max_length=config.max_length)
    rows = zip(encoded.sequences, encoded.starts, strict=True)
    return _mean(
        [
            sum(map(len, texts)) - (sum(starts) - max(starts) if config.pack else 0)
            for texts, starts in rows
        ]
    )


def _some(data: Path, kind: str, *, read: Callable[..., list[Any]] = read_rows) -> list[Any]:
    """Returns some training rows of a kind; none where the run has none."""
    if not rows_file(data, kind, split="train").is_file():
        return []
    every = read(data, kind, split="train")
    return [every[index] for index in evenly_spaced(len(every), LOOKED_AT)]


def _mean(lengths: Sequence[int], *, limit: int | None = None) -> float:
    """Returns the mean of the lengths up to a limit; 0 of none."""
    kept = [length for length in lengths if limit is None or length <= limit]
    return fmean(kept) if kept else 0.0
