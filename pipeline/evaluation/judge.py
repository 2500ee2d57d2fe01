"""The forward passes of an evaluation: replies of both policies and every figure on them.

The policies speak, then the pretrained model reads, then the reward model scores: none has to be
there longer than that.
"""

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline.evaluation.gold import gold_scores
from pipeline.evaluation.likelihood import Batching, Divergence, divergence, negative_log_likelihood
from pipeline.evaluation.records import Draw, Judged, Record
from pipeline.evaluation.sampling import Reply, Sampling, pad_id_of, sample
from pipeline.ppo.scorers import Scorer
from pipeline.progress import progress
from pipeline.tokenizer import Prompt


@dataclass(frozen=True, kw_only=True)
class Policies:
    """The two that are held against each other; they have one vocabulary.

    Attributes:
        sft: causal LM, or a role that reads through one.
        ppo: the same.
        tokenizer: of both.
        on_one_base: whether they are roles on one base, which reads by one adapter at a time.
    """

    sft: Any
    ppo: Any
    tokenizer: PreTrainedTokenizerBase
    on_one_base: bool = False


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


@dataclass(frozen=True, kw_only=True)
class Said:
    """What both policies said to some prompts, before anything judges it.

    Attributes:
        prompts: what one process replied to.
        sft: replies, one to each.
        ppo: replies, one to each.
        apart: divergence of PPO from SFT on the replies of PPO; None without prompts.
        draws: further SFT replies of the chosen prompts, by their row numbers.
    """

    prompts: Prompts
    sft: list[Reply] = field(default_factory=list)
    ppo: list[Reply] = field(default_factory=list)
    apart: Divergence | None = None
    draws: Mapping[int, list[Reply]] = field(default_factory=dict)


def converse(
    policies: Policies,
    *,
    prompts: Prompts,
    sampling: Sampling,
    draws: int,
    draw_rows: Container[int],
) -> Said:
    """Returns what both policies say.

    Args:
        policies: SFT and PPO.
        prompts: what this process replies to.
        sampling: seed, length limit and batch size; both policies get the same uniform numbers.
        draws: further SFT replies per prompt, for best-of-n.
        draw_rows: numbers of the prompts that get those further replies.
    """
    if not prompts.rows:
        return Said(prompts=prompts)

    def replies(policy: Any, some: Prompts, draw: int) -> list[Reply]:
        return sample(
            policy,
            tokenizer=policies.tokenizer,
            prompts=some.tokens,
            rows=some.rows,
            draw=draw,
            sampling=sampling,
        )

    ppo = replies(policies.ppo, prompts, 0)
    some = prompts.only(draw_rows)
    further: dict[int, list[Reply]] = {row: [] for row in some.rows}
    numbers = range(1, draws + 1) if some.rows else range(0)
    batching = batching_of(policies.tokenizer, sampling)
    for draw in progress(numbers, total=len(numbers), description="best-of-n"):
        for row, reply in zip(some.rows, replies(policies.sft, some, draw), strict=True):
            further[row].append(reply)
    return Said(
        prompts=prompts,
        sft=replies(policies.sft, prompts, 0),
        ppo=ppo,
        apart=divergence(
            policies.ppo,
            reference=policies.sft,
            prompts=prompts.tokens,
            responses=[reply.tokens for reply in ppo],
            batching=replace(batching, workers=1) if policies.on_one_base else batching,
        ),
        draws=further,
    )


def batching_of(tokenizer: PreTrainedTokenizerBase, sampling: Sampling) -> Batching:
    """Returns how rows are put together to be read, as many as were sampled together."""
    return Batching(
        pad_id=pad_id_of(tokenizer), batch_size=sampling.batch_size, workers=sampling.workers
    )


def surprises(pretrain: PreTrainedModel, said: Said, *, batching: Batching) -> list[list[float]]:
    """Returns the nats in which the pretrained model reads each reply, of SFT and of PPO."""
    return [
        negative_log_likelihood(
            pretrain,
            prompts=said.prompts.tokens,
            responses=[reply.tokens for reply in replies],
            batching=batching,
        ).tolist()
        if replies
        else []
        for replies in (said.sft, said.ppo)
    ]


def judged(said: Said, *, nll: Sequence[list[float]], scorer: Scorer) -> list[Record]:
    """Returns one record per prompt.

    Args:
        said: by both policies.
        nll: of `surprises`.
        scorer: normalised scores by the reward model, of rows in the policies' tokens.
    """
    if said.apart is None:
        return []
    prompts = said.prompts
    sft, ppo = (
        _with_scores(prompts.tokens, replies, nll=surprise, scorer=scorer)
        for replies, surprise in zip((said.sft, said.ppo), nll, strict=True)
    )
    draws = _drawn(said, scorer=scorer)
    columns = zip(
        prompts.rows,
        prompts.texts,
        prompts.groups,
        sft,
        ppo,
        said.apart.kl.tolist(),
        said.apart.k1.tolist(),
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
            draws=draws.get(row, ()),
        )
        for row, text, group, theirs, ours, kl, k1 in columns
    ]


def _with_scores(
    prompts: Sequence[list[int]], replies: Sequence[Reply], *, nll: list[float], scorer: Scorer
) -> list[Judged]:
    columns = zip(
        replies,
        gold_scores([reply.text for reply in replies]),
        scorer(prompts, [reply.tokens for reply in replies]).tolist(),
        nll,
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


def _drawn(said: Said, *, scorer: Scorer) -> dict[int, tuple[Draw, ...]]:
    """Returns the further SFT replies of each chosen row; all first ones are scored together."""
    tokens = dict(zip(said.prompts.rows, said.prompts.tokens, strict=True))
    rows = list(said.draws)
    found: dict[int, list[Draw]] = {row: [] for row in rows}
    for replies in zip(*said.draws.values(), strict=True):
        texts = [reply.text for reply in replies]
        rewards = scorer([tokens[row] for row in rows], [reply.tokens for reply in replies])
        columns = zip(rows, texts, gold_scores(texts), rewards.tolist(), strict=True)
        for row, text, gold, reward in columns:
            found[row].append(Draw(text=text, gold=gold, reward=reward))
    return {row: tuple(drawn) for row, drawn in found.items()}
