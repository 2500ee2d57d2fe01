"""The forward passes of an evaluation: replies of both policies and every figure on them."""

from collections.abc import Container, Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline.evaluation.gold import gold_scores
from pipeline.evaluation.likelihood import Batching, divergence, negative_log_likelihood
from pipeline.evaluation.records import Draw, Judged, Record
from pipeline.evaluation.sampling import Reply, Sampling, pad_id_of, sample
from pipeline.ppo.scorers import Scorer
from pipeline.progress import progress
from pipeline.tokenizer import Prompt


@dataclass(frozen=True, kw_only=True)
class Models:
    """The models of an evaluation; the language models have one vocabulary."""

    sft: PreTrainedModel
    ppo: PreTrainedModel
    pretrain: PreTrainedModel
    reward: PreTrainedModel
    scorer: Scorer
    """Normalised scores by the reward model, of rows in the policies' tokens."""
    tokenizer: PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """The prompts one process works on."""

    rows: list[int]
    """Number of each prompt among all prompts of the evaluation."""
    texts: list[str]
    groups: list[str]
    """Conversation of each prompt."""
    tokens: list[list[int]]
    """Token ids, ending where the reply starts."""
    messages: Sequence[Prompt] = ()
    """The same as they stand in the data, for a reward model that reads text; of all prompts."""

    def only(self, chosen: Container[int]) -> "Prompts":
        """Returns the prompts whose row number is chosen."""
        kept = [index for index, row in enumerate(self.rows) if row in chosen]
        return Prompts(
            rows=[self.rows[index] for index in kept],
            texts=[self.texts[index] for index in kept],
            groups=[self.groups[index] for index in kept],
            tokens=[self.tokens[index] for index in kept],
        )


def judge(
    models: Models, *, prompts: Prompts, sampling: Sampling, draws: int, draw_rows: Container[int]
) -> list[Record]:
    """Returns one record per prompt.

    Args:
        models: policies, reward model and the pretrained model.
        prompts: what this process replies to.
        sampling: seed, length limit and batch size; both policies get the same uniform numbers.
        draws: further SFT replies per prompt, for best-of-n.
        draw_rows: numbers of the prompts that get those further replies.
    """
    if not prompts.rows:
        return []
    sft = _reply(models.sft, models=models, prompts=prompts, sampling=sampling, draw=0)
    ppo = _reply(models.ppo, models=models, prompts=prompts, sampling=sampling, draw=0)
    batching = Batching(
        pad_id=pad_id_of(models.tokenizer),
        batch_size=sampling.batch_size,
        workers=sampling.workers,
    )
    apart = divergence(
        models.ppo,
        reference=models.sft,
        prompts=prompts.tokens,
        responses=[reply.tokens for reply in ppo],
        batching=batching,
    )
    further = _draws(models, prompts=prompts, sampling=sampling, draws=draws, chosen=draw_rows)
    columns = zip(
        prompts.rows,
        prompts.texts,
        prompts.groups,
        _judged(models, prompts=prompts, replies=sft, batching=batching),
        _judged(models, prompts=prompts, replies=ppo, batching=batching),
        apart.kl.tolist(),
        apart.k1.tolist(),
        strict=True,
    )
    return [
        Record(
            row=row,
            prompt=text,
            group=group,
            sft=theirs,
            ppo=ours,
            kl=kl,
            k1=k1,
            draws=further.get(row, ()),
        )
        for row, text, group, theirs, ours, kl, k1 in columns
    ]


def _reply(
    policy: PreTrainedModel, *, models: Models, prompts: Prompts, sampling: Sampling, draw: int
) -> list[Reply]:
    return sample(
        policy,
        tokenizer=models.tokenizer,
        prompts=prompts.tokens,
        rows=prompts.rows,
        draw=draw,
        sampling=sampling,
    )


def _rewards(models: Models, *, prompts: Prompts, replies: Sequence[Reply]) -> list[float]:
    return models.scorer(prompts.tokens, [reply.tokens for reply in replies]).tolist()


def _judged(
    models: Models, *, prompts: Prompts, replies: Sequence[Reply], batching: Batching
) -> list[Judged]:
    nll = negative_log_likelihood(
        models.pretrain,
        prompts=prompts.tokens,
        responses=[reply.tokens for reply in replies],
        batching=batching,
    )
    columns = zip(
        replies,
        gold_scores([reply.text for reply in replies]),
        _rewards(models, prompts=prompts, replies=replies),
        nll.tolist(),
        strict=True,
    )
    return [
        Judged(
            text=reply.text,
            num_tokens=len(reply.tokens),
            ended=reply.ended,
            gold=gold,
            reward=reward,
            nll=surprise,
        )
        for reply, gold, reward, surprise in columns
    ]


def _draws(
    models: Models, *, prompts: Prompts, sampling: Sampling, draws: int, chosen: Container[int]
) -> dict[int, tuple[Draw, ...]]:
    """Returns the further SFT replies of each chosen row."""
    some = prompts.only(chosen)
    found: dict[int, list[Draw]] = {row: [] for row in some.rows}
    if not some.rows or not draws:
        return {}
    for draw in progress(range(1, draws + 1), total=draws, description="best-of-n"):
        replies = _reply(models.sft, models=models, prompts=some, sampling=sampling, draw=draw)
        texts = [reply.text for reply in replies]
        rewards = _rewards(models, prompts=some, replies=replies)
        columns = zip(some.rows, texts, gold_scores(texts), rewards, strict=True)
        for row, text, gold, reward in columns:
            found[row].append(Draw(text=text, gold=gold, reward=reward))
    return {row: tuple(values) for row, values in found.items()}
