"""Which way of averaging gradients over ranks is the fastest: one message, buckets during the backward pass, or DDP.

    python benchmarks/benchmark_gradient_averaging.py [PRESET] [--ranks 2] [--steps 20] [--width 256]

Times forward and backward pass plus averaging (no optimiser), the ways in turn, each step as long as the slowest rank
takes; NCCL where there are GPUs, else gloo. Prints milliseconds and ratios to DDP as JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from torch.nn.parallel import DistributedDataParallel

from bytejepa.benchmark.speed import random_loader, synchronize
from bytejepa.config import RunConfig, replace
from bytejepa.model.initialization import initialize
from bytejepa.model.transformer import ByteLM
from bytejepa.presets import preset
from bytejepa.processors import num_usable_processors
from bytejepa.training.distributed import Ranks, join, leave
from bytejepa.training.gradient_buckets import GradientBuckets, backward_order
from bytejepa.training.gradient_step import GradientStep

Step = Callable[[torch.Tensor, torch.Tensor], None]


def ways(config: RunConfig, ranks: Ranks) -> dict[str, Step]:
    """Return one call a way: forward, backward, averaging of a batch."""

    def fresh() -> ByteLM:
        return initialize(ByteLM(config), 0).to(ranks.device)

    def plain(model: ByteLM) -> Step:
        step = GradientStep(model, config, compile=False)

        def run(inputs: torch.Tensor, targets: torch.Tensor) -> None:
            model.zero_grad()
            step(inputs, targets, jepa_lambda=0.01)

        return run

    alone, flat, bucketed, wrapped = fresh(), fresh(), fresh(), fresh()
    step_of_flat = plain(flat)

    def one_message(inputs: torch.Tensor, targets: torch.Tensor) -> None:
        step_of_flat(inputs, targets)
        gradients = [p.grad for p in flat.parameters() if p.grad is not None]
        message = torch.cat([gradient.reshape(-1) for gradient in gradients])
        dist.all_reduce(message)
        message /= ranks.world_size
        parts = message.split([gradient.numel() for gradient in gradients])
        torch._foreach_copy_(gradients, [part.view_as(g) for part, g in zip(parts, gradients, strict=True)])

    buckets = GradientBuckets(backward_order(bucketed), ranks)
    overlapping = GradientStep(bucketed, config, compile=False, buckets=buckets)

    def in_buckets(inputs: torch.Tensor, targets: torch.Tensor) -> None:
        bucketed.zero_grad()
        overlapping(inputs, targets, jepa_lambda=0.01)
        buckets.finish()

    loss = GradientStep(wrapped, config, compile=False).loss
    weight = torch.tensor(0.01, device=ranks.device)
    parallel = DistributedDataParallel(loss, gradient_as_bucket_view=True)

    def ddp(inputs: torch.Tensor, targets: torch.Tensor) -> None:
        parallel.zero_grad()
        parallel(inputs, targets, weight, True)[0].backward()

    return {"no averaging": plain(alone), "one message": one_message, "buckets": in_buckets, "ddp": ddp}


def measure(config: RunConfig, steps: int, threads: int) -> dict[str, float]:
    """Return median milliseconds a step of each way, on every rank the slowest rank's."""
    torch.set_num_threads(threads)
    ranks = join(config.training.device)
    loader = random_loader(config.data, ranks.device, ranks=ranks)
    all_ways = ways(config, ranks)
    times: dict[str, list[float]] = {name: [] for name in all_ways}
    for number in range(-3, steps):
        for name, step in all_ways.items():
            inputs, targets = loader.batch(0, number + 3)
            ranks.barrier()
            begin = time.perf_counter()
            step(inputs, targets)
            synchronize(ranks.device)
            if number >= 0:
                times[name].append((time.perf_counter() - begin) * 1e3)
    loader.close()
    slowest = torch.tensor([times[name] for name in all_ways], dtype=torch.float64, device=ranks.device)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    leave()
    return {name: statistics.median(row) for name, row in zip(all_ways, slowest.tolist(), strict=True)}


def main(words: Sequence[str] | None = None) -> None:
    """Start the ranks, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset", nargs="?", default="tiny")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--width", type=int, help="model.model_dim")
    options = parser.parse_args(words)
    config = replace(preset(options.preset), data={"sequence_growth": None}, jepa={"sigreg_group_sequences": None})
    if options.width is not None:
        config = replace(config, model={"model_dim": options.width})
    threads = max(1, num_usable_processors() // options.ranks)
    launch = elastic_launch(
        LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=options.ranks,
            run_id="averaging",
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
        ),
        measure,
    )
    milliseconds = launch(config, options.steps, threads)[0]
    report = {
        "ranks": options.ranks,
        "threads_a_rank": threads,
        "milliseconds": milliseconds,
        "over_ddp": {name: value / milliseconds["ddp"] for name, value in milliseconds.items()},
    }
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
