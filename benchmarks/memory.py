"""Memory of one PPO update by how the roles share weights: four models, one trunk, one base.

Every run is a process of its own on a random Llama of 61M weights in float32, whose short rows
leave little but weights, gradients and optimizer state to count.

Run     python -m benchmarks.memory          prints the table of docs/ppo.md
"""

import json
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.processes import output_of, peak_mb
from benchmarks.shared_roles import MODES, load_roles, write_adapted_reward

MODULE = "benchmarks.memory"
RUNS = 3
SIZES = {
    "vocab_size": 16384,
    "hidden_size": 640,
    "intermediate_size": 1792,
    "num_hidden_layers": 10,
    "num_attention_heads": 10,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
PROMPTS = [[2 + row, 3, 4, 5] for row in range(8)]


def write_parents(folder: Path) -> None:
    """Writes sft, and reward with the adapter it was merged from."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(folder / "sft")
    write_adapted_reward(folder / "reward", base=folder / "sft")


def update(roles: Any) -> Any:
    """Returns the trainer after one real update."""
    from accelerate import Accelerator

    from pipeline.ppo.settings import KL, Advantage, Optimisation, Reward, Settings
    from pipeline.ppo.trainer import PPOTrainer

    settings = Settings(
        seed=0, updates=1, prompts_per_update=8, minibatch_size=8, microbatch_size=8,
        max_response_tokens=8, temperature=1.0, precision="fp32", workers=1, kl=KL(),
        reward=Reward(), advantage=Advantage(), optimisation=Optimisation(epochs=1),
    )  # fmt: skip
    trainer = PPOTrainer(
        roles, PROMPTS, settings=settings, accelerator=Accelerator(cpu=True), eos_id=1, pad_id=0
    )
    trainer.update(0)
    return trainer


def measure(mode: str, folder: Path) -> dict[str, float]:
    """Returns megabytes of this process and of what it holds, by kind."""
    import torch

    import pipeline.ppo.sharing
    import pipeline.ppo.trainer  # noqa: F401 - the libraries are there before memory is counted

    torch.set_num_threads(1)
    before = peak_mb()
    roles = load_roles(mode, folder / "sft", folder / "reward")
    trainer = update(roles)
    optimiser = trainer.optimiser
    held = [roles.policy.base.model] if mode == "lora" else [roles.policy, roles.reference]
    held += [] if mode == "lora" else [roles.reward_model]
    heads = [role.score for role in (roles.reward_model, roles.value)]
    held += heads if mode != "separate" else [roles.value]
    return {
        "weights": _megabytes(p for module in held for p in module.parameters()),
        "gradients": _megabytes(p for m in optimiser.models.values() for p in m.parameters()),
        "optimizer": _megabytes(
            value
            for optimizer in optimiser.optimizers.values()
            for state in optimizer.state.values()
            for value in state.values()
        ),
        "libraries": before,
        "peak": peak_mb(),
    }


def _megabytes(tensors: Iterable[Any]) -> float:
    """Megabytes of tensors, each storage once."""
    unique = {tensor.data_ptr(): tensor.numel() * tensor.element_size() for tensor in tensors}
    return sum(unique.values()) / 1e6


def main() -> None:
    """Prints one row a mode, the median of all runs."""
    columns = ("weights", "gradients", "optimizer", "libraries", "peak")
    with tempfile.TemporaryDirectory() as folder:
        output_of(MODULE, "parents", folder)
        copy = (Path(folder) / "sft" / "model.safetensors").stat().st_size / 1e6
        sys.stdout.write(f"one copy of the weights: {copy:.0f} MB; medians of {RUNS} runs\n\n")
        sys.stdout.write(
            f"| roles | {' | '.join(columns)} | copies |\n|---|---|---|---|---|---|---|\n"
        )
        for mode in MODES:
            runs = [json.loads(output_of(MODULE, mode, folder)) for _ in range(RUNS)]
            found = {name: median(run[name] for run in runs) for name in columns}
            cells = " | ".join(f"{found[name]:,.0f}" for name in columns)
            sys.stdout.write(f"| {mode} | {cells} | {found['weights'] / copy:.2f} |\n")
            sys.stdout.flush()


if __name__ == "__main__":
    if len(sys.argv) == 1:
        main()
    elif sys.argv[1] == "parents":
        write_parents(Path(sys.argv[2]))
    else:
        sys.stdout.write(json.dumps(measure(sys.argv[1], Path(sys.argv[2]))))
