"""How far vLLM's log-probabilities are from a model's once it was given that model's weights.

python -m tests.vllm_weights qwen3

Prints the largest distance over sampled tokens, after each way in which `ppo` hands weights over.
"""

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from pipeline.ppo.vllm_engines import checkpoint_weights, write_weights
from tests.vllm_on_processors import PROCESSORS, unpacked

SIZES = {
    "vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32,
    "max_position_embeddings": 64, "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0,
    "tie_word_embeddings": True,
}  # fmt: skip
PROMPTS = [[3, 4, 5], [9], [7, 8, 9, 10, 11, 12, 13]]


def model(kind: str, *, seed: int) -> Any:
    """A tiny model whose weights, norms and biases too, are far from where they start."""
    torch.manual_seed(seed)
    made = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZES)).eval()
    with torch.no_grad():
        for weight in made.parameters():
            weight.add_(torch.randn_like(weight) * 0.05)
    return made


@torch.no_grad()
def distance(llm: Any, wanted: Any) -> float:
    """The largest distance in nats over the tokens that vLLM samples."""
    from vllm import SamplingParams

    how = SamplingParams(max_tokens=12, logprobs=0, detokenize=False, ignore_eos=True)
    prompts = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
    gaps = []
    for made in llm.generate(prompts, sampling_params=how, use_tqdm=False):
        (reply,) = made.outputs
        said = [
            at[token].logprob for at, token in zip(reply.logprobs, reply.token_ids, strict=True)
        ]
        ids = torch.tensor([[*made.prompt_token_ids, *reply.token_ids]])
        logits = wanted(input_ids=ids).logits[0, len(made.prompt_token_ids) - 1 : -1]
        ours = logits.log_softmax(dim=1).gather(1, torch.tensor(reply.token_ids)[:, None])[:, 0]
        gaps.append(float((ours - torch.tensor(said)).abs().max()))
    return max(gaps)


def main(kind: str) -> None:
    """Prints the distances as JSON."""
    os.environ |= PROCESSORS
    from vllm import LLM
    from vllm.model_executor.layers import utils

    first, served, colocated = (model(kind, seed=seed) for seed in range(3))
    with (
        tempfile.TemporaryDirectory() as made,
        mock.patch.object(utils, "dispatch_cpu_unquantized_gemm", unpacked),
    ):
        folder = Path(made)
        first.save_pretrained(folder)
        llm = LLM(
            str(folder), dtype="float32", enforce_eager=True, skip_tokenizer_init=True,
            max_model_len=64, logprobs_mode="processed_logprobs", seed=0,
        )  # fmt: skip
        write_weights(served, folder / "new", precision="fp32")
        llm.collective_rpc("reload_weights", kwargs={"weights_path": str(folder / "new")})
        llm.reset_prefix_cache()
        found = {"vllm_server": distance(llm, served)}
        theirs = llm.llm_engine.model_executor.driver_worker.model_runner.model
        for name, weight in checkpoint_weights(colocated):
            theirs.load_weights([(name, weight)])
        llm.reset_prefix_cache()
        found["vllm_colocate"] = distance(llm, colocated)
    sys.stdout.write(f"{json.dumps(found)}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
