"""Bytes a second of the incremental engine, by lanes and context, against a full forward pass for every byte.

Random weights: speed does not depend on them. The naive figure is what a generator without a cache reaches: the model
is run over the whole context (in whole chunks) and the last logits are kept. Both are the best of a few runs.
On a machine that others use, read the figures per second of CPU time.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from bytejepa.benchmark.bench import surroundings
from bytejepa.config import RunConfig
from bytejepa.errors import ConfigError
from bytejepa.inference.engine import Engine
from bytejepa.model.initialization import initialize
from bytejepa.model.precision import on_device
from bytejepa.model.transformer import ByteLM


def bench_generate(
    config: RunConfig,
    device: torch.device,
    *,
    lanes: Sequence[int],
    contexts: Sequence[int],
    runs: int,
    at_least_s: float,
) -> dict[str, Any]:
    """Return one row for each number of lanes and context: see the module's docstring."""
    model = on_device(initialize(ByteLM(config), 0), device).eval()
    rows = [measure(model, count, context, runs=runs, at_least_s=at_least_s) for count in lanes for context in contexts]
    return {**surroundings(device), "generate": rows}


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
    """Return bytes a second of stepping, naive stepping and prefill with `context` ids before the byte.

    Raises: ConfigError for more context than the engine's window holds.
    """
    engine, config = Engine(model), model.config
    if context > engine.window:
        raise ConfigError(f"--contexts: expected 1 to the engine's window of {engine.window} ids, got {context}")
    ids = torch.randint(4, 260, (lanes, context), device=engine.device)
    following = ids[:, 0].clone()
    state = engine.start(num_lanes=lanes)
    engine.prefill(state, ids)

    # stay near one context, where what the cache holds does not change the speed, but end chunks as often as a text does;
    # within the window, since a step in a full one runs what stays of it again, as a text does once a hop
    period = chunk_period(config)
    first = max(0, min(context, engine.window - period))
    around = itertools.cycle(range(first, min(first + period, engine.window)))

    def step() -> None:
        state.position = next(around)
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


def chunk_period(config: RunConfig) -> int:
    """Return after how many bytes what runs once a chunk, chunk blocks and latents, has run as often again."""
    latents = config.jepa.chunk_bytes if config.jepa.enabled and config.jepa.inject else 1
    return math.lcm(latents, config.model.chunk_stride_bytes if config.model.chunk_blocks is not None else 1)
