"""Ranks: the one place that talks to torch.distributed.

Without torchrun there is one rank and every operation is the identity. Tensors travel over NCCL on GPUs and gloo on
CPUs; decisions (when to stop, the time) travel over gloo between hosts' memories, so that no GPU has to be waited for.
"""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from bytejepa.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Gathering:
    """An all-gather under way; `wait` returns the gathered tensor."""

    work: Any
    padded: Tensor
    count: int

    def wait(self) -> Tensor:
        """Return the gathered shares in order, padding removed."""
        if self.work is not None:
            self.work.wait()
        return self.padded[: self.count]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Ranks:
    """This process's place among those that train together."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = dataclasses.field(default_factory=lambda: torch.device("cpu"))
    decisions: Any = None
    """Process group for values that decide, on the hosts."""

    @property
    def is_main(self) -> bool:
        """Return whether this rank decides, logs and writes."""
        return self.rank == 0

    def share(self, count: int) -> tuple[int, int]:
        """Return (first, number) of this rank's items among `count`; equal shares, the last ones cut short."""
        per_rank = -(-count // self.world_size)
        first = min(self.rank * per_rank, count)
        return first, min(per_rank, count - first)

    def all_gather_shares(self, mine: Tensor, count: int) -> Gathering:
        """Start gathering each rank's share (as `share` divides `count` items along the first axis)."""
        if self.world_size == 1:
            return Gathering(work=None, padded=mine, count=count)
        per_rank = -(-count // self.world_size)
        padded = mine.new_zeros((self.world_size * per_rank, *mine.shape[1:]))
        own = mine
        if mine.size(0) < per_rank:
            own = torch.cat((mine, mine.new_zeros((per_rank - mine.size(0), *mine.shape[1:]))))
        work = dist.all_gather_into_tensor(padded, own.contiguous(), async_op=True)
        return Gathering(work=work, padded=padded, count=count)

    def start_sum(self, values: Tensor) -> Any:
        """Start summing `values` over ranks in place; the handle's `wait` makes the sum usable (on a GPU: in its stream)."""
        return dist.all_reduce(values, async_op=True)

    def mean(self, values: Tensor) -> Tensor:
        """Return the elementwise mean over ranks of a small tensor."""
        if self.world_size > 1:
            values = values.clone()
            dist.all_reduce(values)
            values /= self.world_size
        return values

    def sum(self, values: Tensor) -> Tensor:
        """Return the elementwise sum over ranks of a small tensor."""
        if self.world_size > 1:
            values = values.clone()
            dist.all_reduce(values)
        return values

    def sum_on_hosts(self, values: list[float]) -> list[float]:
        """Return the elementwise float64 sum over ranks of numbers that are on the hosts."""
        if self.world_size == 1:
            return values
        message = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(message, group=self.decisions)
        return message.tolist()

    def decide(self, values: list[float]) -> list[float]:
        """Return rank 0's `values` on every rank, float64, without waiting for a GPU."""
        if self.world_size == 1:
            return values
        message = torch.tensor(values, dtype=torch.float64)
        dist.broadcast(message, src=0, group=self.decisions)
        return message.tolist()

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self.world_size > 1:
            dist.barrier(group=self.decisions)


def join(device: str) -> Ranks:
    """Return this process's ranks: what torchrun set up, or a single one.

    `device` is auto, cpu or cuda. Raises: ConfigError if CUDA is asked for and is not there.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("training.device cuda: no CUDA device here", hint="use --training.device cpu")
    on_gpu = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    place = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(place)
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size == 1:
        return Ranks(device=place)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if on_gpu else "gloo", device_id=place if on_gpu else None)
    decisions = dist.new_group(backend="gloo") if on_gpu else dist.group.WORLD
    return Ranks(rank=dist.get_rank(), world_size=world_size, device=place, decisions=decisions)


def leave() -> None:
    """Close what `join` opened."""
    if dist.is_initialized():
        dist.destroy_process_group()
