"""Replies of a policy to a list of prompts, at temperature-only sampling."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline.checkpoint import open_artifact
from pipeline.context import context_of, fits
from pipeline.errors import UserError, told
from pipeline.evaluation.prompt_files import Prompt
from pipeline.manifest import MANIFEST
from pipeline.models import load_causal_lm
from pipeline.ppo.rollout import generate, uniforms
from pipeline.pretrained import from_pretrained
from pipeline.progress import progress
from pipeline.streams import stream
from pipeline.tokenizer import decode_response, encode_prompt


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How replies are drawn: `workers` batches side by side."""

    seed: int
    max_response_tokens: int
    temperature: float = 1.0
    batch_size: int = 128
    workers: int = 1


@dataclass(frozen=True, kw_only=True)
class Reply:
    """One reply: its tokens (EOS included where it ended), its text, whether it ended."""

    tokens: list[int]
    text: str
    ended: bool


def sample(
    model: Any,
    *,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    rows: Sequence[int],
    draw: int,
    sampling: Sampling,
) -> list[Reply]:
    """Returns one reply per prompt.

    The uniform numbers belong to (seed, draw, row), so two policies that are given the same draw
    and rows differ only by what they would say, and the work can be cut between processes.

    Args:
        model: causal language model, or a role that reads through one.
        tokenizer: its tokenizer.
        prompts: prompt token ids, ending where the reply starts.
        rows: number of each prompt among all prompts of the evaluation.
        draw: number of the reply to the same prompt.
        sampling: seed, length limit, temperature, rows at a time.
    """
    eos_id = int(tokenizer.eos_token_id)
    numbers = uniforms(
        stream(sampling.seed, "evaluate"),
        update=draw,
        rows=list(rows),
        positions=sampling.max_response_tokens,
    )
    with torch.inference_mode():
        sampled = generate(
            model,
            list(prompts),
            uniforms=numbers,
            temperature=sampling.temperature,
            eos_id=eos_id,
            pad_id=pad_id_of(tokenizer),
            batch_size=sampling.batch_size,
            workers=sampling.workers,
        )
    return [_reply(list(ids), tokenizer=tokenizer, eos_id=eos_id) for ids in sampled.responses]


def pad_id_of(tokenizer: PreTrainedTokenizerBase) -> int:
    """Returns the id that fills rows up; EOS where a foreign tokenizer has no PAD (masked)."""
    pad_id = tokenizer.pad_token_id
    return int(tokenizer.eos_token_id if pad_id is None else pad_id)


def load_any(path: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Returns the causal language model of any folder, and its tokenizer.

    A folder with a manifest is verified; the tokenizer may lack a chat template or a PAD.

    Raises:
        UserError: no such model or tokenizer, or a tokenizer without EOS.
    """
    from transformers import AutoTokenizer

    if (Path(path) / MANIFEST).is_file():
        open_artifact(Path(path), kind="causal-lm")
    elif not (Path(path) / "config.json").is_file():
        raise UserError(f"{path} is no folder of a causal language model: it has no config.json")
    model = load_causal_lm(path)
    with told(f"{path}: no tokenizer could be loaded from there"):
        tokenizer = from_pretrained(AutoTokenizer, path, weights=False)
    if tokenizer.eos_token_id is None:
        raise UserError(f"{path}: the tokenizer has no EOS token, so replies would never end")
    return model, tokenizer


def reply_to_all(
    model: PreTrainedModel,
    *,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    rows: Sequence[int],
    sampling: Sampling,
) -> list[Reply]:
    """Returns one reply per prompt, a batch at a time under a progress bar.

    Args:
        model: causal language model.
        tokenizer: its tokenizer; where it has no chat template, prompts are continued as text.
        prompts: texts or conversations.
        rows: number of each prompt, which decides its uniform numbers.
        sampling: seed, length limit, temperature, rows at a time.

    Raises:
        UserError: a prompt too long for the model, or a conversation without a chat template.
    """
    tokens = [_encode(tokenizer, prompt) for prompt in prompts]
    for row, ids in zip(rows, tokens, strict=True):
        if not fits(model.config, len(ids) + sampling.max_response_tokens):
            raise UserError(
                f"generate.prompts, prompt {row + 1}: {len(ids)} tokens and a reply of up to "
                f"{sampling.max_response_tokens} exceed the model's context of "
                f"{context_of(model.config)}; shorten it or lower generate.max_response_tokens"
            )
    size, replies = sampling.batch_size, []
    starts = range(0, len(tokens), size)
    for start in progress(starts, total=len(starts), description="generate"):
        replies += sample(
            model,
            tokenizer=tokenizer,
            prompts=tokens[start : start + size],
            rows=rows[start : start + size],
            draw=0,
            sampling=sampling,
        )
    return replies


def _encode(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> list[int]:
    if tokenizer.chat_template is not None:
        return encode_prompt(tokenizer, prompt)
    if isinstance(prompt, str):
        with told("generate.prompts: the tokenizer fails"):
            return list(tokenizer(prompt).input_ids)
    raise UserError("generate.prompts: a conversation needs a model whose tokenizer has a template")


def _reply(ids: list[int], *, tokenizer: PreTrainedTokenizerBase, eos_id: int) -> Reply:
    ended = bool(ids) and ids[-1] == eos_id
    return Reply(tokens=ids, text=decode_response(tokenizer, ids), ended=ended)
