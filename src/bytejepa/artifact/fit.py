"""The finest quantisation that fits a number of bytes, code and container included, found on real packed sizes."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any

from torch import Tensor

from bytejepa.artifact.calibration import Calibration
from bytejepa.artifact.container import container_to_bytes
from bytejepa.artifact.packing import StoredTensor
from bytejepa.artifact.store import store_weights
from bytejepa.config import RunConfig, replace
from bytejepa.config_json import to_dict
from bytejepa.errors import ArtifactError
from bytejepa.model.quantization import code_limit

FINEST_DEVIATIONS = 2.0
"""A clip of two root mean squares; finer, codes of the widest range are clipped rather than finer."""
COARSEST_STEP = 8.0
"""In root mean squares of a row: nearly every code is zero."""
CLIPS_AN_OCTAVE = 2048
"""How close together the clips lie that are searched: one part in 10,000 of the size at 3.5 bits a weight."""
NEIGHBOURHOOD = 80
"""How many clips the one that fits after GPTQ lies from the one that fits with plain rounding, at most as a rule."""
CLOSE_ENOUGH = 1 / 20_000
"""Share of the budget that may stay free: under a thousandth of a bit a weight."""
NEAR_ENOUGH = 1 / 1000
"""The same for plain rounding where it only finds the neighbourhood."""
MAX_TRIALS = 32


class SizeError(ArtifactError):
    """No step is coarse enough."""

    def __init__(self, file_bytes: int, smallest_bytes: int) -> None:
        super().__init__(f"the weights cannot be packed into {file_bytes} bytes", hint="train a smaller model")
        self.smallest_bytes = smallest_bytes
        """The smallest artifact that the weights can make."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Fit:
    """The quantisation that was found."""

    config: RunConfig
    """With the clip that fits."""
    tensors: dict[str, StoredTensor]
    file_bytes: int
    """Of the artifact that these tensors make."""
    num_trials: int
    """Sizes that were measured."""


def fit(
    weights: dict[str, Tensor],
    config: RunConfig,
    calibration: Calibration | None,
    *,
    file_bytes: int,
    metadata: dict[str, Any],
    on_progress: Callable[[int, int], None] | None = None,
) -> Fit:
    """Return the finest quantisation whose artifact takes at most `file_bytes`; its clip is scaled, all else is `config`'s.

    Plain rounding finds the neighbourhood, which takes a second a trial; the rounding asked for decides within it.
    `on_progress` gets (trials made, the most that there can be).
    Raises: SizeError if even the coarsest steps do not fit, ArtifactError if the clip is not one that scales.
    """
    if config.artifact.clip not in ("standard_deviations", "sensitivity"):
        raise ArtifactError(
            f"artifact.clip {config.artifact.clip} leaves nothing to fit",
            hint="use standard_deviations or sensitivity",
        )
    trials = _Trials(weights, config, calibration, metadata, on_progress)
    clips = range(
        round(CLIPS_AN_OCTAVE * math.log2(FINEST_DEVIATIONS)),
        round(CLIPS_AN_OCTAVE * math.log2(COARSEST_STEP * code_limit(config.artifact.matrix_bits))),
    )
    rounding = config.artifact.rounding
    if rounding != "nearest":
        near = _finest_fitting(clips, lambda clip: trials.size(clip, "nearest"), file_bytes, NEAR_ENOUGH)
        around = range(max(clips[0], near - NEIGHBOURHOOD), min(clips[-1], near + NEIGHBOURHOOD))
        if trials.size(around[0], rounding) > file_bytes >= trials.size(around[-1], rounding):
            clips = around
    found = _finest_fitting(clips, lambda clip: trials.size(clip, rounding), file_bytes)
    if trials.size(found, rounding) > file_bytes:
        raise SizeError(file_bytes, trials.size(found, rounding))
    return Fit(
        config=trials.config(found, rounding),
        tensors=trials.tensors(found, rounding),
        file_bytes=trials.size(found, rounding),
        num_trials=len(trials.sizes),
    )


def _finest_fitting(clips: range, size: Callable[[int], int], file_bytes: int, free_share: float = CLOSE_ENOUGH) -> int:
    """Return a clip that fits and leaves at most `free_share` of the budget free, or whose finer neighbour does not fit;
    the first clip if that fits, the last one if none does.

    The size is about linear in the clip's logarithm, so the next guess lies on the line between the finest known to fit and
    the coarsest known not to; every third halves what lies between, for where the line bends.
    """
    too_fine, fitting = clips[0], clips[-1]
    if size(too_fine) <= file_bytes or size(fitting) > file_bytes:
        return too_fine if size(too_fine) <= file_bytes else fitting
    for number in itertools.count(1):
        if fitting - too_fine == 1 or size(fitting) >= (1 - free_share) * file_bytes:
            break
        share = (size(too_fine) - file_bytes) / (size(too_fine) - size(fitting)) if number % 3 else 0.5
        guess = min(fitting - 1, max(too_fine + 1, too_fine + math.ceil(share * (fitting - too_fine))))
        if size(guess) <= file_bytes:
            fitting = guess
        else:
            too_fine = guess
    return fitting


class _Trials:
    """Artifacts made of the same weights with different clips, numbered by their logarithm, and what they weigh."""

    def __init__(
        self,
        weights: dict[str, Tensor],
        config: RunConfig,
        calibration: Calibration | None,
        metadata: dict[str, Any],
        on_progress: Callable[[int, int], None] | None,
    ) -> None:
        self.weights, self.calibration, self.metadata = weights, calibration, metadata
        self.base, self.on_progress = config, on_progress
        self.sizes: dict[tuple[int, str], int] = {}

    def config(self, clip: int, rounding: str) -> RunConfig:
        artifact = self.base.artifact
        deviations = 2.0 ** (clip / CLIPS_AN_OCTAVE)
        factor = deviations / artifact.clip_standard_deviations
        return replace(
            self.base,
            artifact={
                "clip_standard_deviations": deviations,
                "other_clip_standard_deviations": factor * artifact.other_clip_standard_deviations,
                "rounding": rounding,
            },
        )

    def tensors(self, clip: int, rounding: str) -> dict[str, StoredTensor]:
        return store_weights(self.weights, self.config(clip, rounding), self.calibration)

    def size(self, clip: int, rounding: str) -> int:
        """Return the bytes of the whole artifact file."""
        key = (clip, rounding)
        if key not in self.sizes:
            config = self.config(clip, rounding)
            data = container_to_bytes(
                configuration=to_dict(config),
                tensors=self.tensors(clip, rounding),
                metadata=self.metadata,
                codecs=(*config.artifact.codecs, "raw"),
            )
            self.sizes[key] = len(data)
            if self.on_progress is not None:
                self.on_progress(len(self.sizes), MAX_TRIALS)
        return self.sizes[key]
