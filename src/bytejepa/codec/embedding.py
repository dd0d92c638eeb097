"""The first block's input on the compiled path: token, pair and run embeddings, norm and smear, all integers."""

from __future__ import annotations

from typing import Any

import numpy as np

from bytejepa.codec.fixed_point import GATE_BITS, MIX_BITS, NORMED_BITS, RESIDUAL_BITS, RESIDUAL_LIMIT
from bytejepa.codec.kernels import normalize, rounded, sigmoid_of
from bytejepa.kernels.compilation import compiled
from bytejepa.kernels.ngram_hash import HASH_BITS, HASH_MULTIPLIER


@compiled
def _pair_row(now: int, before: int, place: int, last: int, exact_from: int) -> Any:
    if place < 1 or min(now, before) < exact_from:
        return last
    if exact_from:
        return (before - exact_from) * 256 + now - exact_from
    return ((36313 * now) ^ (27191 * before)) % last


@compiled
def _add_runs(recent: Any, place: int, runs: Any, orders: Any, sums: Any) -> None:
    """Add the rows of the runs that end with the ids `recent` (reach + 1,), the newest one first, at `place` of the window."""
    hashed, which, low, num_rows = recent[0], 0, (1 << HASH_BITS) - 1, runs.shape[0] // orders.shape[0]
    for offset in range(1, recent.shape[0]):
        hashed = (hashed * HASH_MULTIPLIER + recent[offset]) & low
        if which < orders.shape[0] and orders[which] == offset + 1:
            row = num_rows - 1
            if place >= offset:
                row = ((hashed * HASH_MULTIPLIER & low) * (num_rows - 1)) >> HASH_BITS
            row += num_rows * which
            for i in range(sums.shape[0]):
                sums[i] += runs[row, i]
            which += 1


@compiled
def embed(ids: Any, position: int, e: Any, sigmoid: Any, all_recent: Any, previous: Any, x: Any) -> None:
    """Fill `x` (L * N, D) with the normalised, smeared embeddings of `ids` (L, N), and move the state on.

    `all_recent` (L, reach + 1) holds the last ids of every lane, the newest one first, and `previous` (L, D) the last
    embedding before it was smeared; at a window's beginning neither is read.
    """
    num_lanes, count = ids.shape
    D, last_pair, reads = e.token.shape[1], e.pairs.shape[0] - 1, e.smear_input.shape[0]
    sums, normed = np.empty(D, np.int32), np.empty(D, np.int32)
    for lane in range(num_lanes):
        recent = all_recent[lane]
        for n in range(count):
            for offset in range(recent.shape[0] - 1, 0, -1):
                recent[offset] = recent[offset - 1]
            recent[0] = ids[lane, n]
            place, r = position + n, lane * count + n
            for i in range(D):
                sums[i] = e.token[recent[0], i]
            if last_pair >= 0:
                row = _pair_row(recent[0], recent[1], place, last_pair, e.exact_pairs_from)
                for i in range(D):
                    sums[i] += e.pairs[row, i]
            if e.orders.shape[0]:
                _add_runs(recent, place, e.runs, e.orders, sums)
            normalize(sums, D, e.norm, e.epsilon, RESIDUAL_BITS, RESIDUAL_LIMIT, normed)
            for i in range(D):
                x[r, i] = normed[i]
            if not e.smear.shape[0]:
                continue
            if reads:
                read = np.int64(0)
                for i in range(reads):
                    read += np.int64(normed[i]) * e.smear_input[i]
                read = rounded(read, MIX_BITS + RESIDUAL_BITS - NORMED_BITS)
            for i in range(D):
                gate = sigmoid_of(e.smear[i] + read, sigmoid) if reads else e.smear[i]
                carried = np.int64(previous[lane, i]) if place else np.int64(0)
                x[r, i] += rounded(gate * (carried - normed[i]), GATE_BITS)
                previous[lane, i] = normed[i]
