"""What is measured of a run beyond its log. Torch-free: `bytejepa.report.measure` fills these in."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal

import numpy as np
import numpy.typing as npt

Flow = Literal["alive", "no gradient", "dead"]
"""`no gradient`: exactly zero on the batch, but the weights moved in training, or may have; `dead`: they did not move
either."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class StageScore:
    """Bits per byte of one stage of the weights."""

    bpb: float
    """BOS targets' cost included, as the challenge counts it."""
    num_bytes: int


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PricedText:
    """A text with what every target costs, in order."""

    ids: npt.NDArray[np.uint16]
    """x_0 .. x_n, (n + 1,); the first is no target."""
    bits: npt.NDArray[np.float64]
    """Bits of each target, (n,)."""
    window: int
    """Ids of a scoring window; windows do not overlap, so target i stands at position i mod window."""
    is_whole_split: bool
    """Whether the validation split ends where this text does."""

    @property
    def targets(self) -> npt.NDArray[np.uint16]:
        """Ids x_1 .. x_n, (n,)."""
        return self.ids[1:]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TensorFigures:
    """One parameter: its weights, its place in the artifact, its gradient."""

    name: str
    num_elements: int
    rms: float
    """Root mean square of the averaged weights."""
    initial_rms: float | None
    """The same before the first step; None of a run that began with a model which is not there any more."""
    scheme: str
    """How the artifact stores it; `not stored` for heads that only training needs."""
    artifact_bytes: int
    """Of its own streams: without its codes where those of several matrices lie in one."""
    relative_error: float
    """RMS of (stored - averaged weights) over RMS of the averaged weights; 0 where both are 0."""
    gradient_rms: float
    """Root mean square of its gradient on the batch."""
    share_without_gradient: float
    """Share of its elements whose gradient is exactly zero."""
    flow: Flow


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class GradientBatch:
    """On what the gradients were taken."""

    num_sequences: int
    sequence_bytes: int
    jepa_lambda: float


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RunMeasurements:
    """Everything measured of one run."""

    step: int
    """Steps taken by the checkpoint that was measured; the run may have gone on."""
    scores: Mapping[str, StageScore]
    """Of `raw` weights, their `average` and the `artifact`, on the same text and windows."""
    priced: PricedText
    """By the artifact."""
    tensors: tuple[TensorFigures, ...]
    gradient_batch: GradientBatch
    weights_bytes: int
    """The artifact file."""
    joint_bytes: int
    """Of it, the stream that holds the codes of several matrices; 0 if each has its own."""
    code_bytes: int
    """The package's source as an importable zip."""
    limit_bytes: int
    device: str

    @property
    def total_bytes(self) -> int:
        """Bytes counted against the budget."""
        return self.weights_bytes + self.code_bytes
