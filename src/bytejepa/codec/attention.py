"""Attention of the compiled path: heads, caches, softmax and weighted values, all integers."""

from __future__ import annotations

from typing import Any

import numpy as np

from bytejepa.codec.fixed_point import (
    ATTENTION_BITS,
    GATE_BITS,
    INT16_MAX,
    INVERSE_BITS,
    NORMED_BITS,
    PRENORM_LIMIT,
    ROTARY_BITS,
    SOFTMAX_BITS,
)
from bytejepa.codec.kernels import clamped, normalize, rounded, sigmoid_of
from bytejepa.codec.tiles import multiply_wide
from bytejepa.kernels.compilation import compiled


@compiled
def _turn(x: Any, cosines: Any, sines: Any, position: int) -> None:
    """Rotate a head `x` (E,) in place."""
    half = cosines.shape[1]
    for i in range(half):
        a, b = np.int64(x[i]), np.int64(x[half + i])
        cos, sin = np.int64(cosines[position, i]), np.int64(sines[position, i])
        x[i] = clamped(rounded(a * cos + b * sin, ROTARY_BITS), INT16_MAX)
        x[half + i] = clamped(rounded(b * cos - a * sin, ROTARY_BITS), INT16_MAX)


@compiled
def _softmax(scores: Any, length: int, multiplier: int, shift: int, exp2: Any, weights: Any, out: Any) -> None:
    """Fill `out` int16 with probabilities of sum about 2^15 - 1 over the first `length` scores."""
    largest = scores[0]
    for j in range(1, length):
        largest = max(largest, scores[j])
    # factors that are seen to have 32 bits are multiplied eight at a time; a loop without a look-up too
    factor, down = np.uint64(np.uint32(multiplier)), np.uint64(shift)
    half = np.uint64(1) << np.uint64(shift - 1)
    for j in range(length):
        exponent = (np.uint64(np.uint32(largest - scores[j])) * factor + half) >> down
        weights[j] = min(exponent, np.uint64((32 << SOFTMAX_BITS) - 1))  # 2^30 >> 31 is 0 already
    total = np.uint64(0)
    for j in range(length):
        exponent = weights[j]
        weights[j] = exp2[exponent & np.uint32((1 << SOFTMAX_BITS) - 1)] >> (exponent >> np.uint32(SOFTMAX_BITS))
        total += np.uint64(weights[j])
    inverse = np.uint64(np.uint32((np.uint64(INT16_MAX) << np.uint64(INVERSE_BITS)) // total))
    half = np.uint64(1) << np.uint64(INVERSE_BITS - 1)
    for j in range(length):
        out[j] = (np.uint64(weights[j]) * inverse + half) >> np.uint64(INVERSE_BITS)


@compiled
def heads(
    sums: Any, multiplier: Any, shift: Any, constant: int, epsilon: int, sign: Any, cosines: Any, sines: Any,
    keys: Any, place: int, lane: int, position: int, stride: int, queries: Any, own: Any,
) -> None:  # fmt: skip
    """Fill `queries` (G, N * H / G, E) and the values `own` (N, G, E) of one lane from `sums` (N, .), and the cache of keys.

    They are those of positions that are `stride` bytes apart, the first of them number `position`.
    """
    count, G, E = own.shape
    per_group = queries.shape[1] // count
    H = G * per_group
    head = np.empty(E, np.int64)
    for n in range(count):
        for h in range(H + 2 * G):
            limit = PRENORM_LIMIT if h < H + G else INT16_MAX
            begin = h * E
            for e in range(E):
                i = begin + e
                head[e] = clamped(rounded(np.int64(sums[n, i]) * multiplier[i], shift[i]), limit)
            if h >= H + G:
                for e in range(E):
                    own[n, h - H - G, e] = head[e]
                continue
            normalize(head, E, constant, epsilon, NORMED_BITS, INT16_MAX, head)
            _turn(head, cosines, sines, (position + n + 1) * stride - 1)
            if h < H:
                for e in range(E):
                    queries[h // per_group, n * per_group + h % per_group, e] = sign[h] * head[e]
            else:
                for e in range(E):
                    keys[place, lane, h - H, (position + n) // 16, e // 2, (position + n) % 16, e % 2] = head[e]


@compiled
def add_embeddings(own: Any, embedding: Any, ids: Any) -> None:
    """Add to the values `own` (N, G, E) the embeddings (260, G * E) of their `ids` (N,)."""
    count, G, E = own.shape
    for n in range(count):
        for group in range(G):
            for e in range(E):
                own[n, group, e] = clamped(own[n, group, e] + embedding[ids[n], group * E + e], INT16_MAX)


@compiled
def keep_values(own: Any, values: Any, place: int, lane: int, position: int) -> None:
    """Put the values `own` (N, G, E) of one lane into their cache."""
    count, G, E = own.shape
    for n in range(count):
        for group in range(G):
            for e in range(E):
                values[place, lane, group, e // 16, (position + n) // 2, e % 16, (position + n) % 2] = own[n, group, e]


@compiled
def attend(
    queries: Any, keys: Any, values: Any, place: int, lane: int, position: int, window: int, multiplier: Any,
    score_shift: int, exp2: Any, y: Any,
) -> None:  # fmt: skip
    """Fill `y` (N, H * E) int16 from `queries` (G, N * H / G, E) int16 of one lane, each of which sees `window` positions."""
    G, num_rows, E = queries.shape
    per_group = num_rows // y.shape[0]
    positions, outputs = keys.shape[3] * 16, values.shape[3] * 16
    scores = np.empty((4, positions), np.int32)
    weights = np.empty(positions, np.uint32)
    shares = np.zeros((4, positions), np.int16)
    sums = np.empty((4, outputs), np.int32)
    scores_at, shares_at, sums_at = scores.ctypes.data, shares.ctypes.data, sums.ctypes.data
    for group in range(G):
        cache = 2 * positions * ((place * keys.shape[1] + lane) * G + group)
        group_keys, group_values = keys.ctypes.data + cache * E, values.ctypes.data + cache * outputs
        for first in range(0, num_rows, 4):
            rows = min(4, num_rows - first)
            # of these rows' positions, from `begin` on, a block's beginning
            begin = max(0, position + first // per_group + 1 - window) // 32 * 32
            context = position + (first + rows - 1) // per_group + 1 - begin
            at = queries.ctypes.data + 2 * E * (group * num_rows + first)
            multiply_wide(
                at, E, rows, group_keys + 2 * begin * E, 16 * E, (context + 31) // 32 * 2, E // 2, scores_at, positions
            )
            for row in range(rows):
                end = position + (first + row) // per_group + 1 - begin
                seen = max(0, end - window)
                head = group * per_group + (first + row) % per_group
                _softmax(
                    scores[row, seen:], end - seen, multiplier[head], score_shift, exp2, weights, shares[row, seen:]
                )
                for j in range(seen):
                    shares[row, j] = 0
                for j in range(end, min(context + 1, positions)):
                    shares[row, j] = 0
            pairs = (context + 1) // 2
            multiply_wide(
                shares_at, positions, rows, group_values + 32 * begin, 16 * positions, outputs // 16, pairs, sums_at,
                outputs,
            )  # fmt: skip
            for row in range(rows):
                n, head = (first + row) // per_group, group * per_group + (first + row) % per_group
                for e in range(E):
                    y[n, head * E + e] = clamped(rounded(np.int64(sums[row, e]), ATTENTION_BITS), INT16_MAX)


@compiled
def fill_gates(a: Any, codes: Any, multiplier: Any, shift: int, sigmoid: Any, out: Any) -> None:
    """Fill `out` (N, H) with the gates of the heads, 15 fraction bits, from the leading dimensions of `a` (N, D)."""
    for n in range(out.shape[0]):
        for h in range(out.shape[1]):
            read = np.int64(0)
            for i in range(codes.shape[1]):
                read += np.int64(codes[h, i]) * a[n, i]
            out[n, h] = sigmoid_of(rounded(read * multiplier[h], shift), sigmoid)


@compiled
def gate_heads(y: Any, gates: Any) -> None:
    """Multiply the heads' outputs `y` (N, H * E) by twice their gates (N, H)."""
    E = y.shape[1] // gates.shape[1]
    for n in range(y.shape[0]):
        for h in range(gates.shape[1]):
            for e in range(E):
                y[n, h * E + e] = clamped(rounded(y[n, h * E + e] * gates[n, h], GATE_BITS - 1), INT16_MAX)


@compiled
def drop_own_values(y: Any, own: Any) -> None:
    """Take the component along their own value out of the heads' outputs `y` (N, H * E) (XSA)."""
    count, G, E = own.shape
    per_group = y.shape[1] // (G * E)
    for n in range(count):
        for h in range(G * per_group):
            value = own[n, h // per_group]
            dot, squares = np.int64(0), np.int64(0)
            for e in range(E):
                dot += np.int64(y[n, h * E + e]) * value[e]
                squares += np.int64(value[e]) * value[e]
            if squares == 0:
                continue
            share = (dot << 16) // squares
            for e in range(E):
                y[n, h * E + e] = clamped(y[n, h * E + e] - rounded(share * value[e], 16), INT16_MAX)
