"""What of a training step's hot path can be taken away, each part alone, once the step is compiled."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch

from bytejepa.benchmark.speed import TrainingStep

Undo = Callable[[], None]


def _make_batches_when_needed(step: TrainingStep) -> Undo:
    step.loader.device = torch.device("cpu")  # nothing is pinned, and every copy is waited for
    numbers = itertools.count()
    step.read = lambda: tuple(part.to(step.device) for part in step.loader.make(0, next(numbers)))

    def undo() -> None:
        del step.read
        step.loader.device = step.device

    return undo


def _average_weight_by_weight(step: TrainingStep) -> Undo:
    @torch.no_grad()
    def update(**_: object) -> None:
        for average, live in zip(step.average.average, step.average.live, strict=True):
            average.lerp_(live.float(), 0.003)

    step.average.update = update
    return lambda: step.average.__dict__.pop("update")


def _adam_weight_by_weight(step: TrainingStep) -> Undo:
    groups = step.optimizers.adam.param_groups
    kept = [(group["fused"], group["foreach"]) for group in groups]
    for group in groups:
        group["fused"] = group["foreach"] = False

    def undo() -> None:
        for group, (fused, foreach) in zip(groups, kept, strict=True):
            group["fused"], group["foreach"] = fused, foreach

    return undo


def _muon_matrix_by_matrix(step: TrainingStep) -> Undo:
    muon, kept = step.optimizers.muon, step.optimizers.muon.batches
    muon.batches = [muon._batch([matrix]) for matrix in muon.parameters]

    def undo() -> None:
        muon.batches = kept

    return undo


SWITCHES: dict[str, Callable[[TrainingStep], Undo]] = {
    "batches made ahead": _make_batches_when_needed,
    "foreach average": _average_weight_by_weight,
    "fused AdamW": _adam_weight_by_weight,
    "batched Muon": _muon_matrix_by_matrix,
}
"""What of the hot path can be taken away, each alone, from a step that is already compiled."""
