"""What both sides are given: models on disk, prompts, and rollouts to be learned from."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

PAD, EOS = 0, 1
NUM_PROMPTS, MINIBATCH, EPOCHS = 64, 16, 4
PROMPT_LENGTHS = (32, 64)
RESPONSE_LENGTH = 64
EOS_PROBABILITY = 0.02
"""Of every sampled token: responses of 36 tokens on average, cut at 64."""


@dataclass(frozen=True)
class Workload:
    """A model's sizes, and whether responses end before the budget.

    Attributes:
        ends: False makes every response as long as the budget, where removing padding gains nothing
            but that of the prompts.
    """

    name: str
    layers: int
    width: int
    inner: int
    heads: int
    vocabulary: int
    ends: bool = True

    @property
    def body_weights(self) -> int:
        """Weights of the matrices of all layers."""
        return self.layers * (4 * self.width**2 + 3 * self.width * self.inner)


WORKLOADS = {
    "S": Workload("S", layers=6, width=256, inner=688, heads=8, vocabulary=4096),
    "S-fixed": Workload(
        "S-fixed", layers=6, width=256, inner=688, heads=8, vocabulary=4096, ends=False
    ),
    "M": Workload("M", layers=8, width=512, inner=1376, heads=8, vocabulary=8192),
}


def write(workload: Workload, folder: Path, *, rollouts: int, seed: int = 0) -> None:
    """Writes policy/ (reference too), reward/ (value too) and workload.json.

    The rollouts are drawn from no model: lengths geometric, tokens uniform, so that both sides
    learn from the same rows however they sample.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=workload.vocabulary,
        hidden_size=workload.width,
        intermediate_size=workload.inner,
        num_hidden_layers=workload.layers,
        num_attention_heads=workload.heads,
        max_position_embeddings=max(PROMPT_LENGTHS) + RESPONSE_LENGTH,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    policy = LlamaForCausalLM(config)
    _set_eos_probability(policy, EOS_PROBABILITY if workload.ends else 1e-9)
    policy.save_pretrained(folder / "policy")
    config.num_labels, config.reward_mean, config.reward_std = 1, 0.0, 1.0
    LlamaForSequenceClassification(config).save_pretrained(folder / "reward")
    ids = torch.randint(2, workload.vocabulary, (NUM_PROMPTS, max(PROMPT_LENGTHS))).tolist()
    prompts = [row[: PROMPT_LENGTHS[index % 2]] for index, row in enumerate(ids)]
    content = {
        **asdict(workload),
        "prompts": prompts,
        "rollouts": [_responses(workload) for _ in range(rollouts)],
        "pad": PAD,
        "eos": EOS,
        "response_length": RESPONSE_LENGTH,
        "minibatch": MINIBATCH,
        "epochs": EPOCHS,
    }
    (folder / "workload.json").write_text(json.dumps(content))


def _responses(workload: Workload) -> list[list[int]]:
    import torch

    tokens = torch.randint(2, workload.vocabulary, (NUM_PROMPTS, RESPONSE_LENGTH))
    if not workload.ends:
        return tokens.tolist()
    ended = torch.rand(tokens.shape) < EOS_PROBABILITY
    rows = []
    for row, ends in zip(tokens.tolist(), ended.int().tolist(), strict=True):
        length = ends.index(1) if 1 in ends else RESPONSE_LENGTH
        rows.append([*row[:length], EOS][:RESPONSE_LENGTH])
    return rows


def _set_eos_probability(policy: object, probability: float) -> None:
    """Gives all hidden states a direction in common, and EOS the logit that belongs to it."""
    import torch

    with torch.no_grad():
        embedding, head = policy.model.embed_tokens.weight, policy.lm_head.weight
        embedding += 0.3 / embedding.shape[1] ** 0.5 * torch.randn(embedding.shape[1]).sign()
        ids = torch.randint(2, len(embedding), (16, 96))
        states = policy.model(input_ids=ids).last_hidden_state.flatten(0, 1)
        mean = states.mean(dim=0)
        others = (states @ head.T).exp().sum(dim=1).mean()
        head[EOS] = mean / mean.square().sum() * torch.log(probability * others)


def needed_work(workload: Workload, prompts: list[int], responses: list[int]) -> dict[str, float]:
    """Returns floating-point operations by phase that the algorithm cannot do without.

    2 a weight and token forward, three times that for training; full attention of real tokens; the
    head on response tokens. Scoring is one pass of reference, critic and reward model: the policy's
    log-probabilities may be kept from sampling.

    Args:
        workload: the sizes.
        prompts: tokens of each prompt.
        responses: tokens of each response.
    """
    tokens = [prompt + response for prompt, response in zip(prompts, responses, strict=True)]
    attention = sum(2 * count * count for count in tokens) * workload.layers * workload.width
    body = 2 * workload.body_weights * sum(tokens) + attention
    head = 2 * workload.vocabulary * workload.width * sum(responses)
    work = {
        "generation": float(body + head),
        "scoring": float(3 * body + head),
        "training": float(EPOCHS * 3 * (2 * body + head)),
    }
    return {**work, "total": sum(work.values())}
