"""From the configured sources to what scores a rollout: lineage, loading, constants."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.checkpoint import Artifact, foreign_artifact, open_artifact
from pipeline.config import require
from pipeline.context import context_of
from pipeline.manifest import mending_command
from pipeline.ppo.settings import Source

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

    from pipeline.ppo.experience import Roles
    from pipeline.ppo.scorers import Rewards, Scorer
    from pipeline.ppo.settings import Settings
    from pipeline.reward.reading import Reading, Words

log = logging.getLogger(__name__)

NUM_SAMPLES = 512
"""Replies of the SFT model from which a model without constants gets them (docs/ppo.md)."""


def open_source(source: Source, *, folder: Callable[[str], Path]) -> tuple[str, Artifact]:
    """Returns a source as a parent: its name among them, and what it is by its files' digests.

    Args:
        source: a stage, a folder or a function.
        folder: gives the folder of a stage of this run.

    Raises:
        UserError: the stage is not finished, or there is no such folder or module.
    """
    if source.is_stage:
        return source.model, open_artifact(folder(source.model), kind="reward")
    kind = "function" if source.function else "reward"
    return f"score/{source.label}", foreign_artifact(_place_of(source), kind=kind)


def outside_sources(sources: Sequence[Source]) -> dict[str, Path]:
    """Returns where the sources from outside the run lie, by their names as parents."""
    return {f"score/{one.label}": _place_of(one) for one in sources if not one.is_stage}


def _place_of(source: Source) -> Path:
    from pipeline.ppo.functions import function_file

    if source.function:
        return function_file(source.function)
    path = Path(source.model)
    require(
        (path / "config.json").is_file(),
        f"reward.sources: {source.model} is no folder of a model: it has no config.json. Name a "
        "stage of this run (reward, reward_guard), or download the model into a folder",
    )
    return path


def reading_of(artifact: Artifact, *, tokenizer: "Tokenizer") -> "Reading":
    """Returns how a reward model reads text: the policy's tokens where it shares the tokenizer.

    Args:
        artifact: a reward folder of the run, or from elsewhere.
        tokenizer: the policy's.

    Raises:
        UserError: a stage's model has another tokenizer though it was not meant to.
    """
    own = not artifact.stage or bool(artifact.config.get("init_from"))
    return reading_at(artifact.path, tokenizer=tokenizer, own=own)


def reading_at(path: Path, *, tokenizer: "Tokenizer", own: bool) -> "Reading":
    """Returns how the reward model of a folder reads text.

    Args:
        path: the folder.
        tokenizer: the policy's.
        own: whether the model may have another one.

    Raises:
        UserError: it has another one though it may not, or one that cannot be used.
    """
    from pipeline.models import load_tokenizer
    from pipeline.reward.reading import TokenReading, load_reading

    if not own:
        require(
            load_tokenizer(path).get_vocab() == tokenizer.get_vocab(),
            f"{path} has another tokenizer than {tokenizer.name_or_path}. "
            f"Run: {mending_command(path)} FORCE=1",
        )
        return TokenReading(tokenizer)
    reading = load_reading(path)
    same = reading.tokenizer.get_vocab() == tokenizer.get_vocab()
    if same and reading.tokenizer.chat_template == tokenizer.chat_template:
        return TokenReading(tokenizer)
    return reading


def reads_tokens(artifact: Artifact, *, tokenizer: "Tokenizer") -> bool:
    """Returns whether a reward model reads the policy's tokens as they are."""
    from pipeline.reward.reading import TokenReading

    return isinstance(reading_of(artifact, tokenizer=tokenizer), TokenReading)


@dataclass(frozen=True, kw_only=True)
class Loader:
    """Loads what scores a rollout.

    Attributes:
        parents: artifacts by the names of `open_source`.
        roles: the reference is the SFT model at this time; the reward model scores where it can.
        words: behind the prompts of all splits.
        prompts: token ids of those of the training split.
        settings: of the run.
        measured: normalisation constants that were measured, by source.
    """

    parents: dict[str, Artifact]
    roles: "Roles"
    words: "Words"
    prompts: Sequence[list[int]]
    settings: "Settings"
    measured: dict[str, dict[str, float]] = field(default_factory=dict)

    def rewards(self) -> "Rewards":
        """Returns all sources together."""
        from pipeline.ppo.scorers import Rewards

        reward = self.settings.reward
        return Rewards(
            {source.label: self.scorer(source) for source in reward.used_sources},
            [source.weight for source in reward.used_sources],
            reward.combine,
            self.measured,
        )

    def scorer(self, source: Source) -> "Scorer":
        """Returns one source, ready to score."""
        from pipeline.ppo.functions import FunctionScorer
        from pipeline.ppo.scorers import Divided

        if source.function:
            return FunctionScorer(
                source.function, words=self.words, timeout_seconds=source.timeout_seconds
            )
        name = source.model if source.is_stage else f"score/{source.label}"
        model = self.roles.reward_model if source.model == "reward" else None
        raw = not self.settings.reward.normalise
        return Divided(self.by_model(self.parents[name], name=source.label, model=model, raw=raw))

    def by_model(
        self, artifact: Artifact, *, name: str, model: Any | None = None, raw: bool = False
    ) -> "Scorer":
        """Returns one process's scorer by the model in a folder, which is loaded unless given."""
        from pipeline.models import has_constants, load_classifier, take_raw_scores
        from pipeline.ppo.scorers import model_scorer

        reading = reading_of(artifact, tokenizer=self.words.tokenizer)
        if model is None:
            model = load_classifier(artifact.path).to(self.roles.reference.device)
            model.requires_grad_(False)
            if raw:
                take_raw_scores(model)
            elif not has_constants(model):
                self.set_constants(model, reading, name=name)
        return model_scorer(
            model,
            reading,
            words=self.words,
            name=name,
            batch_size=self.settings.microbatch_size,
            workers=self.settings.workers,
        )

    def set_constants(self, model: Any, reading: "Reading", *, name: str) -> None:
        """Measures the normalisation constants that a model's config.json does not have."""
        from pipeline.reward.constants import sample_replies, set_constants
        from pipeline.reward.settings import Normalisation
        from pipeline.sharding import whole

        length = self.settings.max_response_tokens
        with whole(self.roles.reference) as sft:
            prompts, replies = sample_replies(
                sft,
                self.prompts,
                tokenizer=self.words.tokenizer,
                normalisation=Normalisation(num_samples=NUM_SAMPLES, response_tokens=length),
                max_length=context_of(sft.config),
                seed=self.settings.seed,
            )
        set_constants(model, prompts, replies, words=self.words, reading=reading)
        found = {"mean": model.config.reward_mean, "std": model.config.reward_std}
        self.measured[name] = found
        log.info(
            "score/%s: no constants in its config.json; over %d replies of the SFT model mean "
            "%.4f, deviation %.4f", name, NUM_SAMPLES, found["mean"], found["std"],
        )  # fmt: skip
