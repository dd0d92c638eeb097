"""An artifact's stored tensors as exact numbers, and matrices of integers made of them (docs/codec.md, "Numbers").

All of it is computed with integers, or with binary64 operations that IEEE 754 rounds correctly (+, *, /, sqrt, rint), so
every machine derives the same integers.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
from torch import Tensor

from bytejepa.artifact.packing import StoredTensor
from bytejepa.codec.fixed_point import IntArray
from bytejepa.errors import CodecError
from bytejepa.model.quantization import QuantizedMatrix

FloatArray = npt.NDArray[np.float64]
MULTIPLIER_BITS = 31
"""Multipliers stay below 2^31, so that their product with an int32 sum fits into 62 bits."""
INT32_MAX = (1 << 31) - 1


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class IntegerMatrix:
    """y = round(codes @ a * multiplier / 2^shift), row by row.

    `dynamic` inputs a are stored as int16 with a common exponent e of the vector; the shift is then `shift` - e.
    """

    codes: npt.NDArray[np.int8]
    """(rows, columns)."""
    multiplier: IntArray
    """(rows,), |.| < 2^31."""
    shift: int
    input_bits: int
    """Bits of a dynamic input's magnitude, 15 or fewer, such that no sum leaves int32."""


class StoredNumbers:
    """Stored tensors as exact numbers."""

    def __init__(self, stored: Mapping[str, StoredTensor]) -> None:
        self.stored = stored

    def matrix(self, *names: str) -> tuple[npt.NDArray[np.int8], FloatArray]:
        """Return int8 codes and binary64 row scales of matrices one above the other."""
        parts = [self._matrix(name) for name in names]
        return np.concatenate([codes for codes, _ in parts]), np.concatenate([scales for _, scales in parts])

    def _matrix(self, name: str) -> tuple[npt.NDArray[np.int8], FloatArray]:
        tensor = self.stored[name]
        if isinstance(tensor, QuantizedMatrix):
            return tensor.codes.numpy(), tensor.scales.numpy().astype(np.float64)
        # a matrix kept as floats gets codes of its own: one division and one rounding a weight, both correct
        weight = tensor.numpy().astype(np.float64)
        scales = np.abs(weight).max(axis=1) / 127.0
        divisor = np.where(scales > 0, scales, np.inf)
        return np.rint(weight / divisor[:, None]).astype(np.int8), scales

    def vector(self, name: str) -> FloatArray:
        """Return a small tensor that is kept as floats, of any shape."""
        tensor = self.stored[name]
        if isinstance(tensor, Tensor):
            return tensor.numpy().astype(np.float64)
        return tensor.codes.numpy().astype(np.float64) * tensor.scales.numpy().astype(np.float64)[:, None]


def scaled(values: FloatArray, fraction_bits: int) -> IntArray:
    """Return round(values * 2^fraction_bits), halves to even."""
    return np.rint(np.ldexp(values, fraction_bits)).astype(np.int64)


def bounded(values: FloatArray, fraction_bits: int, name: str) -> IntArray:
    """Return round(values * 2^fraction_bits) below 2^31. Raises: CodecError for values of 2^15 or more."""
    if float(np.abs(values).max(initial=0.0)) >= 1 << 15:  # one block alone has no skips to weigh
        raise CodecError(f"the codec cannot use this model: the weights of {name} are too large for its formats")
    return scaled(values, fraction_bits)


def integer_matrix(
    codes: npt.NDArray[np.int8], factors: FloatArray, name: str, *, gain_bits: int, largest_exponent: int = 0
) -> IntegerMatrix:
    """Return codes with the row factors as multipliers; `gain_bits`: fraction bits out minus fraction bits in."""
    largest = float(np.abs(factors).max())
    exponent = math.frexp(largest)[1] if largest > 0 else 0  # largest < 2^exponent
    scale_bits = min(MULTIPLIER_BITS - exponent, 62 + gain_bits)
    multiplier = scaled(factors, scale_bits)
    if int(np.abs(multiplier).max()) > INT32_MAX:  # a factor that rounded up to 2^31
        scale_bits -= 1
        multiplier = scaled(factors, scale_bits)
    shift = scale_bits - gain_bits
    row_sum = int(np.abs(codes.astype(np.int64)).sum(axis=1).max())
    input_bits = min(15, (INT32_MAX // max(1, row_sum)).bit_length() - 1)
    if shift - largest_exponent < 1 or input_bits < 8:
        raise CodecError(f"the codec cannot use this model: the weights of {name} are too large for its formats")
    return IntegerMatrix(codes=codes, multiplier=multiplier, shift=shift, input_bits=input_bits)


def static_matrix(codes: npt.NDArray[np.int8], factors: FloatArray, name: str, *, gain_bits: int) -> IntegerMatrix:
    """Return a matrix whose inputs are any int16 vectors. Raises: CodecError if a sum could leave int32."""
    matrix = integer_matrix(codes, factors, name, gain_bits=gain_bits)
    if matrix.input_bits < 15:
        raise CodecError(f"the codec cannot use this model: the codes of {name} are too large for its formats")
    return matrix


def value_bits(codes: npt.NDArray[np.int8], factors: FloatArray, width: int, *, added: float, doubled: bool) -> int:
    """Return the most fraction bits, 14 at most, with which no value can leave int16.

    A normalised vector has length sqrt(width), so a value is at most that times the length of its row, plus what is
    `added`; an output that is gated can be `doubled`.
    """
    squares = (codes.astype(np.int64) ** 2).sum(axis=1).astype(np.float64)
    bound = float((np.sqrt(squares) * np.abs(factors)).max()) * float(np.sqrt(np.float64(width))) + added
    return max(0, min(14, 15 - math.frexp(bound)[1] - doubled)) if bound > 0 else 14
