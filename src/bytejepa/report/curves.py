"""Curves of a run's log over training, and several seeds of one configuration as a band."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from bytejepa.report.inputs import LoggedRun

Array = npt.NDArray[np.float64]
SMOOTHED_LINES = 9
"""Most logged batches over which a training loss is averaged before it is drawn."""
THROUGHPUT_POINTS = 60
"""Most points of a run's throughput, each over an equal number of steps."""


@dataclasses.dataclass(frozen=True, slots=True)
class Band:
    """Mean, least and largest of several seeds along x; of one seed all three are its curve."""

    x: Array
    mean: Array
    low: Array
    high: Array

    @classmethod
    def over(cls, x: Array, curves: Array) -> Band:
        """Return the band of `curves` (runs, points) at `x` (points,)."""
        return cls(x, curves.mean(axis=0), curves.min(axis=0), curves.max(axis=0))


def logged_curve(run: LoggedRun, key: str) -> tuple[Array, Array]:
    """Return (megabytes read, value) of every line of the log that has `key`."""
    pairs = [(line["num_bytes"] / 1e6, line[key]) for line in run.metrics if key in line]
    values = np.array(pairs, dtype=np.float64).reshape(-1, 2)
    return values[:, 0], values[:, 1]


def smoothed(values: Array) -> Array:
    """Return the centred moving average of `values`, over fewer at the ends and in a log of under 90 lines."""
    ones = np.ones(max(1, min(SMOOTHED_LINES, len(values) // 10)))
    return np.convolve(values, ones, mode="same") / np.convolve(np.ones(len(values)), ones, mode="same")


def seed_band(runs: Sequence[LoggedRun], key: str, *, smooth: bool = False) -> Band:
    """Return the band of `key` over `runs`, at the points that all of them logged; if there are none, but equally many of
    each, at the means of the first ones, the second ones, ...

    Runs that end by the clock are validated at their end, each at another point: if all of them end after the last point
    that they share, the band ends at the mean of their ends.
    """
    curves: list[dict[float, float]] = []
    for run in runs:
        x, values = logged_curve(run, key)
        curves.append(
            dict(zip(x.tolist(), (smoothed(values) if smooth and len(values) else values).tolist(), strict=True))
        )
    if len({len(curve) for curve in curves}) == 1 and not set.intersection(*(set(curve) for curve in curves)):
        places = np.array([list(curve) for curve in curves], dtype=np.float64).reshape(len(curves), -1)
        ordered = np.array([list(curve.values()) for curve in curves], dtype=np.float64).reshape(len(curves), -1)
        return Band.over(places.mean(axis=0), ordered)
    shared = sorted(set.intersection(*(set(curve) for curve in curves)))
    rows = [[curve[x] for x in shared] for curve in curves]
    ends = [max(curve, default=0.0) for curve in curves]
    if shared and min(ends) > shared[-1]:
        rows = [[*row, curve[end]] for row, curve, end in zip(rows, curves, ends, strict=True)]
        shared.append(sum(ends) / len(ends))
    values = np.array(rows, dtype=np.float64).reshape(len(curves), -1)
    return Band.over(np.array(shared, dtype=np.float64), values)


def throughput(run: LoggedRun) -> tuple[Array, Array]:
    """Return (seconds of training, bytes per second) along a run, each over an equal number of steps.

    Pauses (compilation, validation, checkpoints) do not count. Empty for a run without two readings of its clock.
    """
    starts = np.array(run.step_starts_s, dtype=np.float64)
    edges = np.unique(np.linspace(0, max(0, len(starts) - 1), THROUGHPUT_POINTS + 1).astype(int))
    if len(edges) < 2:
        return np.zeros(0), np.zeros(0)
    seconds = np.diff(starts[edges])
    num_bytes = np.diff(edges) * run.config.data.batch_bytes
    rate = np.divide(num_bytes, seconds, out=np.full(len(seconds), np.nan), where=seconds > 0)
    return (starts[edges[:-1]] + starts[edges[1:]]) / 2, rate
