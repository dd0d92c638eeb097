"""JEPA's injection on the compiled path, all integers."""

from __future__ import annotations

from typing import Any

import numpy as np

from bytejepa.codec.fixed_point import GATE_BITS, INT16_MAX, NORMED_BITS, PRENORM_LIMIT, RESIDUAL_LIMIT
from bytejepa.codec.kernels import bit_length, clamped, normalize, rounded, sigmoid_of
from bytejepa.codec.tiles import multiply
from bytejepa.kernels.compilation import compiled

PROJECTOR, PREDICTOR, INJECTION = 0, 2, 4
"""Where the matrices of each begin: two, two and one of them."""


@compiled
def _dynamic(vector: Any, maps: Any, which: int, limit: int, out: Any) -> None:
    """Fill `out` with the product of one of the matrices and an integer vector, which gets a common exponent first."""
    bits = maps.input_bits[which]
    largest = np.int64(0)
    for i in range(vector.shape[0]):
        largest = max(largest, abs(vector[i]))
    exponent = max(0, bit_length(largest) - bits)
    half, most = (np.int64(1) << exponent) >> 1, (np.int64(1) << bits) - 1
    a = np.zeros((1, maps.codes.shape[2] * 2), np.int16)
    for i in range(vector.shape[0]):
        a[0, i] = max(-most, min(most, (vector[i] + half) >> exponent))
    sums = np.empty((1, maps.codes.shape[1] * 16), np.int32)
    multiply(a, maps.codes[which], sums)
    for i in range(out.shape[0]):
        product = np.int64(sums[0, i]) * maps.multiplier[which, i]
        out[i] = max(-limit, min(limit, rounded(product, maps.shift[which, i] - exponent)))


@compiled
def _following_injection(vector: Any, first_map: int, m: Any, sigmoid: Any, out: Any) -> None:
    """Fill `out` (D,) with what the next chunk gets, from what the projector or (first_map) the predictor reads."""
    which, latent = first_map, np.empty(m.latent_dim, np.int64)
    while which < INJECTION:
        part = which // 2
        width, constant, epsilon = m.widths[part, 0], m.widths[part, 1], m.widths[part, 2]
        hidden = np.empty(width, np.int64)
        if which == first_map:
            _dynamic(vector, m.maps, which, PRENORM_LIMIT, hidden)
        else:
            _dynamic(latent, m.maps, which, PRENORM_LIMIT, hidden)
        normalize(hidden, width, constant, epsilon, NORMED_BITS, INT16_MAX, hidden)
        for i in range(width):
            hidden[i] = rounded(hidden[i] * sigmoid_of(hidden[i], sigmoid), GATE_BITS)
        _dynamic(hidden, m.maps, which + 1, PRENORM_LIMIT, latent)
        which += 2
    _dynamic(latent, m.maps, INJECTION, RESIDUAL_LIMIT, out)


@compiled
def add_injections(
    x: Any, num_lanes: int, position: int, m: Any, sigmoid: Any, norm: int, epsilon: int, read: Any, injection: Any
) -> None:
    """Add to the residuals `x` (L * N, D) what their chunks get, and move the chunks on.

    `read` (L, D): the sum of the residuals of the chunk so far, or the last of them where the predictor reads it.
    """
    count, D = x.shape[0] // num_lanes, x.shape[1]
    normed = np.empty(D, np.int64)
    for lane in range(num_lanes):
        for n in range(count):
            place, r = position + n, lane * count + n
            # a chunk's injection is computed when it begins: from the start token, or from the chunk before
            if place % m.chunk_bytes == 0:
                if place == 0:
                    _following_injection(m.start, PREDICTOR, m, sigmoid, injection[lane])
                elif m.reads_residual:
                    normalize(read[lane], D, norm, epsilon, NORMED_BITS, INT16_MAX, normed)
                    _following_injection(normed, PREDICTOR, m, sigmoid, injection[lane])
                else:
                    _following_injection(read[lane], PROJECTOR, m, sigmoid, injection[lane])
                for i in range(D):
                    read[lane, i] = 0
            for i in range(D):
                before = np.int64(x[r, i])
                read[lane, i] = before if m.reads_residual else read[lane, i] + before
                x[r, i] = clamped(before + injection[lane, i], RESIDUAL_LIMIT)
