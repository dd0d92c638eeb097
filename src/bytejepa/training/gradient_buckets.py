"""Gradients averaged over ranks while the backward pass is still computing others.

Parameters are divided into buckets in the order in which a backward pass completes their gradients. As soon as all
gradients of a bucket are there they are copied into one flat buffer and its sum over ranks is started; `finish` waits
for the sums before anything reads a gradient. Buckets are started in the same order on every rank, whatever the order
in which they fill, so that the messages match. Source: Li et al., "PyTorch Distributed" (2020), without the wrapper
module: what a step does not compute counts as a gradient of zero, and micro-batches before the last send nothing.

A compiled graph hands over all its gradients when its backward pass ends; the buckets then overlap with each other only.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from bytejepa.training.distributed import Ranks

LARGEST_BUCKET_BYTES = 25_000_000
FEWEST_BUCKETS = 8
"""Small models get smaller buckets, or there would be nothing to overlap."""
ALIGNMENT_BYTES = 128
"""Where a gradient begins in its buffer: vectorised kernels read whole cache lines."""


def backward_order(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters about in the order in which a backward pass completes their gradients.

    Heads come first, then the blocks from the last to the first, then what comes before them. Last are what all blocks
    share (the skip weights; in no submodule) and the JEPA module: a step without latent losses may give it no gradient,
    and a bucket that never fills holds up those behind it.
    """
    named = list(model.named_parameters())
    late = {name for name, _ in named if "." not in name or name.startswith("jepa.")}
    return [p for name, p in reversed(named) if name not in late] + [p for name, p in named if name in late]


class _Bucket:
    """Gradients of one dtype that travel as one message."""

    def __init__(self, parameters: list[Tensor]) -> None:
        self.parameters = parameters
        dtype = parameters[0].dtype
        alignment = ALIGNMENT_BYTES // dtype.itemsize
        padded = [-(-parameter.numel() // alignment) * alignment for parameter in parameters]
        self.flat = torch.zeros(sum(padded), dtype=dtype, device=parameters[0].device)
        begins = [0, *itertools.accumulate(padded)]
        self.views = [self.flat[at : at + p.numel()].view_as(p) for p, at in zip(parameters, begins, strict=False)]
        self.num_missing = len(parameters)
        self.work: Any = None

    def start(self, ranks: Ranks) -> None:
        """Let every `.grad` be its part of the buffer and start the sum over ranks."""
        missing = [view for view, parameter in zip(self.views, self.parameters, strict=True) if parameter.grad is None]
        if missing:
            torch._foreach_zero_(missing)
        there = [(view, p.grad) for view, p in zip(self.views, self.parameters, strict=True) if p.grad is not None]
        if there:
            torch._foreach_copy_([view for view, _ in there], [gradient for _, gradient in there])
        for view, parameter in zip(self.views, self.parameters, strict=True):
            parameter.grad = view
        self.work = ranks.start_sum(self.flat)

    def finish(self, ranks: Ranks) -> None:
        """Wait for the sum and turn it into the mean."""
        self.work.wait()
        self.flat /= ranks.world_size
        self.work, self.num_missing = None, len(self.parameters)


class GradientBuckets:
    """Averages `.grad` of `parameters` (in the order of `backward_order`) over ranks. On one rank it does nothing."""

    def __init__(self, parameters: Iterable[Tensor], ranks: Ranks, *, bucket_bytes: int | None = None) -> None:
        self.ranks = ranks
        self.buckets: list[_Bucket] = []
        self._num_started = 0
        self._is_last_backward = False
        if ranks.world_size == 1:
            return
        parameters = list(parameters)
        total = sum(parameter.numel() * parameter.dtype.itemsize for parameter in parameters)
        bound = bucket_bytes or min(LARGEST_BUCKET_BYTES, -(-total // FEWEST_BUCKETS))
        self.buckets = [_Bucket(members) for members in _divide(parameters, bound)]
        with torch.no_grad():
            for bucket in self.buckets:
                for parameter in bucket.parameters:
                    parameter.register_post_accumulate_grad_hook(functools.partial(self._arrived, bucket))

    def begin_last_backward(self) -> None:
        """Say that the backward pass that comes next is the step's last: gradients leave as soon as they are complete."""
        self._is_last_backward = True

    def _arrived(self, bucket: _Bucket, _: Tensor) -> None:
        if not self._is_last_backward:
            return
        bucket.num_missing -= 1
        while self._num_started < len(self.buckets) and self.buckets[self._num_started].num_missing == 0:
            self._start_next()

    def _start_next(self) -> None:
        self.buckets[self._num_started].start(self.ranks)
        self._num_started += 1

    @torch.no_grad()
    def finish(self) -> None:
        """Replace every `.grad` by its mean over ranks, zero where a step computed none; what has not left leaves now."""
        while self._num_started < len(self.buckets):
            self._start_next()
        for bucket in self.buckets:
            bucket.finish(self.ranks)
        self._num_started, self._is_last_backward = 0, False


def _divide(parameters: list[Tensor], bound: int) -> list[list[Tensor]]:
    """Return consecutive parameters of one dtype in groups of about `bound` bytes, at least one each."""
    by_dtype: dict[torch.dtype, list[list[Tensor]]] = {}
    sizes: dict[torch.dtype, int] = {}
    groups = []
    for parameter in parameters:
        dtype, size = parameter.dtype, parameter.numel() * parameter.dtype.itemsize
        if dtype not in by_dtype or sizes[dtype] + size > bound:
            by_dtype.setdefault(dtype, []).append([])
            groups.append(by_dtype[dtype][-1])
            sizes[dtype] = 0
        by_dtype[dtype][-1].append(parameter)
        sizes[dtype] += size
    return groups
