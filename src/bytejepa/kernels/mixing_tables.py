"""The tables of context mixing, made by exact integer code: every machine mixes the same numbers.

A probability is an integer of 2^16; its logarithm of odds, `stretch`, has 8 fraction bits. Source: Mahoney, "Adaptive
weighing of context models for lossless data compression" (2005); `docs/codec.md` specifies what is made of it here.
"""

from __future__ import annotations

import functools
from decimal import ROUND_HALF_EVEN, Context, Decimal

import numpy as np
import numpy.typing as npt

PROBABILITY_BITS = 16
STRETCH_BITS = 8
STRETCH_LIMIT = 3071
"""Odds are cut off at e^12: a bit costs at least 2^-16 of a bit, and at most 16."""
COUNT_LIMIT = 255
"""Most bits that a counter remembers having seen: from there on it is an average over the last 256."""
NUM_CONFIDENCES = 9
"""Classes of counters by how much they have seen."""

_EXACT = Context(prec=60, rounding=ROUND_HALF_EVEN)

IntArray = npt.NDArray[np.int64]


@functools.cache
def squash_table() -> IntArray:
    """Return, for v = -3071 ... 3071, the integer nearest to 2^16 / (1 + exp(-v / 256)), within 1 ... 65,535."""
    table = []
    for v in range(-STRETCH_LIMIT, STRETCH_LIMIT + 1):
        odds = _EXACT.exp(_EXACT.divide(Decimal(-v), Decimal(1 << STRETCH_BITS)))
        exact = _EXACT.divide(Decimal(1 << PROBABILITY_BITS), _EXACT.add(Decimal(1), odds))
        table.append(int(exact.to_integral_value(rounding=ROUND_HALF_EVEN, context=_EXACT)))
    return np.clip(np.array(table, dtype=np.int64), 1, (1 << PROBABILITY_BITS) - 1)


@functools.cache
def stretch_table() -> IntArray:
    """Return, for p = 0 ... 65,535, the least v with squash(v) >= p."""
    return np.searchsorted(squash_table(), np.arange(1 << PROBABILITY_BITS)) - STRETCH_LIMIT


@functools.cache
def rate_table() -> IntArray:
    """Return, for n = 0 ... 255, the share of 2^16 by which a counter that has seen n bits moves: 1 / (n + 1.5)."""
    return np.array([(2 << 16) // (2 * n + 3) for n in range(COUNT_LIMIT + 1)], dtype=np.int64)


@functools.cache
def confidence_table() -> IntArray:
    """Return, for n = 0 ... 255, the class of a counter that has seen n bits: 0 to 8."""
    borders = (1, 2, 3, 4, 6, 10, 20, 60)
    return np.searchsorted(np.array(borders), np.arange(COUNT_LIMIT + 1), side="right")
