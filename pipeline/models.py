"""Models from a configuration or a folder: policy, reference, reward model and value model."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from pipeline.architecture import Architecture
from pipeline.config import require
from pipeline.errors import UserError
from pipeline.origin import Origin
from pipeline.sequences import collate

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast


def build_causal_lm(
    architecture: Architecture,
    *,
    tokenizer: "PreTrainedTokenizerFast",
    max_length: int,
    seed: int,
) -> "PreTrainedModel":
    """Returns a causal LM with random weights, sized to the tokenizer.

    Raises:
        UserError: unknown model_type or option, or sizes that do not divide.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    options = {"max_position_embeddings": max_length, **architecture.options}
    _check_sizes(options)
    try:
        config = AutoConfig.for_model(architecture.model_type)
    except ValueError as error:
        raise UserError(f"architecture.model_type: {architecture.model_type!r} unknown") from error
    unknown = [name for name in options if not hasattr(config, name)]
    require(not unknown, f"architecture.options: {architecture.model_type} has no {unknown}")
    config = AutoConfig.for_model(
        architecture.model_type,
        **options,
        vocab_size=len(tokenizer),
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(seed)
    try:
        return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    except (ValueError, KeyError) as error:
        raise UserError(f"architecture: {architecture.model_type}: {error}") from error


def _check_sizes(options: dict[str, Any]) -> None:
    hidden, heads = options.get("hidden_size"), options.get("num_attention_heads")
    groups = options.get("num_key_value_heads")
    if hidden and heads and "head_dim" not in options:
        require(
            hidden % heads == 0,
            f"architecture.options: hidden_size {hidden} is not a multiple of "
            f"num_attention_heads {heads}",
        )
    if heads and groups:
        require(
            heads % groups == 0,
            f"architecture.options: num_attention_heads {heads} is not a multiple of "
            f"num_key_value_heads {groups}",
        )


def load_causal_lm(path: Path | str) -> "PreTrainedModel":
    """Returns the causal LM of a folder or hub id in float32, in evaluation mode."""
    from transformers import AutoModelForCausalLM

    return _load(AutoModelForCausalLM, path)


def load_origin(origin: Origin) -> "PreTrainedModel":
    """Returns the causal LM to start from in float32, in evaluation mode.

    The weights of a GGUF file are unpacked while they are loaded: a model that counts as quantised
    could neither be trained nor saved.

    Raises:
        UserError: no model could be loaded from there.
    """
    from transformers import AutoModelForCausalLM, GgufConfig

    if origin.gguf_file is None:
        return load_causal_lm(origin.path)
    return _load(
        AutoModelForCausalLM,
        origin.path,
        gguf_file=origin.gguf_file,
        quantization_config=GgufConfig(dequantize=True),
    )


def load_reward_model(path: Path | str) -> "PreTrainedModel":
    """Returns the reward model of a folder in float32, in evaluation mode.

    Raises:
        UserError: it has not exactly one label, or lacks the normalisation constants.
    """
    from transformers import AutoModelForSequenceClassification

    model = _load(AutoModelForSequenceClassification, path)
    require(model.config.num_labels == 1, f"{path} is no reward model: it has several labels")
    require(
        hasattr(model.config, "reward_mean") and hasattr(model.config, "reward_std"),
        f"{path}/config.json lacks reward_mean and reward_std. Run: make reward",
    )
    return model


def _load(auto_class: Any, path: Path | str, **options: Any) -> "PreTrainedModel":
    try:
        model = auto_class.from_pretrained(
            path, dtype=torch.float32, attn_implementation="sdpa", use_safetensors=True, **options
        )
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: no model could be loaded from there ({error})") from error
    return model.eval()


def load_tokenizer(path: Path | str) -> "PreTrainedTokenizerFast":
    """Returns the tokenizer of a folder or hub id.

    Raises:
        UserError: none there, no chat template, or padding that equals the end of sequence.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: no tokenizer could be loaded from there ({error})") from error
    require(tokenizer.chat_template is not None, f"{path}: the tokenizer has no chat template")
    require(tokenizer.eos_token_id is not None, f"{path}: the tokenizer has no EOS token")
    require(
        tokenizer.pad_token_id is not None and tokenizer.pad_token_id != tokenizer.eos_token_id,
        f"{path}: the tokenizer's PAD must be a token of its own, not EOS",
    )
    return tokenizer


def take_raw_scores(model: Any) -> None:
    """Sets a reward or value model's constants so that it says what its head says."""
    model.config.reward_mean, model.config.reward_std = 0.0, 1.0


def choose_precision(wanted: str) -> str:
    """Returns bf16 or fp32: as wanted, or for "auto" bf16 where the processor computes in it."""
    require(wanted in ("auto", "bf16", "fp32"), f"precision: auto, bf16 or fp32, got {wanted!r}")
    if wanted != "auto":
        return wanted
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported() else "fp32"
    capability = torch.backends.cpu.get_cpu_capability()
    flags = Path("/proc/cpuinfo")
    has_bf16 = flags.is_file() and "avx512_bf16" in flags.read_text(encoding="utf-8")
    return "bf16" if has_bf16 and "AVX512" in capability else "fp32"


def last_token_scores(
    model: Any,
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    *,
    pad_id: int,
) -> Float[Tensor, "batch"]:
    """Returns raw scores read at the last real token of each row, float32 or wider."""
    batch = collate(prompts, responses, pad_id=pad_id).to(model.device)
    hidden = model.base_model(**batch.inputs(), use_cache=False).last_hidden_state
    last = batch.attention_mask.sum(dim=1) - 1
    rows = torch.arange(len(last), device=last.device)
    raw: Tensor = model.score(hidden[rows, last])[:, 0]
    return raw.to(torch.promote_types(raw.dtype, torch.float32))


@torch.no_grad()
def score_responses(
    model: Any,
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    *,
    pad_id: int,
    batch_size: int = 256,
) -> Float[Tensor, "response"]:
    """Returns the reward model's normalised scores, (raw - reward_mean) / reward_std.

    Rows are scored in the order of their lengths, so that batches hold little padding.
    """
    lengths = [len(p) + len(r) for p, r in zip(prompts, responses, strict=True)]
    order = sorted(range(len(lengths)), key=lambda index: lengths[index])
    scores = torch.zeros(len(order))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        raw = last_token_scores(
            model, [prompts[i] for i in chosen], [responses[i] for i in chosen], pad_id=pad_id
        )
        scores = scores.to(raw.dtype)  # float64 stays float64
        scores[chosen] = raw.cpu()
    return (scores - model.config.reward_mean) / model.config.reward_std
