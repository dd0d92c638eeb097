"""The small compiled functions of the integer arithmetic; `docs/codec.md` has the formulas."""

from __future__ import annotations

from typing import Any

import numpy as np

from bytejepa.codec.fixed_point import (
    GATE_BITS,
    HIDDEN_LIMIT,
    INT16_MAX,
    MIX_BITS,
    NORM_BITS,
    NORMED_BITS,
    RESIDUAL_LIMIT,
    SIGMOID_RANGE,
    SIGMOID_STEP_BITS,
)
from bytejepa.kernels.compilation import compiled


@compiled
def rounded(value: Any, shift: Any) -> Any:
    """Return value / 2^shift, to the nearest integer, halves upwards."""
    return (value + (np.int64(1) << (shift - 1))) >> shift


@compiled
def clamped(value: int, limit: int) -> int:
    """Return the number in [-limit, limit] that is nearest to `value`."""
    return max(-limit, min(limit, value))


@compiled
def square_root(value: Any) -> Any:
    """Return the largest integer whose square is at most `value`."""
    root = np.int64(np.sqrt(np.float64(value)))
    while root * root > value:
        root -= 1
    while (root + 1) * (root + 1) <= value:
        root += 1
    return root


@compiled
def bit_length(value: int) -> int:
    """Return how many binary digits a number >= 0 has."""
    length = 0
    while value > 0:
        value >>= 1
        length += 1
    return length


@compiled
def sigmoid_of(x: Any, table: Any) -> Any:
    """Return the sigmoid, 15 fraction bits, of a number with 10."""
    fine = NORMED_BITS - SIGMOID_STEP_BITS
    size = min(abs(x), (SIGMOID_RANGE << NORMED_BITS) - 1)
    index, rest = size >> fine, size & ((1 << fine) - 1)
    gate = table[index] + rounded((table[index + 1] - table[index]) * rest, fine)
    return gate if x >= 0 else (1 << GATE_BITS) - gate


@compiled
def normalize(x: Any, length: int, constant: int, epsilon: int, fraction_bits: int, limit: int, out: Any) -> None:
    """Fill `out` with x / rms(x), with `fraction_bits`."""
    squares = np.int64(epsilon)
    for i in range(length):
        squares += np.int64(x[i]) * np.int64(x[i])
    gain = constant // square_root(squares)
    shift = NORM_BITS - fraction_bits
    half = np.int64(1) << (shift - 1)
    for i in range(length):
        out[i] = max(-limit, min(limit, (np.int64(x[i]) * gain + half) >> shift))


@compiled
def normalize_rows(x: Any, constant: int, epsilon: int, a: Any) -> None:
    """Fill `a` (R, D) int16 with the normalised residuals `x` (R, D)."""
    for r in range(x.shape[0]):
        normalize(x[r], x.shape[1], constant, epsilon, NORMED_BITS, INT16_MAX, a[r])


@compiled
def add_scaled(x: Any, sums: Any, multiplier: Any, shift: int) -> None:
    """Add the sums times their multipliers to the residual `x`, saturated."""
    half = np.int64(1) << (shift - 1)
    for i in range(x.shape[0]):
        x[i] = max(-RESIDUAL_LIMIT, min(RESIDUAL_LIMIT, x[i] + ((np.int64(sums[i]) * multiplier[i] + half) >> shift)))


@compiled
def squared(sums: Any, multiplier: Any, shift: Any, bits: int, squares: Any, out: Any) -> int:
    """Fill `out` int16 with leaky_relu(hidden)^2 of a row under a common exponent, and return the exponent."""
    largest = np.int64(0)
    for i in range(squares.shape[0]):
        hidden = max(-HIDDEN_LIMIT, min(HIDDEN_LIMIT, rounded(np.int64(sums[i]) * multiplier[i], shift[i])))
        square = hidden * hidden
        if hidden < 0:
            square = (square + 2) >> 2  # the slope is 1/2
        squares[i] = square
        largest = max(largest, square)
    exponent = max(0, bit_length(largest) - bits)
    half = (np.int64(1) << exponent) >> 1
    limit = (np.int64(1) << bits) - 1
    for i in range(squares.shape[0]):
        out[i] = min(limit, (squares[i] + half) >> exponent)
    return exponent


@compiled
def mix(x: Any, x_weight: Any, other: Any, other_weight: Any) -> None:
    """Replace `x` (R, D) by the weighted sum of it and `other`, saturated."""
    for r in range(x.shape[0]):
        for i in range(x.shape[1]):
            mixed = np.int64(x[r, i]) * x_weight[i] + np.int64(other[r, i]) * other_weight[i]
            x[r, i] = clamped(rounded(mixed, MIX_BITS), RESIDUAL_LIMIT)
