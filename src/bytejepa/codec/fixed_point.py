"""The numbers of the codec's arithmetic: formats, and tables made by exact integer code.

A fixed-point number with F fraction bits is the integer round(value * 2^F). The transcendental functions of a C
library differ between machines in the last digit, so none is used: every table entry is the nearest integer to the true value,
computed with far more digits than it keeps (`decimal`, whose exp and ln are correctly rounded, and long integers).
`docs/codec.md` states all of it for another implementation.
"""

from __future__ import annotations

import functools
import math
from decimal import ROUND_HALF_EVEN, Context, Decimal

import numpy as np
import numpy.typing as npt

RESIDUAL_BITS = 14
"""Fraction bits of the residual stream."""
RESIDUAL_LIMIT = 1 << 26
"""The residual saturates here (4,096.0): the sum of squares of 1,024 of them stays below 2^63."""
NORMED_BITS = 10
"""Fraction bits of normalised vectors that go into products: the largest entry of 1,024 is 32.0, just within int16."""
PRENORM_BITS = 16
"""Fraction bits of what is normalised next: heads, hidden vectors of the latent path."""
PRENORM_LIMIT = 1 << 27
HIDDEN_BITS = 12
"""Fraction bits of the MLP's hidden vector before its activation; the square has twice as many."""
HIDDEN_LIMIT = 1 << 20
NORM_BITS = 40
"""Fraction bits of sqrt(width), the constant of the integer norm."""
EPSILON_BITS = 23
"""The norm's epsilon is 2^-23, float32's."""
GATE_BITS = 15
"""Fraction bits of sigmoids."""
MIX_BITS = 16
"""Fraction bits of residual mixes and skip weights."""
ROTARY_BITS = 14
SOFTMAX_BITS = 12
"""Fraction bits, in units of one binary digit, of what 2^-x is taken of."""
EXP2_BITS = 30
"""Fraction bits of the table of 2^-x."""
ATTENTION_BITS = 15
"""Attention probabilities sum to about 2^15 - 1."""
TANH_STEP_BITS = 8
"""The table of tanh has 2^8 entries a unit."""
TANH_RANGE = 8
TANH_BITS = 24
SIGMOID_STEP_BITS = 6
SIGMOID_RANGE = 16
LOGIT_BITS = 16
"""Fraction bits of logits, in binary digits (log2)."""
TOTAL_BITS = 24
"""Frequencies of the 256 bytes sum to 2^24; each is at least 1."""
INVERSE_BITS = 46
"""Fraction bits of the reciprocal of a softmax's sum."""
FREQUENCY_BITS = 38
"""Fraction bits of the reciprocal of a sum of byte weights."""
INT16_MAX = (1 << 15) - 1
MAX_WIDTH = 1024
MAX_WINDOW = 1 << 15

_EXACT = Context(prec=60, rounding=ROUND_HALF_EVEN)
_WORKING_BITS = 256

IntArray = npt.NDArray[np.int64]


def norm_constant(width: int) -> int:
    """Return floor(sqrt(width) * 2^40)."""
    return math.isqrt(width << (2 * NORM_BITS))


def norm_epsilon(width: int, fraction_bits: int) -> int:
    """Return what is added to a sum of `width` squares of numbers with `fraction_bits`: width * 2^-23 in their unit.

    At least 1, so that nothing is divided by zero.
    """
    return max(1, (width << (2 * fraction_bits)) >> EPSILON_BITS)


def _nearest(value: Decimal) -> int:
    return int(value.to_integral_value(rounding=ROUND_HALF_EVEN, context=_EXACT))


@functools.cache
def exp2_table() -> IntArray:
    """Return round(2^30 * 2^(-j / 4096)) for j = 0 .. 4095."""
    entries = 1 << SOFTMAX_BITS
    # the 4,096th root of 1/2 by square roots, its powers by multiplication: 200 digits more than are kept
    root = 1 << (_WORKING_BITS - 1)
    for _ in range(SOFTMAX_BITS):
        root = math.isqrt(root << _WORKING_BITS)
    power, table = 1 << _WORKING_BITS, []
    drop = _WORKING_BITS - EXP2_BITS
    for _ in range(entries):
        table.append((power + (1 << (drop - 1))) >> drop)
        power = (power * root) >> _WORKING_BITS
    return np.array(table, dtype=np.int64)


@functools.cache
def tanh_table() -> IntArray:
    """Return round(2^24 * tanh(i / 256)) for i = 0 .. 2048."""
    table = []
    for index in range((TANH_RANGE << TANH_STEP_BITS) + 1):
        squared = _EXACT.exp(_EXACT.divide(Decimal(2 * index), Decimal(1 << TANH_STEP_BITS)))
        ratio = _EXACT.divide(_EXACT.subtract(squared, Decimal(1)), _EXACT.add(squared, Decimal(1)))
        table.append(_nearest(_EXACT.multiply(ratio, Decimal(1 << TANH_BITS))))
    return np.array(table, dtype=np.int64)


@functools.cache
def sigmoid_table() -> IntArray:
    """Return round(2^15 * sigmoid(i / 64)) for i = 0 .. 1024."""
    entries = (SIGMOID_RANGE << SIGMOID_STEP_BITS) + 1
    return np.array([_sigmoid(Decimal(i) / Decimal(1 << SIGMOID_STEP_BITS)) for i in range(entries)], dtype=np.int64)


def _sigmoid(x: Decimal) -> int:
    return _nearest(_EXACT.divide(Decimal(1 << GATE_BITS), _EXACT.add(Decimal(1), _EXACT.exp(-x))))


def sigmoids(values: npt.NDArray[np.float64]) -> IntArray:
    """Return round(2^15 * sigmoid(v)) of every value; a float is an exact rational, so this is exact too."""
    return np.array([_sigmoid(Decimal(float(value))) for value in values], dtype=np.int64)


def softcap_constant(bound: float) -> int:
    """Return round(bound * log2(e) * 2^16): what a tanh is multiplied with to become a logit in binary digits."""
    log2_e = _EXACT.divide(Decimal(1), _EXACT.ln(Decimal(2)))
    return _nearest(_EXACT.multiply(_EXACT.multiply(Decimal(bound), log2_e), Decimal(1 << LOGIT_BITS)))


@functools.cache
def rotary_tables(length: int, rotary_dims: int, base: float) -> tuple[IntArray, IntArray]:
    """Return round(2^14 * cos(t f_m)) and the sines for t < `length`, f_m = base^(-2m / rotary_dims), (length, half)."""
    half = rotary_dims // 2
    cosines = np.empty((length, half), dtype=np.int64)
    sines = np.empty((length, half), dtype=np.int64)
    log_base = _EXACT.ln(Decimal(base))
    for m in range(half):
        exponent = _EXACT.divide(_EXACT.multiply(log_base, Decimal(-2 * m)), Decimal(rotary_dims))
        frequency = int(_EXACT.multiply(_EXACT.exp(exponent), Decimal(1 << 160))) << (_WORKING_BITS - 160)
        cos_step, sin_step = _cos_sin(frequency)
        cos, sin = 1 << _WORKING_BITS, 0
        for t in range(length):
            cosines[t, m], sines[t, m] = _rotary_entry(cos), _rotary_entry(sin)
            cos, sin = (
                (cos * cos_step - sin * sin_step) >> _WORKING_BITS,
                (sin * cos_step + cos * sin_step) >> _WORKING_BITS,
            )
    return cosines, sines


def _rotary_entry(value: int) -> int:
    drop = _WORKING_BITS - ROTARY_BITS
    return (value + (1 << (drop - 1))) >> drop


def _cos_sin(angle: int) -> tuple[int, int]:
    """Return cosine and sine of an angle of at most 1, all with 256 fraction bits, by their power series."""
    term, order = 1 << _WORKING_BITS, 0
    sums = [0, 0]
    while term:
        sums[order % 2] += term if order % 4 < 2 else -term
        order += 1
        term = (term * angle >> _WORKING_BITS) // order
    return sums[0], sums[1]
