"""Time of the language-model loss and its gradients: plain, ours in chunks, TRL's in chunks.

The three take turns on the same hidden states and head; each row gives medians over the rounds, and
the smallest and largest ratio to the plain loss of the same round.

Run     python -m benchmarks.language_loss          prints the table of docs/LOG.md
"""

import sys
import time
from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from trl.trainer import utils as trl_utils

from pipeline.language_loss import token_nll

TOKENS, WIDTH = 2048, 128
VOCABULARIES = (4096, 8192, 16384)
ROUNDS = 7


def plain(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """Returns the loss by all logits at once."""
    return cross_entropy(hidden @ head.T, targets, reduction="sum")


def trl(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """Returns the loss as TRL's SFTTrainer computes it."""
    chunk = trl_utils._CHUNKED_LOGPROB_CHUNK_SIZE  # noqa: SLF001 - what its trainer passes
    function = trl_utils._ChunkedLogProbFunction  # noqa: SLF001 - there is no public name
    outputs = function.apply(
        hidden, head, None, targets, 1.0, chunk, None, 1.0, ("log_probs", "entropy", "is_top1")
    )
    return -outputs[0].sum()


def seconds(loss: Callable[[Tensor, Tensor, Tensor], Tensor], batch: tuple[Tensor, ...]) -> float:
    """Returns how long loss and gradients take."""
    hidden, head, targets = batch
    started = time.perf_counter()
    torch.autograd.grad(loss(hidden, head, targets), (hidden, head))
    return time.perf_counter() - started


def write(line: str) -> None:
    """Writes a line of the table."""
    sys.stdout.write(line + "\n")


def main() -> None:
    """Prints the table."""
    write(f"{torch.get_num_threads()} threads, {TOKENS} tokens of width {WIDTH}, {ROUNDS} rounds\n")
    write("| vocabulary | plain, s | ours, s | TRL's, s | ours / plain | TRL's / plain |")
    write("|---|---|---|---|---|---|")
    for vocabulary in VOCABULARIES:
        torch.manual_seed(0)
        batch = (
            torch.randn(TOKENS, WIDTH, requires_grad=True),
            (0.1 * torch.randn(vocabulary, WIDTH)).requires_grad_(),
            torch.randint(vocabulary, (TOKENS,)),
        )
        kinds = (plain, token_nll, trl)
        for kind in kinds:
            seconds(kind, batch)  # the first call of each allocates
        rounds = [[seconds(kind, batch) for kind in kinds] for _ in range(ROUNDS)]
        times = " | ".join(f"{median(column):.3f}" for column in zip(*rounds, strict=True))
        ratios = " | ".join(
            f"{median(r):.2f} ({min(r):.2f} to {max(r):.2f})"
            for r in ([one[kind] / one[0] for one in rounds] for kind in (1, 2))
        )
        write(f"| {vocabulary:,} | {times} | {ratios} |")


if __name__ == "__main__":
    main()
