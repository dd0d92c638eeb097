"""Ranks: the one place that talks to torch.distributed.

Without torchrun there is one rank and every operation is the identity. Tensors travel over NCCL on GPUs and gloo on
CPUs; decisions (when to stop, the time) travel over gloo between hosts' memories, so that no GPU has to be waited for.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import os
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from bytejepa.errors import BytejepaError, ConfigError, error_of_os

PATIENCE = datetime.timedelta(days=1)
"""How long ranks wait for one that reads, packs or writes alone: half an hour, the usual limit, is too short for packing."""

_GROUPS: dict[str, Any] = {}
"""Process groups that `join` opened: decisions (values on the hosts that decide), patient (`PATIENCE` is its limit).

Held here alone, so that `leave` frees them: the threads of a group that something still holds when Python ends may
abort the process (pytorch/pytorch issue 190489).
"""


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
        # PyTorch 2.13's name for what 2.11 knows as all_gather_into_tensor, a name that 2.13 warns of
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        work = gather(padded, own.contiguous(), async_op=True)
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

    def sum_on_hosts(self, values: list[float]) -> list[float]:
        """Return the elementwise float64 sum over ranks of numbers that are on the hosts."""
        if self.world_size == 1:
            return values
        message = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(message, group=_GROUPS["decisions"])
        return message.tolist()

    def maximum(self, values: list[float]) -> list[float]:
        """Return the elementwise maximum over ranks, float64, without waiting for a GPU: what one rank wants, all do."""
        return self._maximum(values, "decisions")

    def _maximum(self, values: list[float], group: str) -> list[float]:
        if self.world_size == 1:
            return values
        message = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(message, op=dist.ReduceOp.MAX, group=_GROUPS[group])
        return message.tolist()

    def text_from(self, rank: int, text: str) -> str:
        """Return the text of `rank` on every rank; the others' is ignored."""
        if self.world_size == 1:
            return text
        data = torch.frombuffer(bytearray(text.encode() or b" "), dtype=torch.uint8)
        length = torch.tensor([len(data)])
        dist.broadcast(length, src=rank, group=_GROUPS["decisions"])
        if self.rank != rank:
            data = torch.empty(int(length), dtype=torch.uint8)
        dist.broadcast(data, src=rank, group=_GROUPS["decisions"])
        return data.numpy().tobytes().decode()

    @contextlib.contextmanager
    def agree(self) -> Iterator[None]:
        """Leave the block on every rank alike: all go on, or all raise the error of the lowest rank that failed.

        For what can fail on one rank alone, such as a file that only one node lacks. Nothing in the block may be a
        collective call. Ranks wait for the slowest one, `PATIENCE` at most. The error's `rank` says whose it is.
        """
        mine: BytejepaError | None = None
        try:
            yield
        except (BytejepaError, OSError) as problem:
            if self.world_size == 1:
                raise
            mine = problem if isinstance(problem, BytejepaError) else error_of_os(problem)
        if self.world_size == 1:
            return
        failed = -int(self._maximum([-float(self.world_size if mine is None else self.rank)], "patient")[0])
        if failed == self.world_size:
            return
        described = "" if mine is None else json.dumps([mine.exit_code, mine.message, mine.hint])
        exit_code, message, hint = json.loads(self.text_from(failed, described))
        if mine is None or failed != self.rank:
            kinds = {kind.exit_code: kind for kind in BytejepaError.__subclasses__()}
            mine = kinds.get(exit_code, BytejepaError)(message, hint=hint)
        mine.rank = failed
        raise mine


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
    _GROUPS["decisions"] = dist.new_group(backend="gloo") if on_gpu else dist.group.WORLD
    _GROUPS["patient"] = dist.new_group(backend="gloo", timeout=PATIENCE)
    return Ranks(rank=dist.get_rank(), world_size=world_size, device=place)


def leave(*, together: bool = False) -> None:
    """Close what `join` opened; `together`: once every rank is here, because torchrun ends the others when one has failed."""
    if dist.is_initialized():
        if together:
            dist.barrier()
        _GROUPS.clear()
        dist.destroy_process_group()
