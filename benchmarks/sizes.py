"""What a new size costs a product on a processor, in bfloat16 and in float32: time and memory.

Run     python -m benchmarks.sizes
"""

import sys
import time

import torch

from benchmarks.processes import output_of, peak_mb

WIDTH, INNER = 256, 688
SIZES = range(600, 800)


def milliseconds(rows: list[torch.Tensor], weight: torch.Tensor) -> float:
    """Returns the mean time of a product of each of the rows with a weight."""
    start = time.perf_counter()
    for each in rows:
        torch.nn.functional.linear(each, weight)
    return (time.perf_counter() - start) / len(rows) * 1e3


def measure(name: str) -> str:
    """Returns a line of the table, measured in this process."""
    dtype = getattr(torch, name)
    weight = torch.randn(INNER, WIDTH).to(dtype)
    same = [torch.randn(SIZES[0], WIDTH).to(dtype) for _ in SIZES]
    growing = [torch.randn(size, WIDTH).to(dtype) for size in SIZES]
    milliseconds(same, weight)
    known, before = milliseconds(same, weight), peak_mb()
    new = milliseconds(growing, weight)
    grown, again = peak_mb() - before, milliseconds(growing, weight)
    return f"| {name} | {known:.2f} | {new:.2f} | {again:.2f} | {grown / len(SIZES):.2f} |\n"


def main() -> None:
    """Prints the table, one thread, a process for each precision."""
    torch.set_num_threads(1)
    if len(sys.argv) > 1:
        sys.stdout.write(measure(sys.argv[1]))
        return
    sys.stdout.write("| precision | one size, ms | new sizes, ms | again, ms | MB each |\n")
    sys.stdout.write("|---|---|---|---|---|\n")
    for name in ("float32", "bfloat16"):
        sys.stdout.write(output_of("benchmarks.sizes", name))


if __name__ == "__main__":
    main()
