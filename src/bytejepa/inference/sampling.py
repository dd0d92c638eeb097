"""From logits to bytes: temperature, the usual cuts, repetition control, and draws without hidden state.

The order is: repetition penalty, bytes that are not allowed, temperature, then top-k, top-p and min-p on the probabilities
that the temperature gives. A draw is a function of (seed, sample, position), so neither the number of samples nor
the order in which they are made matters.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from bytejepa.errors import ConfigError

LEAST_TEMPERATURE, MOST_TEMPERATURE = 1e-3, 1e3
"""Other than 0: below it the most likely byte is drawn, above it any, and further out numbers overflow."""
MOST_PENALTY_NATS = 1e3
FloatArray = npt.NDArray[np.float64]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How bytes are drawn from the model's distribution."""

    temperature: float = 0.8
    """Divides the logits, 0.001 to 1,000; 0: always the most likely byte; 1: the model's own distribution."""
    top_k: int | None = None
    """Keep only this many of the most likely bytes; None: all 256."""
    top_p: float | None = None
    """Keep the fewest most likely bytes whose probabilities sum to at least this; None: all."""
    min_p: float | None = None
    """Drop bytes less likely than this share of the most likely one; None: none."""
    repetition_penalty: float = 0.0
    """Nats taken from a byte's logit for every byte by which it would make a repeat longer than
    `repetition_allowed_bytes`; 0: off."""
    repetition_allowed_bytes: int = 16
    """Length of a repeat that costs nothing: words recur, sentences should not."""
    repetition_window_bytes: int = 2048
    """How far back, in bytes, repeats are looked for; the prompt counts."""
    valid_utf8: bool = True
    """Draw only bytes that keep the text valid UTF-8; False: any byte."""

    def __post_init__(self) -> None:
        in_range = LEAST_TEMPERATURE <= self.temperature <= MOST_TEMPERATURE
        checks = (
            ("temperature", self.temperature == 0 or in_range, f"0, or {LEAST_TEMPERATURE:g} to {MOST_TEMPERATURE:g}"),
            ("top_k", self.top_k is None or 1 <= self.top_k <= 256, "1 to 256"),
            ("top_p", self.top_p is None or 0 < self.top_p <= 1, "more than 0 and at most 1"),
            ("min_p", self.min_p is None or 0 <= self.min_p <= 1, "0 to 1"),
            ("repetition_penalty", 0 <= self.repetition_penalty <= MOST_PENALTY_NATS, f"0 to {MOST_PENALTY_NATS:g}"),
            ("repetition_allowed_bytes", self.repetition_allowed_bytes >= 1, "1 or more"),
            ("repetition_window_bytes", self.repetition_window_bytes >= 1, "1 or more"),
        )
        for name, holds, expected in checks:
            if not holds:
                raise ConfigError(f"{name}: expected {expected}, got {getattr(self, name):g}")


def uniform(seed: int, sample: int, position: int) -> float:
    """Return a number in [0, 1), uniform over the 53-bit fractions, as a function of its arguments only."""
    digest = hashlib.sha256(f"{seed}:sample {sample}:{position}".encode()).digest()
    return float((int.from_bytes(digest[:8], "little") >> 11) * 2.0**-53)


def draw(
    logits: FloatArray, allowed: npt.NDArray[np.bool_] | None, uniforms: Sequence[float], sampling: Sampling
) -> npt.NDArray[np.uint8]:
    """Return one byte a lane, (L,), drawn from byte logits (L, 256).

    `allowed` (L, 256): bytes that may be drawn, at least one a lane; None: all. `uniforms`: one number in [0, 1) a lane.
    """
    if allowed is not None:
        logits = np.where(allowed, logits, -np.inf)
    if sampling.temperature == 0:
        return logits.argmax(axis=1).astype(np.uint8)
    scaled = (logits - logits.max(axis=1, keepdims=True)) / sampling.temperature
    probabilities = np.exp(scaled)
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    kept = probabilities * _kept(probabilities, sampling)
    # bytes in the order of their values: rounding can only move the border between two neighbours
    cumulative = kept.cumsum(axis=1)
    thresholds = np.asarray(uniforms)[:, None] * cumulative[:, -1:]
    return (cumulative <= thresholds).sum(axis=1).astype(np.uint8)


def _kept(probabilities: FloatArray, sampling: Sampling) -> npt.NDArray[np.bool_]:
    order = np.argsort(-probabilities, axis=1, kind="stable")
    ordered = np.take_along_axis(probabilities, order, axis=1)
    keep = np.ones_like(ordered, dtype=bool)
    if sampling.top_k is not None:
        keep[:, sampling.top_k :] = False
    if sampling.top_p is not None:
        keep &= ordered.cumsum(axis=1) - ordered < sampling.top_p
    if sampling.min_p is not None:
        keep &= ordered >= sampling.min_p * ordered[:, :1]
    kept = np.empty_like(keep)
    np.put_along_axis(kept, order, keep, axis=1)
    return kept


class RepetitionPenalty:
    """Penalties of the bytes that would go on repeating something said before, lane by lane.

    For every earlier position the length of the match between what led there and what was just said is kept and
    updated with each byte; the byte that stood there would make the repeat one longer. Single bytes and words repeat
    in all text, so a penalty on bytes already seen (as is usual for tokens) would be of no use here.
    Source: the DRY sampler (Don't Repeat Yourself) of text-generation-webui, with a penalty that grows linearly.
    """

    def __init__(self, sampling: Sampling, num_lanes: int, prompt: bytes, num_bytes: int) -> None:
        self.sampling = sampling
        prompt = prompt[-sampling.repetition_window_bytes :]
        self.length = 0
        self.said = np.zeros((num_lanes, len(prompt) + num_bytes), dtype=np.uint8)
        self.match_lengths = np.zeros((num_lanes, len(prompt) + num_bytes + 1), dtype=np.int32)
        for byte in prompt:
            self.push(np.full(num_lanes, byte, dtype=np.uint8))

    def push(self, drawn: npt.NDArray[np.uint8]) -> None:
        """Take note of one byte a lane."""
        end = self.length
        begin = max(0, end - self.sampling.repetition_window_bytes)
        same = self.said[:, begin:end] == drawn[:, None]
        self.match_lengths[:, begin + 1 : end + 1] = np.where(same, self.match_lengths[:, begin:end] + 1, 0)
        self.said[:, end] = drawn
        self.length += 1

    def penalties(self) -> FloatArray:
        """Return what to take from each byte's logit, (L, 256), nats."""
        begin = max(0, self.length - self.sampling.repetition_window_bytes)
        excess = self.match_lengths[:, begin : self.length] + 1 - self.sampling.repetition_allowed_bytes
        lanes, positions = np.nonzero(excess > 0)
        penalties = np.zeros((self.said.shape[0], 256))
        amounts = self.sampling.repetition_penalty * excess[lanes, positions]
        np.maximum.at(penalties, (lanes, self.said[lanes, begin + positions]), amounts)
        return penalties
