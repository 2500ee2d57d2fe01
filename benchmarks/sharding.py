"""Peak memory of a process of ppo, with whole models and with models divided over the processes.

    python -m benchmarks.sharding --processes=2 --width=512 --layers=8

Four models of random weights, one update of eight short responses. Each measurement is a launch of
its own; a line says what one process held: before the models were loaded, after the update, and the
peak on the way (resident memory, MiB, the larger of the processes).
"""

import argparse
import os
import resource
import subprocess
import sys
from collections.abc import Sequence

import psutil
import torch
from accelerate import Accelerator
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from pipeline.distributed import gather_objects, is_main
from pipeline.ppo.experience import Roles
from pipeline.ppo.settings import KL, Advantage, Optimisation, Reward, Settings
from pipeline.ppo.trainer import PPOTrainer
from pipeline.sharding import Sharded

MIB = 2**20
RETURNED = {"MALLOC_MMAP_THRESHOLD_": str(MIB)}
"""Has glibc give freed memory back at once; else it keeps what layers were gathered in, and the
table shows that instead of what is held."""
VOCABULARY = 8192
PROMPTS = [[2 + row, 3, 4, 5] for row in range(8)]


def model(*, width: int, layers: int, scores: bool) -> torch.nn.Module:
    """Returns a model of random weights; a classifier where it scores."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_labels=1,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
        tie_word_embeddings=False,
    )
    config.reward_mean, config.reward_std = 0.0, 1.0
    kind = LlamaForSequenceClassification if scores else LlamaForCausalLM
    return kind(config).eval()


def roles(*, width: int, layers: int, sharding: str) -> Roles:
    """Returns the four roles, each divided before the next is made."""
    device = torch.device("cpu")

    def placed(role: str) -> torch.nn.Module | Sharded:
        torch.manual_seed(0)
        made = model(width=width, layers=layers, scores=role in ("reward_model", "value"))
        made.requires_grad_(role in ("policy", "value"))
        return Sharded(made, device=device) if sharding == "fsdp2" else made

    return Roles(
        **{name: placed(name) for name in ("policy", "reference", "reward_model", "value")}
    )


def measure(*, width: int, layers: int, sharding: str) -> None:
    """Prints what this process held, when it is the main one."""
    accelerator = Accelerator(cpu=True)
    torch.set_num_threads(1)
    before = psutil.Process().memory_info().rss
    settings = Settings(
        seed=1, updates=2, prompts_per_update=len(PROMPTS), minibatch_size=8, microbatch_size=4,
        max_response_tokens=8, temperature=1.0, precision="fp32", workers=1,
        kl=KL(controller="fixed"), reward=Reward(), advantage=Advantage(),
        optimisation=Optimisation(epochs=1),
    )  # fmt: skip
    made = roles(width=width, layers=layers, sharding=sharding)
    trainer = PPOTrainer(
        made, PROMPTS, settings=settings, accelerator=accelerator, eos_id=1, pad_id=0
    )
    trainer.update(0)
    held = psutil.Process().memory_info().rss
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    found = gather_objects([before, held, peak])
    if is_main():
        before, held, peak = (max(each) / MIB for each in zip(*found, strict=True))
        size = sum(p.numel() for p in made.policy.parameters()) * 4 / MIB
        print(f"{sharding:6} {size:12.0f} {before:8.0f} {held:8.0f} {peak:8.0f}")  # noqa: T201


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0 after a table of both ways, or a child's line of one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--sharding", choices=("none", "fsdp2"))
    parser.add_argument("--num_processes", type=int, help=argparse.SUPPRESS)
    words = parser.parse_args(argv)
    if words.sharding:
        measure(width=words.width, layers=words.layers, sharding=words.sharding)
        return 0
    print("way    policy (MiB)   before    after     peak")  # noqa: T201
    for way in ("none", "fsdp2"):
        launch = [sys.executable, "-m", "pipeline.launch", str(words.processes)]
        sizes = [f"--width={words.width}", f"--layers={words.layers}", f"--sharding={way}"]
        subprocess.run(
            [*launch, "benchmarks.sharding", *sizes], env=RETURNED | os.environ, check=True
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
