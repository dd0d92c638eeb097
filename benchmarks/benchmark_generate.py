"""Bytes a second of the incremental engine, by lanes and context, against a full forward pass for every byte.

    python benchmarks/benchmark_generate.py --preset tiny --lanes 1 8 --context 64 256 --json

Random weights: speed does not depend on them. The naive figure is what a generator without a cache reaches: the model
is run over the whole context (in whole chunks) and the last logits are kept. Both are the best of a few runs.
On a machine that others use, read the figures per second of CPU time.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table

from bytejepa.inference.engine import Engine
from bytejepa.model.initialization import initialize
from bytejepa.model.transformer import ByteLM
from bytejepa.presets import PRESETS, preset


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """What one call costs."""

    wall_s: float
    cpu_s: float
    """Of all threads of this process: steadier than the clock on a machine that others use."""


def cost_of(call: Callable[[], object], device: torch.device, *, at_least_s: float, most: int) -> Cost:
    """Return the mean cost of a call, over as many calls as fill `at_least_s`, `most` at most and at least one."""
    call()
    done, began, began_cpu = 0, time.perf_counter(), time.process_time()
    while done < most and (done == 0 or time.perf_counter() - began < at_least_s):
        call()
        done += 1
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return Cost(wall_s=(time.perf_counter() - began) / done, cpu_s=(time.process_time() - began_cpu) / done)


def measure(model: ByteLM, lanes: int, context: int, *, runs: int, at_least_s: float) -> dict[str, float]:
    """Return bytes a second of stepping, naive stepping and prefill with `context` ids before the byte."""
    engine = Engine(model)
    ids = torch.randint(4, 260, (lanes, context), device=engine.device)
    following = ids[:, 0].clone()
    state = engine.start(num_lanes=lanes)
    engine.prefill(state, ids)

    def step() -> None:
        state.position = context  # stay at one context; what the cache holds does not change the speed
        engine.step(state, following)

    @torch.inference_mode()
    def naive() -> None:
        model.tail_logits(ids, 1)

    def prefill() -> None:
        engine.prefill(engine.start(num_lanes=lanes), ids)

    def best(call: Callable[[], object]) -> Cost:
        costs = [cost_of(call, engine.device, at_least_s=at_least_s, most=500) for _ in range(runs)]
        return Cost(wall_s=min(c.wall_s for c in costs), cpu_s=min(c.cpu_s for c in costs))

    stepping, repeating, filling = best(step), best(naive), best(prefill)
    return {
        "lanes": lanes,
        "context": context,
        "engine_bytes_per_s": lanes / stepping.wall_s,
        "engine_bytes_per_cpu_s": lanes / stepping.cpu_s,
        "naive_bytes_per_s": lanes / repeating.wall_s,
        "naive_bytes_per_cpu_s": lanes / repeating.cpu_s,
        "speedup": repeating.cpu_s / stepping.cpu_s
        if engine.device.type == "cpu"
        else repeating.wall_s / stepping.wall_s,
        "prefill_ids_per_s": lanes * context / filling.wall_s,
        "prefill_ids_per_cpu_s": lanes * context / filling.cpu_s,
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="tiny")
    parser.add_argument("--lanes", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--context", type=int, nargs="+", default=[64, 256, 480], help="ids before the timed bytes")
    parser.add_argument("--runs", type=int, default=3, help="the best is kept")
    parser.add_argument("--seconds", type=float, default=1.0, help="least time of one run")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = initialize(ByteLM(preset(options.preset)), 0).to(options.device).eval()
    if options.device.startswith("cuda"):
        model.compute_dtype = torch.bfloat16
    results = [
        measure(model, lanes, context, runs=options.runs, at_least_s=options.seconds)
        for lanes in options.lanes
        for context in options.context
    ]
    record = {
        "preset": options.preset,
        "device": options.device,
        "threads": options.threads,
        "torch": torch.__version__,
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "load_1min": os.getloadavg()[0],
        "results": results,
    }
    if options.json:
        print(json.dumps(record, indent=1))
        return
    table = Table(title=f"{options.preset}, {options.device}, {options.threads} thread(s), torch {torch.__version__}")
    columns = (
        "lanes",
        "context",
        "engine B/s",
        "naive B/s",
        "engine B/CPU-s",
        "naive B/CPU-s",
        "speed-up",
        "prefill ids/CPU-s",
    )
    for column in columns:
        table.add_column(column, justify="right")
    rates = ("engine_bytes_per_s", "naive_bytes_per_s", "engine_bytes_per_cpu_s", "naive_bytes_per_cpu_s")
    for row in results:
        shown = (f"{row[name]:,.0f}" for name in rates)
        table.add_row(
            f"{row['lanes']}",
            f"{row['context']}",
            *shown,
            f"{row['speedup']:.1f}x",
            f"{row['prefill_ids_per_cpu_s']:,.0f}",
        )
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
