"""Attention on a CPU: the package's kernels against PyTorch's, forward alone and with the gradient, turn by turn.

    python benchmarks/benchmark_cpu_attention.py [--threads 2] [--repeats 25] [--json]

Prints median milliseconds and ratios.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from bytejepa.benchmark.bench import surroundings
from bytejepa.model.attention import causal_attention

SHAPES = ((8, 512, 8, 4, 64), (4, 512, 2, 1, 64), (32, 64, 2, 1, 64), (1, 4096, 8, 4, 64))
"""B, T, H, G, E."""


def milliseconds(backend: str, qkv: list[Tensor], gradient: Tensor | None) -> float:
    """Return how long one call takes, with its gradient if there is one to begin with."""
    begin = time.perf_counter()
    output = causal_attention(*qkv, backend=backend)
    if gradient is not None:
        torch.autograd.grad(output, qkv, gradient)
    return (time.perf_counter() - begin) * 1e3


def measure(shape: tuple[int, ...], repeats: int) -> dict[str, float]:
    """Return median milliseconds by kernel and pass."""
    B, T, H, G, E = shape
    qkv = [torch.randn(B, T, heads, E, requires_grad=True) for heads in (H, G, G)]
    weight, times = torch.randn(B, T, H, E), dict[str, list[float]]()
    for _ in range(1 + repeats):
        for backend in ("blocked", "flash"):
            with torch.no_grad():
                times.setdefault(f"{backend} forward", []).append(milliseconds(backend, qkv, None))
            times.setdefault(f"{backend} both", []).append(milliseconds(backend, qkv, weight))
    return {name: statistics.median(values[1:]) for name, values in times.items()}  # the first call compiles


def main() -> None:
    """Measure, print a table or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=25)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = [{"shape": list(shape), **measure(shape, options.repeats)} for shape in SHAPES]
    if options.json:
        print(json.dumps({**surroundings(torch.device("cpu")), "median_ms": rows}, indent=1))
        return
    table = Table("B, T, H, G, E", "forward, ms", "PyTorch's", "ratio", "with gradient, ms", "PyTorch's", "ratio")
    for shape, row in zip(SHAPES, rows, strict=True):
        cells = []
        for kind in ("forward", "both"):
            ours, theirs = row[f"blocked {kind}"], row[f"flash {kind}"]
            cells += [f"{ours:.2f}", f"{theirs:.2f}", f"{theirs / ours:.2f}"]
        table.add_row(str(shape), *cells)
    Console().print(table)


if __name__ == "__main__":
    main()
