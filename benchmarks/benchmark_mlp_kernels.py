"""The kernels of `bytejepa.model.hopper_mlp` against a library's products and compiled elementwise passes, on a GPU.

    python benchmarks/benchmark_mlp_kernels.py [--rows 49152] [--width 512] [--hidden 1536] [--search] [--json OUT.json]

Prints milliseconds and ratios; `--search` tries other ways to divide the work. Every result is held against float32.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor
from triton.testing import do_bench

from bytejepa.benchmark.bench import surroundings
from bytejepa.model import hopper_mlp
from bytejepa.model.hopper_mlp import Tiles

CANDIDATES = (
    Tiles(128, 256, 64, 3, 8, 2),
    Tiles(128, 256, 64, 3, 8, 1),
    Tiles(128, 256, 64, 4, 8, 2),
    Tiles(128, 128, 64, 3, 8, 2),
    Tiles(128, 128, 64, 3, 4, 2),
    Tiles(128, 128, 64, 2, 4, 2, 2),
    Tiles(128, 128, 64, 2, 8, 2, 2),
    Tiles(128, 128, 64, 3, 8, 1, 1),
    Tiles(256, 128, 64, 3, 8, 2),
    Tiles(64, 256, 64, 3, 4, 2),
    Tiles(64, 128, 64, 3, 4, 2, 2),
    Tiles(128, 64, 64, 3, 4, 1, 2),
)


def plain_up(x: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Return hidden and its activation by a library's product and an elementwise pass."""
    hidden = F.linear(x, up)
    return hidden, F.leaky_relu(hidden, 0.5).square()


def plain_slope(gradient: Tensor, down: Tensor, hidden: Tensor) -> Tensor:
    """Return the gradient of hidden in the same way."""
    return (gradient @ down) * 2 * F.leaky_relu(hidden, 0.25)


def relative_error(found: Tensor, exact: Tensor) -> float:
    """Return |found - exact| / |exact|."""
    return ((found.float() - exact).norm() / exact.norm()).item()


def main() -> None:
    """Check, time, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=49_152)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--hidden", type=int, default=1536)
    parser.add_argument("--search", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    N, D, M = options.rows, options.width, options.hidden
    x, gradient = (torch.randn(N, D, device="cuda").bfloat16() for _ in range(2))
    up, down = ((torch.randn(*shape, device="cuda") * D**-0.5).bfloat16() for shape in ((M, D), (D, M)))
    scale = torch.rand(N, device="cuda") + 0.5
    hidden, _ = hopper_mlp.up_and_activate(x, up, scale)
    exact_hidden = F.linear(x.float(), up.float()) * scale[:, None]
    exact_slope = (gradient.float() @ down.float()) * scale[:, None] * 2 * F.leaky_relu(hidden.float(), 0.25)
    compiled = {f: torch.compile(f, dynamic=False) for f in (plain_up, plain_slope)}
    chosen = {"up and activation": hopper_mlp.ACTIVATE_TILES, "gradient of hidden": hopper_mlp.SLOPE_TILES}
    cases: dict[str, tuple[Callable[[], Any], Callable[[Tiles], Any], Callable[[Any], float], Callable[[], Any]]] = {
        "up and activation": (
            lambda: compiled[plain_up](x, up),
            lambda t: hopper_mlp.up_and_activate(x, up, scale, t),
            lambda y: max(
                relative_error(y[0], exact_hidden),
                relative_error(y[1], F.leaky_relu(y[0].float(), 0.5).square()),
            ),
            lambda: F.linear(x, up),
        ),
        "gradient of hidden": (
            lambda: compiled[plain_slope](gradient, down, hidden),
            lambda t: hopper_mlp.gradient_of_hidden(gradient, down, hidden, scale, t),
            lambda y: relative_error(y, exact_slope),
            lambda: gradient @ down,
        ),
    }
    table = Table("work", "tiles", "ms", "plain, ms", "product alone, ms", "ratio", "relative error")
    found: list[dict[str, Any]] = []
    for name, (plain, ours, error, product) in cases.items():
        plain_ms, product_ms = (do_bench(call, warmup=5, rep=30, return_mode="median") for call in (plain, product))
        for tiles in dict.fromkeys((chosen[name], *(CANDIDATES if options.search else ()))):
            row: dict[str, Any] = {"work": name, "tiles": list(tiles), "plain_ms": plain_ms, "product_ms": product_ms}
            try:
                row["relative_error"] = error(ours(tiles))
                row["ms"] = do_bench(lambda t=tiles, o=ours: o(t), warmup=5, rep=30, return_mode="median")
            except Exception as problem:  # too much shared memory, say: of interest only to who searches
                row["failed"] = f"{type(problem).__name__}: {str(problem)[:100]}"
            found.append(row)
    for row in sorted(found, key=lambda row: (list(cases).index(row["work"]), row.get("ms", float("inf")))):
        times = ["-", "-"] if "failed" in row else [f"{row['ms']:.4f}", f"{row['plain_ms'] / row['ms']:.2f}"]
        table.add_row(
            row["work"], str(tuple(row["tiles"])), times[0], f"{row['plain_ms']:.4f}", f"{row['product_ms']:.4f}",
            times[1], row["failed"] if "failed" in row else f"{row['relative_error']:.5f}",
        )  # fmt: skip
    Console(width=160).print(table)
    if options.json:
        options.json.write_text(json.dumps({**surroundings(torch.device("cuda")), "measured": found}, indent=1))


if __name__ == "__main__":
    main()
