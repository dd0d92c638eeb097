"""The finest quantisation that fits a number of bytes, code and container included, found on real packed sizes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

from torch import Tensor

from bytejepa.artifact.calibration import Calibration
from bytejepa.artifact.container import container_to_bytes
from bytejepa.artifact.packing import StoredTensor
from bytejepa.artifact.store import store_weights
from bytejepa.config import ArtifactConfig, RunConfig, replace
from bytejepa.config_fields import ranges_of
from bytejepa.config_json import to_dict
from bytejepa.errors import ArtifactError
from bytejepa.model.quantization import code_limit

GAUSSIAN_CLIPS = {2: 1.22, 3: 1.95, 4: 2.47, 5: 2.90, 6: 3.27, 7: 3.61, 8: 3.92}
"""By the bits of a code, the clip in root mean squares at which Gaussian rows lose least: finer steps cut off more than they
round better, so that more room would make a model worse. Source: the least mean squared error of a standard normal rounded
to 2^bits - 1 levels, found numerically."""
FINEST_BY_SENSITIVITY = 2.0
"""The same for steps by sensitivity, which never cut a weight off."""
COARSEST_STEP = 8.0
"""In root mean squares of a row: nearly every code is zero."""
CLIPS_AN_OCTAVE = 2048
"""How close together the clips lie that are searched: one part in 10,000 of the size at 3.5 bits a weight."""
NEIGHBOURHOOD = 80
"""How many clips the one that fits after GPTQ lies from the one that fits with plain rounding, at most as a rule."""
CLOSE_ENOUGH = 1 / 20_000
"""Share of the budget that may stay free before the search ends early: under a thousandth of a bit a weight."""
NEAR_ENOUGH = 1 / 1000
"""The same for plain rounding, which only finds the neighbourhood, and for the look around the best clip."""
MAX_TRIALS = 32
"""Sizes measured for one fit, at most; plain rounding may take half of them to find the neighbourhood."""

Sizes = dict[int, int]
"""Bytes of the artifact by clip."""


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
    """Return the quantisation whose artifact, of up to MAX_TRIALS, is the largest of at most `file_bytes`; its clip is
    scaled, all else is `config`'s.

    Plain rounding finds the neighbourhood, which takes a second a trial; the rounding asked for decides within it.
    `on_progress` gets (trials made, the most that there can be).
    Raises: SizeError if even the coarsest steps do not fit, ArtifactError if the clip is not one that scales.
    """
    if config.artifact.clip not in ("standard_deviations", "sensitivity"):
        raise ArtifactError(
            f"artifact.clip {config.artifact.clip} leaves nothing to fit",
            hint="use standard_deviations or sensitivity",
        )
    cuts_off = config.artifact.clip == "standard_deviations"
    finest = GAUSSIAN_CLIPS[config.artifact.matrix_bits] if cuts_off else FINEST_BY_SENSITIVITY
    trials = _Trials(weights, config, calibration, metadata, on_progress)
    clips = range(
        round(CLIPS_AN_OCTAVE * math.log2(finest)),
        round(CLIPS_AN_OCTAVE * math.log2(COARSEST_STEP * code_limit(config.artifact.matrix_bits))),
    )
    rounding = config.artifact.rounding
    if rounding != "nearest":
        near = narrow(clips, lambda clip: trials.size(clip, "nearest"), file_bytes, MAX_TRIALS // 2, NEAR_ENOUGH)
        clips = _neighbourhood(clips, fullest(near, file_bytes), lambda clip: trials.size(clip, rounding), file_bytes)
    most_sizes = MAX_TRIALS - len(trials.sizes)
    sizes = narrow(clips, lambda clip: trials.size(clip, rounding), file_bytes, most_sizes, CLOSE_ENOUGH)
    look_around(sizes, clips, lambda clip: trials.size(clip, rounding), file_bytes, most_sizes)
    measured = {clip: size for (clip, kind), size in trials.sizes.items() if kind == rounding}
    found = fullest(measured, file_bytes)
    if found is None:
        raise SizeError(file_bytes, min(measured.values()))
    return Fit(
        config=trials.config(found, rounding),
        tensors=trials.tensors(found, rounding),
        file_bytes=measured[found],
        num_trials=len(trials.sizes),
    )


def fullest(sizes: Sizes, file_bytes: int) -> int | None:
    """Return the clip of the largest size that fits, the finer one of two; None if none does."""
    fitting = {clip: size for clip, size in sizes.items() if size <= file_bytes}
    return min(fitting, key=lambda clip: (-fitting[clip], clip), default=None)


def narrow(clips: range, size: Callable[[int], int], file_bytes: int, most_sizes: int, free_share: float) -> Sizes:
    """Return sizes measured between a clip that is too fine and one that fits, ever nearer to each other.

    It ends with neighbours, with `most_sizes` sizes, where one fits and leaves at most `free_share` of the budget free,
    with the first clip if that fits and with the last one if that does not.
    The size is about linear in the clip's logarithm, so the next guess lies on the line between the finest known to fit and
    the coarsest known not to; every third halves what lies between, for where the line bends.
    """
    too_fine, fitting = clips[0], clips[-1]
    sizes: Sizes = {too_fine: size(too_fine)}
    if sizes[too_fine] <= file_bytes:
        return sizes
    sizes[fitting] = size(fitting)
    if sizes[fitting] > file_bytes:
        return sizes
    while fitting - too_fine > 1 and len(sizes) < most_sizes and sizes[fitting] < (1 - free_share) * file_bytes:
        share = (sizes[too_fine] - file_bytes) / (sizes[too_fine] - sizes[fitting]) if (len(sizes) - 1) % 3 else 0.5
        guess = min(fitting - 1, max(too_fine + 1, too_fine + math.ceil(share * (fitting - too_fine))))
        sizes[guess] = size(guess)
        if sizes[guess] <= file_bytes:
            fitting = guess
        else:
            too_fine = guess
    return sizes


def look_around(sizes: Sizes, clips: range, size: Callable[[int], int], file_bytes: int, most_sizes: int) -> None:
    """Add to `sizes` those of clips at doubling distances on both sides of the one that leaves least of the budget free,
    until one leaves little or there are `most_sizes`.

    For small models: steps keep few digits, and the change of one clip may change tables and codecs, so that a size jumps
    past the budget, and a clip that is coarser, or finer, may fit and be larger.
    """
    best = fullest(sizes, file_bytes)
    if best is None or best == clips[0]:
        return
    for distance in (1 << power for power in range(len(clips).bit_length())):
        for clip in (best - distance, best + distance):
            fitting = max(taken for taken in sizes.values() if taken <= file_bytes)
            if len(sizes) >= most_sizes or fitting >= (1 - NEAR_ENOUGH) * file_bytes:
                return
            if clip in clips and clip not in sizes:
                sizes[clip] = size(clip)


def _neighbourhood(clips: range, near: int | None, size: Callable[[int], int], file_bytes: int) -> range:
    """Return the clips around `near` if the budget lies between their sizes, else those on the side where it has to lie."""
    if near is None:
        return clips
    low, high = max(clips[0], near - NEIGHBOURHOOD), min(clips[-1], near + NEIGHBOURHOOD)
    if size(low) <= file_bytes:
        return range(clips[0], low + 1)
    if size(high) > file_bytes:
        return range(high, clips[-1] + 1)
    return range(low, high + 1)


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
        others = deviations / artifact.clip_standard_deviations * artifact.other_clip_standard_deviations
        possible = ranges_of(ArtifactConfig)["other_clip_standard_deviations"]
        return replace(
            self.base,
            artifact={
                "clip_standard_deviations": deviations,
                "other_clip_standard_deviations": min(possible.high, max(possible.low, others)),
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
