"""Averages of the weights over training: exponential (EMA) or, late in a run, with equal weights (SWA)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from bytejepa.config import TrainingConfig


class WeightAverage:
    """The weights that are exported. Without EMA and SWA it is a view of the live weights and costs nothing."""

    def __init__(self, model: nn.Module, config: TrainingConfig) -> None:
        self.config = config
        self.names = [name for name, _ in model.named_parameters()]
        self.live = [parameter.detach() for parameter in model.parameters()]
        self.is_kept = config.keeps_average
        # float32 whatever the weights are: an average of small steps would not move in bfloat16
        self.average = [p.float().clone() for p in self.live] if self.is_kept else self.live
        self.num_swa_samples = 0

    @torch.no_grad()
    def begin_with_live(self) -> None:
        """Take the live weights for the average: before the first step, once they have been replaced."""
        if self.is_kept:
            for average, live in zip(self.average, self.live, strict=True):
                average.copy_(live)

    @torch.no_grad()
    def update(self, *, step: int, progress: float) -> None:
        """Take in the live weights after optimiser step `step` (counted from 1)."""
        if not self.is_kept:
            return
        swa_start = self.config.swa_start
        live = [parameter.float() for parameter in self.live]  # no copy where it is float32 already
        if swa_start is not None and progress >= swa_start and step % self.config.swa_every_steps == 0:
            self.num_swa_samples += 1
            torch._foreach_lerp_(self.average, live, 1.0 / self.num_swa_samples)
        elif self.num_swa_samples == 0:  # until the first sample, which a short run may never reach
            decay = self.config.ema_decay or 0.0
            if self.config.ema_warmup:
                decay = min(decay, (1 + step) / (10 + step))
            torch._foreach_lerp_(self.average, live, 1.0 - decay)

    def state(self) -> dict[str, Tensor]:
        """Return the averaged weights by parameter name; float32."""
        return dict(zip(self.names, self.average, strict=True))

    def load_state(self, state: dict[str, Tensor], num_swa_samples: int) -> None:
        """Continue from what `state` returned."""
        self.num_swa_samples = num_swa_samples
        if self.is_kept:
            for name, value in zip(self.names, self.average, strict=True):
                value.copy_(state[name])


@contextlib.contextmanager
def averaged_weights(model: nn.Module, average: list[Tensor]) -> Iterator[None]:
    """Let `model` hold the averaged weights inside the block, and its own again after it."""
    live = [parameter.detach().clone() for parameter in model.parameters()]
    with torch.no_grad():
        for parameter, value in zip(model.parameters(), average, strict=True):
            parameter.copy_(value)
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value in zip(model.parameters(), live, strict=True):
                parameter.copy_(value)
