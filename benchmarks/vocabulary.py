"""Memory and time of a policy's log-probabilities and entropies by vocabulary and tokens.

Forward and backward through a head of width 64, all tokens at once and in pieces; every figure is a
process of its own, and what its libraries, head and states took before is taken off.

Run     python -m benchmarks.vocabulary          prints the table of docs/performance.md
"""

import json
import sys
import time

from benchmarks.processes import output_of, peak_mb

VOCABULARIES = (8192, 131072)
TOKENS = (512, 2048)
WIDTH = 64


def measure(vocabulary: int, num_tokens: int, piece: int) -> dict[str, float]:
    """Returns seconds of one forward and backward pass, and megabytes added to this process."""
    import torch

    from pipeline import sequences

    class Head(torch.nn.Module):
        """A model that is nothing but its head."""

        def __init__(self) -> None:
            super().__init__()
            self.head = torch.nn.Linear(WIDTH, vocabulary, bias=False)
            self.head.weight.grad = torch.zeros_like(self.head.weight)

        def get_output_embeddings(self) -> torch.nn.Module:
            """Returns the head."""
            return self.head

    torch.manual_seed(0)
    torch.set_num_threads(1)
    model, states = Head(), torch.randn(num_tokens, WIDTH, requires_grad=True)
    tokens = torch.randint(vocabulary, (num_tokens,))
    sequences.PIECE_TOKENS = piece
    before, start = peak_mb(), time.perf_counter()
    logprobs, entropy = sequences.token_logprobs_and_entropy(model, states, tokens)
    (logprobs.mean() + 0.01 * entropy.mean()).backward()
    return {"seconds": time.perf_counter() - start, "megabytes": peak_mb() - before}


def main() -> None:
    """Prints one row a vocabulary and number of tokens."""
    from pipeline.sequences import PIECE_TOKENS

    sys.stdout.write("| vocabulary | tokens | at once, MB | in pieces, MB | at once, s |")
    sys.stdout.write(" in pieces, s |\n|---|---|---|---|---|---|\n")
    for vocabulary in VOCABULARIES:
        for num_tokens in TOKENS:
            whole, parts = (
                json.loads(output_of("benchmarks.vocabulary", vocabulary, num_tokens, piece))
                for piece in (num_tokens, PIECE_TOKENS)
            )
            cells = f"{whole['megabytes']:,.0f} | {parts['megabytes']:,.0f}"
            times = f"{whole['seconds']:.2f} | {parts['seconds']:.2f}"
            sys.stdout.write(f"| {vocabulary:,} | {num_tokens:,} | {cells} | {times} |\n")
            sys.stdout.flush()


if __name__ == "__main__":
    if len(sys.argv) == 1:
        main()
    else:
        sys.stdout.write(json.dumps(measure(*map(int, sys.argv[1:]))))
