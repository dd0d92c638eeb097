"""The second decoder's numbers, written from docs/codec.md ("Numbers") alone. Names are those of the page."""

from math import frexp, isqrt
from typing import Any

import mpmath
import numpy as np

Ints = np.ndarray


def R(v: Any, s: Any) -> Any:  # noqa: N802 - the page's name
    return (v + (np.int64(1) << (s - 1))) >> s


def C(v: Any, m: int) -> Any:  # noqa: N802
    return np.clip(v, -m, m)


def bit_lengths(v: Ints) -> Ints:
    return np.array([int(n).bit_length() for n in v.flat], dtype=np.int64).reshape(v.shape)


def norm(x: Ints, F: int, G: int, limit: int = 32767) -> Ints:
    W = x.shape[-1]
    S = (x * x).sum(-1, keepdims=True) + max(1, (W << 2 * F) >> 23)
    g = np.array([isqrt(W << 80) // isqrt(int(n)) for n in S.flat], dtype=np.int64).reshape(S.shape)
    return C(R(x * g, 40 - G), limit)


def interp(T: Ints, n: Ints, f: int) -> Ints:
    return T[n >> f] + R((T[(n >> f) + 1] - T[n >> f]) * (n & ((1 << f) - 1)), f)


def nearest(values: Any, bits: int = 0) -> Ints:
    """Integers nearest to values of mpmath times 2^bits."""
    return np.array([int(mpmath.nint(value * 2**bits)) for value in values], dtype=np.int64)


def table(count: int, bits: int, function: Any) -> Ints:
    with mpmath.workdps(60):
        return nearest((function(mpmath.mpf(i)) for i in range(count)), bits)


EXP2 = table(4096, 30, lambda j: 2 ** (-j / 4096))
TANH = table(2049, 24, lambda i: mpmath.tanh(i / 256))
SIGMOID = table(1025, 15, lambda i: 1 / (1 + mpmath.exp(-i / 64)))


def sig(n: Ints) -> Ints:
    found = interp(SIGMOID, np.minimum(np.abs(n), 2**14 - 1), 4)
    return np.where(n < 0, 2**15 - found, found)


def exact_sigmoids(values: Ints) -> Ints:
    with mpmath.workdps(60):
        return nearest((1 / (1 + mpmath.exp(-mpmath.mpf(float(v)))) for v in values.flat), 15).reshape(values.shape)


def exp2(t: Ints) -> Ints:
    return EXP2[t % 4096] >> np.minimum(t >> 12, 63)


def fixed(values: Ints, bits: int) -> Ints:
    return np.rint(np.ldexp(values, bits)).astype(np.int64)


def least_power(value: float) -> int:
    """x, 2^x the least power above a value that is not 0."""
    return frexp(value)[1]


class Matrix:
    def __init__(self, codes_and_scales: tuple[Ints, Ints], *steps: tuple[str, Any], gain: int) -> None:
        self.codes, f = codes_and_scales
        for operation, factor in steps:
            f = f * factor if operation == "x" else f / np.float64(factor)
        largest = float(np.abs(f).max())
        b = min(31 - (frexp(largest)[1] if largest else 0), 62 + gain)
        if np.abs(fixed(f, b)).max() == 1 << 31:
            b -= 1
        self.M, self.shift = fixed(f, b), b - gain
        L = max(1, int(np.abs(self.codes).sum(1).max()))
        self.B = min(15, ((2**31 - 1) // L).bit_length() - 1)

    def __call__(self, a: Ints) -> Ints:
        return R(self.M * (a @ self.codes.T), self.shift)

    def dyn(self, v: Ints) -> Ints:
        e = np.maximum(0, bit_lengths(np.abs(v).max(-1, keepdims=True)) - self.B)
        a = C((v + ((np.int64(1) << e) >> 1)) >> e, 2**self.B - 1)
        return R(self.M * (a @ self.codes.T), self.shift - e)
