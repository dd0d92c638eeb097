"""Causal attention and its gradient on a CPU, float32, compiled by numba: a block of queries at a time. Torch-free.

    s = q . k / sqrt(E);   p = softmax(s);   o = p v
    dp = do . v;   ds = p (dp - do . o) / sqrt(E);   dq = ds k;   dk = ds^T q;   dv = p^T do

A query sees the keys from its first one, of its document or window, to itself. What it does not see is hardly computed:
tiles begin and end within 16 keys of that. Nothing but o and the log of each softmax's sum is kept for the gradient, which
computes p again (Dao et al., "FlashAttention", 2022). Each head of keys is one piece of work, so that threads change no
number. Tensors are given as addresses and strides in numbers, their last axis contiguous.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray  # type: ignore[attr-defined]

from bytejepa.kernels.compilation import compiled, compiled_for_c
from bytejepa.kernels.row_functions import (
    dot,
    exponentials,
    largest,
    multiply_row,
    next_number,
    pointer_to,
    slopes,
)
from bytejepa.kernels.tiled_products import LANES, TILE_ROWS, multiply

ROWS = 64
"""Most queries a block."""
_SCORES = 65_536
"""Most scores a block: their 256 KiB, twice in the backward pass, stay in a core's second cache."""
NEXT_PIECE, NEXT_SLOT, IS_BACKWARD, PIECES, GROUPS, REPEATS, LENGTH, WIDTH = range(8)
ADDRESSES, STRIDES, BATCH_STRIDES, HEAD_STRIDES = 8, 16, 24, 32
FIRST, LOG_SUMS, SCRATCH, SCRATCH_NUMBERS, FIRST_STRIDE, WORDS = range(40, 46)
"""Places among the 64-bit words that `work` is told, and how many there are; see there."""
_ACROSS = 64
"""Keys at a time: their 16 KiB stay in the first cache while all queries of a block pass."""


@compiled
def _up(count: int) -> int:
    return (count + LANES - 1) // LANES * LANES


@compiled
def _rows(T: int) -> int:
    """Return how many queries are taken at a time."""
    return max(16, min(ROWS, _SCORES // T // 16 * 16))


@compiled
def scratch_numbers(T: int, E: int, is_backward: bool) -> int:
    """Return how many numbers of memory a thread works in."""
    keys = _up(T)
    return (2 * E * keys + 2 * _rows(T) * keys + 2 * T * E) if is_backward else (E + _rows(T)) * keys


@compiled
def _transpose(x: int, stride: int, T: int, E: int, out: int) -> None:
    """Fill `out` (E, T rounded up) with the transpose of `x` (T, E), zeros after it."""
    keys = _up(T)
    rows, columns = (
        carray(pointer_to(x), T * stride - stride + E, np.float32),
        carray(pointer_to(out), E * keys, np.float32),
    )
    for begin in range(0, E, LANES):
        for t in range(T):
            for e in range(begin, min(begin + LANES, E)):
                columns[e * keys + t] = rows[t * stride + e]
        for e in range(begin, min(begin + LANES, E)):
            columns[e * keys + T : e * keys + keys] = 0.0


@compiled
def _fill(row: int, begin: int, end: int, value: float) -> None:
    if end > begin:
        numbers = carray(pointer_to(row), end, np.float32)
        numbers[begin:end] = value


@compiled
def _against_keys(
    rows: int, stride: int, keys_transposed: int, E: int, T: int, begin: int, end: int, first: Any, out: int
) -> None:
    """Fill `out` (end - begin, T rounded up) with products of the rows `begin` to `end` with the keys that they see, by tiles."""
    keys = _up(T)
    for key in range(first[begin] // _ACROSS * _ACROSS, end, _ACROSS):
        for t in range(begin, end, TILE_ROWS):
            last = min(t + TILE_ROWS, end)
            if last > key and first[t] < key + _ACROSS:
                multiply(
                    rows + 4 * t * stride, stride, 1, keys_transposed + 4 * key, keys, E,
                    out + 4 * ((t - begin) * keys + key), keys, last - t, min(_ACROSS, _up(last) - key), 1.0, False,
                )  # fmt: skip


@compiled
def _forward(
    q: int, v: int, o: int, log_sums: Any, first: Any, strides: Any, T: int, E: int, factor: float, scratch: int
) -> None:
    """Fill `o` and `log_sums` (T,) of one head of queries; `scratch` begins with the keys, transposed."""
    keys = _up(T)
    scores = scratch + 4 * E * keys
    for begin in range(0, T, _rows(T)):
        end = min(begin + _rows(T), T)
        _against_keys(q, strides[0], scratch, E, T, begin, end, first, scores)
        for start in range(begin, end, TILE_ROWS):
            last = min(start + TILE_ROWS, end)
            left, right = first[start] // LANES * LANES, _up(last)
            for t in range(start, last):
                row = scores + 4 * (t - begin) * keys
                _fill(row, left, first[t], -np.inf)
                _fill(row, t + 1, right, -np.inf)
                vectors = (right - left) // LANES
                most = largest(row + 4 * left, vectors) * factor
                total = exponentials(row + 4 * left, vectors, factor, most)
                _fill(row, left, first[t], 0.0)
                _fill(row, t + 1, right, 0.0)
                multiply_row(row + 4 * left, vectors, np.float32(1.0) / total)
                log_sums[t] = most + np.log(total)
            multiply(
                scores + 4 * ((start - begin) * keys + left), keys, 1, v + 4 * left * strides[2], strides[2], last - left,
                o + 4 * start * strides[3], strides[3], last - start, E, 1.0, False,
            )  # fmt: skip


@compiled
def _backward(
    q: int, k: int, do: int, o: int, dq: int, log_sums: Any, first: Any, strides: Any, T: int, E: int, factor: float,
    scratch: int,
) -> None:  # fmt: skip
    """Fill `dq` of one head of queries and add to the gradients of its keys and values, which lie at the end of `scratch`
    after keys and values, transposed."""
    keys = _up(T)
    values = scratch + 4 * E * keys
    scores = values + 4 * E * keys
    gradients = scores + 4 * _rows(T) * keys
    dk = gradients + 4 * _rows(T) * keys
    dv = dk + 4 * T * E
    for begin in range(0, T, _rows(T)):
        end = min(begin + _rows(T), T)
        _against_keys(q, strides[0], scratch, E, T, begin, end, first, scores)
        _against_keys(do, strides[4], values, E, T, begin, end, first, gradients)
        leftmost = first[begin] // TILE_ROWS * TILE_ROWS
        for start in range(begin, end, TILE_ROWS):
            last = min(start + TILE_ROWS, end)
            left, right = first[start] // LANES * LANES, _up(last)
            for t in range(start, last):
                along = dot(do + 4 * t * strides[4], o + 4 * t * strides[3], E // LANES)
                place = 4 * (t - begin) * keys
                row, other = scores + place, gradients + place
                slopes(row + 4 * left, other + 4 * left, (right - left) // LANES, factor, log_sums[t], along)
                for masked in (row, other):
                    _fill(masked, min(left, leftmost), first[t], 0.0)
                    _fill(masked, t + 1, right, 0.0)
            multiply(
                gradients + 4 * ((start - begin) * keys + left), keys, 1, k + 4 * left * strides[1], strides[1],
                last - left, dq + 4 * start * strides[5], strides[5], last - start, E, 1.0, False,
            )  # fmt: skip
        for key in range(leftmost, end, TILE_ROWS):
            count, row = min(TILE_ROWS, end - key), max(key, begin)
            place = 4 * ((row - begin) * keys + key)
            multiply(
                gradients + place, 1, keys, q + 4 * row * strides[0], strides[0], end - row, dk + 4 * key * E, E, count, E,
                1.0, True,
            )  # fmt: skip
            multiply(
                scores + place, 1, keys, do + 4 * row * strides[4], strides[4], end - row, dv + 4 * key * E, E, count, E,
                1.0, True,
            )  # fmt: skip


@compiled
def _copy(x: int, T: int, E: int, out: int, stride: int) -> None:
    rows, there = carray(pointer_to(x), T * E, np.float32), carray(pointer_to(out), T * stride - stride + E, np.float32)
    for t in range(T):
        for e in range(E):
            there[t * stride + e] = rows[t * E + e]


@compiled_for_c("void(intp)")
def work(told: int) -> None:
    """Take pieces of a call's work, a head of keys each, until none is left; several threads do so at once.

    `told` is the address of WORDS 64-bit words. Two counters begin at 0: the next piece, and the next slot of scratch
    memory. Then: whether this is the gradient; how many pieces there are, heads of keys a sequence, queries' heads for
    each, T and E. From ADDRESSES on, eight of q, k, v, o and of the gradients of o, q, k and v, and in the same order
    what lies between positions, sequences and heads of keys, in numbers. Last: the addresses of `first` (int32, a row a
    sequence, FIRST_STRIDE apart), of the logs of the sums (B, H, T), of scratch memory, and its numbers a slot.
    """
    words = carray(pointer_to(told), WORDS, np.int64)
    is_backward, pieces, G, R = words[IS_BACKWARD] != 0, words[PIECES], words[GROUPS], words[REPEATS]
    T, E = words[LENGTH], words[WIDTH]
    addresses, strides = words[ADDRESSES : ADDRESSES + 8], words[STRIDES : STRIDES + 8]
    batch_strides = words[BATCH_STRIDES : BATCH_STRIDES + 8]
    head_strides = words[HEAD_STRIDES : HEAD_STRIDES + 8]
    factor = np.float32(1.0 / np.sqrt(E))
    scratch = words[SCRATCH] + 4 * next_number(told + 8 * NEXT_SLOT) * words[SCRATCH_NUMBERS]
    while True:
        piece = next_number(told + 8 * NEXT_PIECE)
        if piece >= pieces:
            break
        b, g = piece // G, piece % G
        first = carray(pointer_to(words[FIRST] + 4 * b * words[FIRST_STRIDE]), T, np.int32)
        base = addresses + 4 * (b * batch_strides + g * head_strides)
        _transpose(base[1], strides[1], T, E, scratch)
        sums = scratch
        if is_backward:
            _transpose(base[2], strides[2], T, E, scratch + 4 * E * _up(T))
            sums = scratch + 4 * (2 * E + 2 * _rows(T)) * _up(T)
            _fill(sums, 0, 2 * T * E, 0.0)
        for repeat in range(R):
            query = 4 * repeat * E
            log_sums = carray(pointer_to(words[LOG_SUMS] + 4 * ((b * G + g) * R + repeat) * T), T, np.float32)
            if is_backward:
                _backward(
                    base[0] + query, base[1], base[4] + query, base[3] + query, base[5] + query, log_sums, first,
                    strides, T, E, factor, scratch,
                )  # fmt: skip
            else:
                _forward(base[0] + query, base[2], base[3] + query, log_sums, first, strides, T, E, factor, scratch)
        if is_backward:
            _copy(sums, T, E, base[6], strides[6])
            _copy(sums + 4 * T * E, T, E, base[7], strides[7])
