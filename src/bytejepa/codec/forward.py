"""The integer forward pass, compiled for CPUs: the fast path of both encoder and decoder.

The same function takes one position of many lanes (decoding) or many positions of one (encoding); every number is an
integer, so the result does not depend on it. `bytejepa.codec.torch_model` is the same arithmetic written for reading, and for
GPUs; tests hold the two together.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from bytejepa.codec.attention import add_embeddings, attend, drop_own_values, fill_gates, gate_heads, heads, keep_values
from bytejepa.codec.embedding import embed
from bytejepa.codec.fixed_point import (
    FREQUENCY_BITS,
    GATE_BITS,
    INT16_MAX,
    LOGIT_BITS,
    MIX_BITS,
    NORMED_BITS,
    RESIDUAL_LIMIT,
    SOFTMAX_BITS,
    TANH_BITS,
    TANH_RANGE,
    TANH_STEP_BITS,
    TOTAL_BITS,
)
from bytejepa.codec.kernels import add_scaled, clamped, mix, normalize, normalize_rows, rounded, squared
from bytejepa.codec.latents import add_injections
from bytejepa.codec.tiles import multiply
from bytejepa.kernels.compilation import compiled


@compiled
def _copy(source: Any, target: Any) -> None:
    # an assignment of whole arrays compiles the text of its error messages too
    for r in range(source.shape[0]):
        for i in range(source.shape[1]):
            target[r, i] = source[r, i]


@compiled
def _transform(x: Any, a: Any, up: Any, down: Any, layer: int, sums: Any, hidden: Any, hidden_sums: Any) -> None:
    """Add a layer's MLP to the residuals `x`; `a` holds them normalised."""
    squares = np.empty(hidden.shape[1], np.int64)
    exponents = np.empty(x.shape[0], np.int64)
    multiply(a, up.codes[layer], hidden_sums)
    for r in range(x.shape[0]):
        exponents[r] = squared(
            hidden_sums[r], up.multiplier[layer], up.shift[layer], down.input_bits[layer], squares, hidden[r]
        )
    multiply(hidden, down.codes[layer], sums)
    for r in range(x.shape[0]):
        add_scaled(x[r], sums[r], down.multiplier[layer], down.shift[layer, 0] - exponents[r])


@compiled
def _logits(sums: Any, multiplier: Any, shift: Any, tanh: Any, softcap: int, out: Any) -> None:
    """Fill `out` (256,) int64 with logits in binary digits, 16 fraction bits."""
    fine = LOGIT_BITS - TANH_STEP_BITS
    for i in range(256):
        scaled = rounded(np.int64(sums[i]) * multiplier[i], shift[i])
        size = min(abs(scaled), (TANH_RANGE << LOGIT_BITS) - 1)
        index, rest = size >> fine, size & ((1 << fine) - 1)
        bounded = tanh[index] + rounded((tanh[index + 1] - tanh[index]) * rest, fine)
        out[i] = rounded((bounded if scaled >= 0 else -bounded) * softcap, TANH_BITS)


@compiled
def _skip(x: Any, popped: Any, weight: Any, gate: Any) -> None:
    """Go on from a gated mean of the popped outputs, weighted, and the residuals `x`."""
    for r in range(x.shape[0]):
        for i in range(x.shape[1]):
            skip = clamped(rounded(np.int64(popped[r, i]) * weight[i], MIX_BITS), RESIDUAL_LIMIT)
            x[r, i] = clamped(skip + rounded((x[r, i] - skip) * gate[i], GATE_BITS), RESIDUAL_LIMIT)


@compiled
def _pass(
    m: Any, begin: int, end: int, num_lanes: int, position: int, stride: int, first: Any, ids: Any, keys: Any,
    values: Any, skips: Any, x: Any,
) -> None:  # fmt: skip
    """Take the residuals `x` (L * N, D) through the blocks at the places `begin` .. `end` - 1.

    They are those of positions that are `stride` bytes apart, the first of them number `position` in the caches; `first`
    (L * N, D) and `ids` (L * N,) are those of the same positions, `skips` has the outputs that are popped later.
    """
    num_rows, D = x.shape
    count, E, G, per_group = num_rows // num_lanes, m.head_dim, m.num_kv_heads, m.num_heads // m.num_kv_heads
    num_gated = m.gate_codes.shape[1]
    a, kept = np.empty((num_rows, D), np.int16), np.empty((num_rows, D), np.int16)
    sums = np.empty((num_rows, max(m.qkv.codes.shape[1], m.output.codes.shape[1]) * 16), np.int32)
    hidden = np.empty((num_rows, m.down.codes.shape[2] * 2), np.int16)
    hidden_sums = np.empty((num_rows, m.up.codes.shape[1] * 16), np.int32)
    queries, own = np.empty((G, count * per_group, E), np.int16), np.empty((count, G, E), np.int16)
    gates, whole = np.empty((count, num_gated), np.int64), np.full(D, 1 << MIX_BITS, np.int32)
    for place in range(begin, end):
        layer, cache, popped = m.layer_of_place[place], m.cache_of_place[place], m.popped_place[place]
        if popped >= 0:
            pop = m.num_pushing - 1 - popped
            if m.skip_gates.shape[0]:
                _skip(x, skips[popped], m.skips[pop], m.skip_gates[pop])
            else:
                mix(x, whole, skips[popped], m.skips[pop])
        if m.mix.shape[1]:
            mix(x, m.mix[layer, 0], first, m.mix[layer, 1])
        normalize_rows(x, m.norm_width, m.residual_epsilon, a)
        if m.is_parallel[layer]:
            _copy(a, kept)
        multiply(a, m.qkv.codes[layer], sums)
        for lane in range(num_lanes):
            rows = slice(lane * count, (lane + 1) * count)
            heads(
                sums[rows], m.qkv.multiplier[layer], m.qkv.shift[layer], m.norm_head, m.head_epsilon,
                m.query_sign[layer], m.cosines, m.sines, keys, cache, lane, position, stride, queries, own,
            )  # fmt: skip
            if m.value_embedding_of[layer] >= 0:
                add_embeddings(own, m.value_embedding[m.value_embedding_of[layer]], ids[rows])
            keep_values(own, values, cache, lane, position)
            y = a[rows]
            if num_gated:
                fill_gates(y, m.gate_codes[layer], m.gate_multiplier[layer], m.gate_shift[layer], m.sigmoid, gates)
            attend(
                queries, keys, values, cache, lane, position, m.window_of_place[place], m.score_multiplier[layer],
                m.score_shift[layer], m.exp2, y,
            )  # fmt: skip
            if num_gated:
                gate_heads(y, gates)
            if m.drops_own_value[layer]:
                drop_own_values(y, own)
        multiply(a, m.output.codes[layer], sums)
        for r in range(num_rows):
            add_scaled(x[r], sums[r], m.output.multiplier[layer], m.output.shift[layer, 0])
        if m.is_parallel[layer]:
            _copy(kept, a)
        else:
            normalize_rows(x, m.norm_width, m.residual_epsilon, a)
        _transform(x, a, m.up, m.down, layer, sums, hidden, hidden_sums)
        if place < m.num_pushing:
            _copy(x, skips[place])


@compiled
def _pass_chunks(
    m: Any, s: Any, num_lanes: int, position: int, first: Any, ids: Any, skips: Any, x: Any
) -> None:  # fmt: skip
    """Take the residuals of the chunks that end in `x` (L * N, D) through their blocks, and add what that changed, or what it
    did at the last chunk before, to all positions until the next one ends."""
    stride, D, count = m.chunk_stride, x.shape[1], x.shape[0] // num_lanes
    begin = position // stride
    ended = (position + count) // stride - begin
    at_ends, first_at_ends = np.empty((num_lanes * ended, D), np.int32), np.empty((num_lanes * ended, D), np.int32)
    ids_at_ends = np.empty(num_lanes * ended, np.int64)
    for lane in range(num_lanes):
        for chunk in range(ended):
            r, n = lane * ended + chunk, lane * count + (begin + chunk + 1) * stride - 1 - position
            ids_at_ends[r] = ids[n]
            for i in range(D):
                at_ends[r, i], first_at_ends[r, i] = x[n, i], first[n, i]
    if ended:
        places, keys, values = m.chunk_places, s.chunk_keys, s.chunk_values
        _pass(
            m, places[0], places[1], num_lanes, begin, stride, first_at_ends, ids_at_ends, keys, values, skips, at_ends
        )
    for lane in range(num_lanes):
        for n in range(count):
            place, r = position + n, lane * count + n
            if place == 0:
                for i in range(D):
                    s.chunk_change[lane, i] = 0
            if (place + 1) % stride == 0:
                chunk = lane * ended + place // stride - begin
                for i in range(D):
                    s.chunk_change[lane, i] = np.int64(at_ends[chunk, i]) - x[r, i]
            for i in range(D):
                added = rounded(s.chunk_change[lane, i] * m.chunk_scale[i], MIX_BITS)
                x[r, i] = clamped(x[r, i] + added, RESIDUAL_LIMIT)


@compiled
def feed(m: Any, s: Any, ids: Any, position: int, first_wanted: int, out: Any) -> None:
    """Advance the lanes by `ids` (L, N), which stand at `position` in their windows (0 begins one).

    `out` (L * n, 256) int64 gets the logits of the last n = N - first_wanted positions of each lane.
    """
    num_lanes, count = ids.shape
    num_rows, D, num_places, (begin, end) = num_lanes * count, m.width, m.layer_of_place.shape[0], m.chunk_places
    x, first = np.empty((num_rows, D), np.int32), np.empty((num_rows, D), np.int32)
    skips, flat = np.empty((m.num_pushing, num_rows, D), np.int32), ids.reshape(num_rows)
    embed(ids, position, m.embedding, m.sigmoid, s.recent_ids, s.smear_previous, first)
    _copy(first, x)
    if end > begin:
        _pass(m, 0, begin, num_lanes, position, 1, first, flat, s.keys, s.values, skips, x)
        _pass_chunks(m, s, num_lanes, position, first, flat, skips, x)
    _pass(m, end, num_places, num_lanes, position, 1, first, flat, s.keys, s.values, skips, x)
    if m.latents.chunk_bytes:
        add_injections(
            x, num_lanes, position, m.latents, m.sigmoid, m.norm_width, m.residual_epsilon, s.latent_read, s.injection
        )
    wanted = count - first_wanted
    a, sums = np.empty((num_lanes * wanted, D), np.int16), np.empty((num_lanes * wanted, 256), np.int32)
    for lane in range(num_lanes):
        for n in range(wanted):
            r = lane * count + first_wanted + n
            normalize(x[r], D, m.norm_width, m.residual_epsilon, NORMED_BITS, INT16_MAX, a[lane * wanted + n])
    multiply(a, m.head.codes[0], sums)
    for r in range(num_lanes * wanted):
        _logits(sums[r], m.head.multiplier[0], m.head.shift[0], m.tanh, m.softcap, out[r])


@compiled
def fill_frequencies(logits: Any, exp2: Any, out: Any) -> None:
    """Fill `out` (R, 256) int64 with frequencies from logits (R, 256): each at least 1, of sum 2^24."""
    for r in range(logits.shape[0]):
        best, total = 0, np.int64(0)
        for i in range(1, 256):
            if logits[r, i] > logits[r, best]:
                best = i
        largest = logits[r, best]  # `out` may be `logits` itself
        for i in range(256):
            exponent = rounded(largest - logits[r, i], LOGIT_BITS - SOFTMAX_BITS)
            weight = exp2[exponent & ((1 << SOFTMAX_BITS) - 1)] >> min(exponent >> SOFTMAX_BITS, 63)
            out[r, i] = weight
            total += weight
        gain = (((np.int64(1) << TOTAL_BITS) - 256) << FREQUENCY_BITS) // total
        left = np.int64(1) << TOTAL_BITS
        for i in range(256):
            out[r, i] = 1 + ((out[r, i] * gain) >> FREQUENCY_BITS)
            left -= out[r, i]
        out[r, best] += left
