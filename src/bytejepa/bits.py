"""Nats, bits, bits per byte, and sizes in decimal units. The only place in the project that divides by ln 2."""

from __future__ import annotations

import math

NATS_PER_BIT = math.log(2.0)
ARTIFACT_LIMIT_BYTES = 16_000_000
"""The challenge's budget for code plus compressed weights, in decimal bytes (spec section 1)."""
VALIDATION_BYTES, VALIDATION_DOCUMENTS = 151_080_891, 50_000
"""The challenge's validation split (spec section 7, item 8)."""


def bits_from_nats(nats: float) -> float:
    """Return `nats` expressed in bits."""
    return nats / NATS_PER_BIT


def bits_per_byte(nats: float, num_bytes: int) -> float:
    """Return the bits per byte of a summed loss of `nats` over text of `num_bytes` bytes.

    The sum may contain the cost of BOS targets; a BOS is zero bytes, so it counts above the line only (spec section 1).
    Text of zero bytes has no rate: the result is NaN.
    """
    return bits_per_byte_of_bits(bits_from_nats(nats), num_bytes)


def bits_per_byte_of_bits(bits: float, num_bytes: int) -> float:
    """Return the bits per byte of text of `num_bytes` bytes that costs `bits` in all; NaN for text of zero bytes."""
    return bits / num_bytes if num_bytes else math.nan


def bits_per_byte_of_size(compressed_bytes: int, content_bytes: int) -> float:
    """Return the bits per byte of content that was compressed to `compressed_bytes`; NaN for content of zero bytes."""
    return bits_per_byte_of_bits(8 * compressed_bytes, content_bytes)


def format_bytes(num_bytes: float) -> str:
    """Return a byte count for people, in decimal units: 14369791 -> '14.37 MB'."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(num_bytes) >= size:
            return f"{num_bytes / size:.2f} {unit}"
    return f"{num_bytes:.0f} B"
