"""Ranges of settings, kept in their annotations, and the check that every section of a configuration makes with them."""

from __future__ import annotations

import dataclasses
import functools
import math
import types
import typing
from typing import Annotated, Any

from bytejepa.errors import ConfigError


@dataclasses.dataclass(frozen=True, slots=True)
class Range:
    """Inclusive bounds of a number, kept in a field's annotation so that check, help and docs cannot disagree."""

    low: float
    high: float = float("inf")
    excludes_high: bool = False

    def __str__(self) -> str:
        low, high = _in_full(self.low), _in_full(self.high)
        if self.excludes_high:
            return f"{low} to less than {high}"
        return f"{low} or more" if self.high == float("inf") else f"{low} to {high}"

    def __contains__(self, value: float) -> bool:
        """Whether a setting can have this value; NaN, and what no 64-bit integer or float32 can hold, it cannot."""
        largest = min(self.high, _LARGEST_INTEGER if isinstance(value, int) else _LARGEST_FLOAT)
        return self.low <= value <= largest and not (self.excludes_high and value == self.high)


_LARGEST_INTEGER, _LARGEST_FLOAT = 2**63 - 1, 3e38


def _in_full(value: float) -> str:
    """Return a number with all the digits of its whole part, which `g` would round."""
    is_whole = isinstance(value, int) or (abs(value) < _LARGEST_INTEGER and value == int(value))
    return str(int(value)) if is_whole else f"{value:g}"


PositiveInt = Annotated[int, Range(1)]
NonNegativeInt = Annotated[int, Range(0)]
NonNegative = Annotated[float, Range(0)]
Fraction = Annotated[float, Range(0, 1)]
Decay = Annotated[float, Range(0, 1, excludes_high=True)]
"""A share of what was there before: at 1 nothing new would ever count."""


class Section:
    """Base of every section: checks the annotated ranges on construction."""

    __slots__ = ()

    def __post_init__(self) -> None:
        for name, bounds in ranges_of(type(self)).items():  # type: ignore[arg-type]
            value = getattr(self, name)
            if value is not None and value not in bounds:
                section = type(self).__name__.removesuffix("Config").lower()
                largest = ", no more than float32 can hold" if _LARGEST_FLOAT < abs(value) < math.inf else ""
                raise ConfigError(f"{section}.{name}: expected {bounds}{largest}, got {_in_full(value)}")


@functools.cache
def ranges_of(section: Any) -> dict[str, Range]:
    """Return the range of every setting of a section's class that has one, by name."""
    ranges = {}
    for name, annotation in typing.get_type_hints(section, include_extras=True).items():
        parts = typing.get_args(annotation) if typing.get_origin(annotation) in (typing.Union, types.UnionType) else ()
        for part in (annotation, *parts):
            for extra in getattr(part, "__metadata__", ()):
                if isinstance(extra, Range):
                    ranges[name] = extra
    return ranges
