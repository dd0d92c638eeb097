"""Which window scores which byte: a plan, as data, made before any model runs (spec section 1).

The ids x_0 .. x_n give n targets x_1 .. x_n. A window that begins at b feeds ids b .. b + length - 1 and scores the last
`scored` of the targets b + 1 .. b + length. Windows begin at multiples of the stride; the first scores all its targets,
later ones those that no window before them did, so each target is scored exactly once and with at least
window - stride ids of context where that much exists. The tail is no exception (spec section 7, item 8).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

from bytejepa.config import EvaluationConfig
from bytejepa.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Window:
    """One forward pass over part of the ids."""

    begin: int
    """Position of the first id fed."""
    length: int
    """Ids fed."""
    scored: int
    """Targets scored: the last ones."""

    @property
    def first_target(self) -> int:
        """Position of the first target scored."""
        return self.begin + self.length - self.scored + 1


def window_and_stride(
    evaluation: EvaluationConfig, *, window: int | None = None, stride: int | None = None, sliding: bool = True
) -> tuple[int, int]:
    """Return window and stride in ids: as given, else as `evaluation` says; without `sliding` the windows do not overlap.

    A window that is given and shorter than the evaluation's stride is its own stride.
    Raises: ConfigError if not 1 <= stride <= window.
    """
    window = evaluation.window_bytes if window is None else window
    if stride is None:
        stride = min(evaluation.stride_bytes, window) if sliding else window
    check_windows(window=window, stride=stride)
    return window, stride


def check_windows(*, window: int, stride: int) -> None:
    """Raise a ConfigError if not 1 <= stride <= window."""
    if window < 1:
        raise ConfigError(f"the window must be 1 or more, got {window}", hint="use --window")
    if not 1 <= stride <= window:
        raise ConfigError(f"stride must be from 1 to the window {window}, got {stride}", hint="use another --stride")


def plan_windows(num_targets: int, *, window: int, stride: int) -> Iterator[Window]:
    """Yield the windows that score each of `num_targets` targets once, in order.

    `stride` equal to `window` is non-overlapping evaluation. Input shorter than a window gets one shorter window.
    Raises: ConfigError if not 1 <= stride <= window.
    """
    check_windows(window=window, stride=stride)
    end = 0
    for begin in itertools.count(0, stride):
        if end >= num_targets:
            return
        length = min(window, num_targets - begin)
        yield Window(begin=begin, length=length, scored=begin + length - end)
        end = begin + length


def batch_windows(windows: Iterator[Window], *, batch_ids: int) -> Iterator[list[Window]]:
    """Yield lists of consecutive windows of equal shape, at most `batch_ids` ids (and at least one window) each."""
    for (length, _), alike in itertools.groupby(windows, key=lambda w: (w.length, w.scored)):
        while batch := list(itertools.islice(alike, max(1, batch_ids // length))):
            yield batch
