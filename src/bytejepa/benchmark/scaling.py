"""`bytejepa bench --scaling`: what a step costs over context, batch, width and ranks, against the work that it is."""

from __future__ import annotations

import contextlib
import dataclasses
import io
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from bytejepa.benchmark.memory import peak_bytes
from bytejepa.benchmark.speed import (
    TrainingStep,
    flop_per_byte,
    matmul_peak_flop_per_s,
    measure,
    speed_of,
    time_step,
)
from bytejepa.config import RunConfig, replace
from bytejepa.errors import ConfigError, file_errors_as
from bytejepa.files import write_atomically
from bytejepa.processors import num_usable_processors
from bytejepa.training.distributed import join, leave

FACTORS = (0.25, 0.5, 1, 2)


def bench_scaling(config: RunConfig, device: torch.device, *, steps: int, compile: bool) -> list[dict[str, Any]]:  # noqa: A002
    """Return training speed over context, batch, width and ranks around `config`, one row a point.

    Ranks are processes of this machine: one a GPU, or on a CPU sharing its cores. They divide the batch, so the work stays.
    """
    config = replace(config, data={"sequence_growth": None})
    peak = matmul_peak_flop_per_s(device)
    rows = []
    for axis, value, point in _points(config):
        step = TrainingStep(point, device, compile=compile)
        speed = measure(axis, step, point, device, peak=peak, steps=steps)
        rows.append(_row(axis, value, point, dataclasses.asdict(speed)))
    point = _at(config)
    for count in rank_counts(point, device):
        times_ms, loss, memory = times_of_ranks(point, count, steps=steps, compile=compile)
        whole = peak * count if device.type == "cuda" else peak
        speed = speed_of("ranks", times_ms, point, peak=whole, loss=loss, peak_memory_bytes=memory)
        rows.append(_row("ranks", count, point, dataclasses.asdict(speed)))
    return rows


def _points(config: RunConfig) -> list[tuple[str, float, RunConfig]]:
    """Return (axis, value, configuration) of every point that the other settings of `config` allow."""
    data, model = config.data, config.model
    points: list[tuple[str, float, RunConfig]] = []

    def add(axis: str, value: int, **sections: dict[str, Any]) -> None:
        with contextlib.suppress(ConfigError):
            points.append((axis, value, _at(config, **sections)))

    for factor in FACTORS:
        length, width = int(data.sequence_bytes * factor), int(model.model_dim * factor)
        if length >= 2 * config.jepa.chunk_bytes:
            add("context", length, data={"sequence_bytes": length})
        add("batch", int(data.batch_bytes * factor), data={"batch_bytes": int(data.batch_bytes * factor)})
        rotary = min(model.rotary_dims or width // model.num_heads, width // model.num_heads)
        add("width", width, model={"model_dim": width, "rotary_dims": rotary})
    return points


def _row(axis: str, value: float, point: RunConfig, speed: dict[str, Any]) -> dict[str, Any]:
    work = flop_per_byte(point) * point.data.batch_bytes
    return {"axis": axis, "value": value, "gflop_per_step": work / 1e9, **speed}


def _at(config: RunConfig, **sections: dict[str, Any]) -> RunConfig:
    return replace(config, jepa={"sigreg_group_sequences": None}, **sections)


def rank_counts(config: RunConfig, device: torch.device) -> list[int]:
    """Return 1, 2, 4 ... as far as GPUs or cores go and the batch's sequences can be divided."""
    most = torch.cuda.device_count() if device.type == "cuda" else num_usable_processors()
    sequences = config.data.batch_bytes // config.data.sequence_bytes
    return [count for count in (1, 2, 4, 8) if count <= most and sequences % count == 0]


def times_of_ranks(config: RunConfig, count: int, *, steps: int, compile: bool) -> tuple[list[float], float, int]:  # noqa: A002
    """Return the milliseconds of each step of `count` ranks, every step as long as its slowest rank takes, a loss in nats, and rank 0's
    peak memory."""
    threads = max(1, torch.get_num_threads() // count)
    launch = elastic_launch(
        LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=count,
            run_id="scaling",
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            max_restarts=0,
        ),
        _time_rank,
    )
    result: tuple[list[float], float, int] = launch(config, steps, threads, compile)[0]
    return result


def _time_rank(config: RunConfig, steps: int, threads: int, compile: bool) -> tuple[list[float], float, int]:  # noqa: A002
    torch.set_num_threads(threads)
    ranks = join(config.training.device)
    step = TrainingStep(config, ranks.device, compile=compile, ranks=ranks)
    times = torch.tensor(time_step(step, ranks.device, steps=steps), dtype=torch.float64, device=ranks.device)
    if ranks.world_size > 1:
        dist.all_reduce(times, op=dist.ReduceOp.MAX)
    loss = float(step())
    step.loader.close()
    leave()
    return times.tolist(), loss, peak_bytes(ranks.device)


def plot_scaling(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw milliseconds a step against work a step, one line an axis, with the line of the best utilisation.

    `path` ends in .png, .svg or .pdf. Raises: ConfigError if it cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for axis in dict.fromkeys(row["axis"] for row in rows):
        line = sorted((row["gflop_per_step"], row["step_ms"], row["value"]) for row in rows if row["axis"] == axis)
        axes.plot([x for x, _, _ in line], [y for _, y, _ in line], "o-", label=axis)
        for x, y, value in line:
            axes.annotate(f"{value:g}", (x, y), textcoords="offset points", xytext=(4, -10), fontsize=8)
    best = max(row["tflop_per_s"] for row in rows)
    work = sorted(row["gflop_per_step"] for row in rows)
    axes.plot(work, [w / best for w in work], "--", color="#888888", label=f"{best:.3g} TFLOP/s, the best seen")
    axes.set(xscale="log", yscale="log", xlabel="work a step, GFLOP", ylabel="milliseconds a step")
    axes.set_title("cost against work", loc="left")
    axes.grid(alpha=0.3, which="both")
    axes.legend(frameon=False)
    image = io.BytesIO()
    figure.savefig(image, dpi=130, format=path.suffix[1:].lower())
    with file_errors_as(ConfigError, "write the plot", path):
        write_atomically(path, image.getvalue())
