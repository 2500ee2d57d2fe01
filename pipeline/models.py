"""Models from a configuration or a folder: policy, reference, reward model and value model."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from pipeline.architecture import Architecture
from pipeline.attention import is_packed
from pipeline.config import require
from pipeline.context import POSITIONS
from pipeline.distributed import on_gpu
from pipeline.errors import UserError, told
from pipeline.logprobs import wide
from pipeline.lora import keep_differentiable
from pipeline.manifest import mending_command
from pipeline.origin import Origin
from pipeline.parallel import side_by_side
from pipeline.pretrained import from_pretrained
from pipeline.sequences import by_length, collate, states_at
from pipeline.shapes import is_number, is_whole
from pipeline.sharding import in_one_pass
from pipeline.storage import read_json
from pipeline.streams import stream
from pipeline.tokenizer import encode_prompt, render_prompt
from pipeline.weights import BEST, check_it_continues, check_it_writes, load_whole

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

SMALLEST_STD = 1e-9
"""Smallest deviation of scores that means anything; by less they would be divided to infinity."""


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

    _check_sizes(architecture.options)
    try:
        config = AutoConfig.for_model(architecture.model_type)
    except ValueError as error:
        raise UserError(f"architecture.model_type: {architecture.model_type!r} unknown") from error
    positions = {POSITIONS: max_length} if hasattr(config, POSITIONS) else {}
    options = {**positions, **architecture.options}
    unknown = [name for name in options if not hasattr(config, name)]
    require(not unknown, f"architecture.options: {architecture.model_type} has no {unknown}")
    with told(f"architecture: no {architecture.model_type} could be made"):
        config = AutoConfig.for_model(
            architecture.model_type,
            **options,
            vocab_size=len(tokenizer),
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        torch.manual_seed(stream(seed, "initialisation"))
        model = AutoModelForCausalLM.from_config(config, attn_implementation=BEST)
    check_it_continues(model, "architecture.model_type")
    return model


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


def load_causal_lm(path: Path | str, *, quantisation: Any = None) -> "PreTrainedModel":
    """Returns the causal LM of a folder or hub id in evaluation mode.

    In float32, or as `pipeline.lora.quantisation` says.

    Raises:
        UserError: no model could be loaded from there, or one that scores texts lies there.
    """
    from transformers import AutoModelForCausalLM

    check_it_writes(Path(path))
    model = _load(AutoModelForCausalLM, path, quantization_config=quantisation)
    check_it_continues(model, str(path))
    if quantisation is not None:
        keep_differentiable(model)
    return model


def load_origin(origin: Origin, *, quantisation: Any = None) -> "PreTrainedModel":
    """Returns the causal LM to start from in evaluation mode.

    In float32, or one of safetensors as `pipeline.lora.quantisation` says. The weights of a GGUF
    file are unpacked while they are loaded: a model that counts as quantised could neither be
    trained nor saved.

    Raises:
        UserError: no model could be loaded from there.
    """
    from transformers import AutoModelForCausalLM, GgufConfig

    if origin.gguf_file is None:
        return load_causal_lm(origin.path, quantisation=quantisation)
    model = _load(
        AutoModelForCausalLM,
        origin.path,
        gguf_file=origin.gguf_file,
        quantization_config=GgufConfig(dequantize=True),
    )
    check_it_continues(model, origin.gguf_file)
    return model


def load_classifier(path: Path | str) -> "PreTrainedModel":
    """Returns the sequence classifier of a folder in float32, in evaluation mode.

    Raises:
        UserError: it has not exactly one label, or normalisation constants that are none.
    """
    from transformers import AutoConfig, AutoModelForSequenceClassification

    with told(f"{path}: no model could be loaded from there"):
        labels = from_pretrained(AutoConfig, path, weights=False).num_labels
    require(labels == 1, f"{path} is no reward model: it has several labels")
    model = _load(AutoModelForSequenceClassification, path)
    if has_constants(model):
        mean, std = model.config.reward_mean, model.config.reward_std
        require(
            is_number(mean) and is_number(std) and std > SMALLEST_STD,
            f"{path}/config.json: reward_mean {mean!r} and reward_std {std!r} normalise nothing. "
            f"Run: {mending_command(Path(path))} FORCE=1",
        )
    return model


def load_reward_model(path: Path | str) -> "PreTrainedModel":
    """Returns the reward model of a stage's folder in float32, in evaluation mode.

    Raises:
        UserError: it has not exactly one label, or lacks the normalisation constants.
    """
    model = load_classifier(path)
    require(
        has_constants(model),
        f"{path}/config.json lacks reward_mean and reward_std. "
        f"Run: {mending_command(Path(path))} FORCE=1",
    )
    return model


def has_constants(model: Any) -> bool:
    """Returns whether a reward model knows mean and deviation of the SFT model's scores."""
    return {"reward_mean", "reward_std"} <= model.config.to_dict().keys()


def reads_last_token(model: Any) -> bool:
    """Returns whether a classifier reads its score at the last token, as decoders do.

    Transformers calls the head `score` there, and otherwise in encoders.
    """
    return "score" in dict(model.named_children())


def load_with_new_head(
    path: Path | str, *, pad_id: int, seed: int = 0, quantisation: Any = None
) -> "PreTrainedModel":
    """Returns a classifier with one label, its last layer 0, on the body of the model in a folder.

    Layers between body and last layer, which encoders have, are drawn as Transformers does. In
    float32, or the body as `pipeline.lora.quantisation` says.
    """
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(stream(seed, "head"))
    model = _load(
        AutoModelForSequenceClassification,
        path,
        new_head=True,
        num_labels=1,
        quantization_config=quantisation,
    )
    if quantisation is not None:
        keep_differentiable(model)
    model.config.pad_token_id = pad_id
    model.config.id2label, model.config.label2id = {0: "score"}, {"score": 0}
    with torch.no_grad():
        for parameter in head_of(model).parameters():
            parameter.zero_()
    return model


def head_of(model: Any) -> nn.Linear:
    """Returns the layer that gives the score: the last linear one with a single output."""
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
    return [layer for layer in layers if layer.out_features == 1][-1]


def _load(auto_class: Any, path: Path | str, **options: Any) -> "PreTrainedModel":
    model = load_whole(
        auto_class,
        path,
        dtype=torch.float32,
        attn_implementation=BEST,
        use_safetensors=True,
        **options,
    )
    return model.eval()


def load_tokenizer(path: Path | str) -> "PreTrainedTokenizerFast":
    """Returns the tokenizer of a folder or hub id.

    Raises:
        UserError: none there, no chat template, or padding that equals the end of sequence.
    """
    from transformers import AutoTokenizer

    with told(f"{path}: no tokenizer could be loaded from there"):
        tokenizer = from_pretrained(AutoTokenizer, path, weights=False)
    require(tokenizer.chat_template is not None, f"{path}: the tokenizer has no chat template")
    require(tokenizer.eos_token_id is not None, f"{path}: the tokenizer has no EOS token")
    require(
        tokenizer.pad_token_id is not None and tokenizer.pad_token_id != tokenizer.eos_token_id,
        f"{path}: the tokenizer's PAD must be a token of its own, not EOS",
    )
    require(
        bool(encode_prompt(tokenizer, "hello")) and "hello" in render_prompt(tokenizer, "hello"),
        f"{path}: the tokenizer's chat template makes nothing of a prompt",
    )
    _check_ids(tokenizer, Path(path) / "config.json")
    return tokenizer


def _check_ids(tokenizer: Any, config: Path) -> None:
    """Raises UserError where a token has no row in the embeddings of the model beside it.

    Without a model there is to be a row per token.
    """
    beside = read_json(config) if config.is_file() else {"vocab_size": len(tokenizer)}
    rows: Any = beside.get("vocab_size") if isinstance(beside, dict) else None
    highest = max(tokenizer.get_vocab().values(), default=0)
    require(
        not is_whole(rows) or highest < rows,
        f"{config.parent}: the tokenizer has a token of id {highest}, and a model of it {rows} "
        "rows of embeddings",
    )


def take_constants(model: Any, config: Any) -> None:
    """Gives a reward model the normalisation constants of a configuration."""
    for name in ("reward_mean", "reward_std"):
        setattr(model.config, name, getattr(config, name))


def take_raw_scores(model: Any) -> None:
    """Sets a reward or value model's constants so that it says what its head says."""
    model.config.reward_mean, model.config.reward_std = 0.0, 1.0


def choose_precision(wanted: str) -> str:
    """Returns bf16 or fp32: as wanted, or for "auto" bf16 where what computes does so natively."""
    require(wanted in ("auto", "bf16", "fp32"), f"precision: auto, bf16 or fp32, got {wanted!r}")
    if wanted != "auto":
        return wanted
    if on_gpu():
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return "bf16" if native else "fp32"
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
    batch = collate(prompts, responses, pad_id=pad_id, packed=is_packed(model)).to(model.device)
    wanted = torch.zeros_like(batch.response_mask)
    wanted[batch.last()] = True

    def raw_scores() -> Tensor:
        raw: Tensor = model.score(states_at(model, batch, wanted))[:, 0]
        return raw

    return wide(in_one_pass(model, raw_scores))


@torch.no_grad()
def score_responses(
    model: Any,
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    *,
    pad_id: int,
    batch_size: int = 256,
    workers: int = 1,
) -> Float[Tensor, "response"]:
    """Returns the reward model's normalised scores, (raw - reward_mean) / reward_std.

    Rows are scored in the order of their lengths, so that batches hold little padding; `workers`
    batches at the same time.
    """
    lengths = [len(p) + len(r) for p, r in zip(prompts, responses, strict=True)]
    batches = by_length(lengths, batch_size=batch_size)

    def raw_scores(chosen: list[int]) -> Float[Tensor, "batch"]:
        rows = [prompts[i] for i in chosen], [responses[i] for i in chosen]
        return last_token_scores(model, *rows, pad_id=pad_id).cpu()

    scores = torch.zeros(len(lengths))
    found = side_by_side(raw_scores, batches, workers=workers)
    for chosen, raw in zip(batches, found, strict=True):
        scores = scores.to(raw.dtype)  # float64 stays float64
        scores[chosen] = raw
    return (scores - model.config.reward_mean) / model.config.reward_std


def pad_right(
    sequences: Sequence[Sequence[int]], *, pad_id: int, separator: int | None = None
) -> dict[str, Int[Tensor, "text time"]]:
    """Returns right-padded sequences as a model takes them: attention_mask is 1 on real tokens.

    Args:
        sequences: token ids.
        pad_id: token id of the padding.
        separator: token that ends the first segment of two, as token_type_ids then say; None
            leaves them out.
    """
    width = max(map(len, sequences))
    input_ids = torch.full((len(sequences), width), pad_id)
    attention_mask = torch.zeros(len(sequences), width, dtype=torch.long)
    for row, sequence in enumerate(sequences):
        input_ids[row, : len(sequence)] = torch.tensor(sequence)
        attention_mask[row, : len(sequence)] = 1
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
    if separator is not None:
        ends = (input_ids == separator).long()
        second = (ends.cumsum(dim=1) - ends > 0).long()  # a separator belongs to what it ends
        inputs["token_type_ids"] = second * attention_mask
    return inputs


@torch.no_grad()
def whole_text_scores(
    model: Any,
    sequences: Sequence[Sequence[int]],
    *,
    pad_id: int,
    separator: int | None = None,
    batch_size: int = 64,
    workers: int = 1,
) -> Float[Tensor, "text"]:
    """Returns the raw scores of a classifier's own forward pass, of whichever kind it is."""
    batches = by_length([len(ids) for ids in sequences], batch_size=batch_size)

    def raw_scores(chosen: list[int]) -> Float[Tensor, "batch"]:
        inputs = pad_right([sequences[row] for row in chosen], pad_id=pad_id, separator=separator)
        inputs = {name: ids.to(model.device) for name, ids in inputs.items()}
        raw: Tensor = model(**inputs, use_cache=False).logits[:, 0].float().cpu()
        return raw

    scores = torch.zeros(len(sequences))
    found = side_by_side(raw_scores, batches, workers=workers)
    for chosen, raw in zip(batches, found, strict=True):
        scores[chosen] = raw
    return scores
