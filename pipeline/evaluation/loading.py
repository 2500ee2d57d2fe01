"""The models of an evaluation: readers of their own, and the reward model as it reads text."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pipeline.attention import pack
from pipeline.checkpoint import Artifact
from pipeline.config import require
from pipeline.evaluation.judge import Prompts
from pipeline.models import load_causal_lm, load_reward_model, load_tokenizer
from pipeline.parallel import choose_workers
from pipeline.ppo.scorers import Scorer, model_scorer
from pipeline.ppo.sources import reading_of
from pipeline.reward.reading import Reading, Words

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast


def read_tokenizers(
    parents: Mapping[str, Artifact],
) -> "tuple[PreTrainedTokenizerFast, Reading]":
    """Returns the language models' tokenizer, and how the reward model reads text.

    Raises:
        UserError: language models of different vocabularies, or a reward model of another one that
            was not meant to have it.
    """
    tokenizer = load_tokenizer(parents["sft"].path)
    for name in ("pretrain", "ppo"):
        theirs = load_tokenizer(parents[name].path)
        require(
            theirs.get_vocab() == tokenizer.get_vocab(),
            f"{parents[name].path} has another tokenizer than {parents['sft'].path}; "
            "models of one run must share it",
        )
    return tokenizer, reading_of(parents["reward"], tokenizer=tokenizer)


def load_reader(artifact: Artifact, *, device: Any) -> "PreTrainedModel":
    """Returns a causal LM that reads rows end to end where it can."""
    model = load_causal_lm(artifact.path).to(device)
    pack(model)
    return model


def load_scorer(
    artifact: Artifact,
    prompts: Prompts,
    *,
    reading: Reading,
    tokenizer: "PreTrainedTokenizerFast",
    device: Any,
    batch_size: int,
) -> "tuple[PreTrainedModel, Scorer]":
    """Returns the reward model, and what scores rows in the policies' tokens by it."""
    reward = load_reward_model(artifact.path).to(device)
    scorer = model_scorer(
        reward,
        reading,
        words=Words.behind(prompts.tokens, prompts.messages, tokenizer=tokenizer),
        name="reward",
        batch_size=batch_size,
        workers=choose_workers(0, reward.device),
    )
    return reward, scorer
