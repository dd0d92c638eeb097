"""The integer forward pass, compiled for CPUs: the fast path of both encoder and decoder.

The same function takes one position of many lanes (decoding) or many positions of one (encoding); every number is an
integer, so the result does not depend on it. `bytejepa.codec.torch_model` is the same arithmetic written for reading, and for
GPUs; tests hold the two together.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from bytejepa.codec.attention import attend, drop_own_values, heads
from bytejepa.codec.fixed_point import (
    FREQUENCY_BITS,
    GATE_BITS,
    INT16_MAX,
    LOGIT_BITS,
    MIX_BITS,
    NORMED_BITS,
    PRENORM_LIMIT,
    RESIDUAL_BITS,
    RESIDUAL_LIMIT,
    SIGMOID_RANGE,
    SIGMOID_STEP_BITS,
    SOFTMAX_BITS,
    TANH_BITS,
    TANH_RANGE,
    TANH_STEP_BITS,
    TOTAL_BITS,
)
from bytejepa.codec.kernels import add_scaled, bit_length, clamped, mix, normalize, normalize_rows, rounded, squared
from bytejepa.codec.tiles import multiply
from bytejepa.kernels.compilation import compiled


@compiled
def _begin(previous_id: Any, smear_previous: Any, chunk_sum: Any) -> None:
    """Take all lanes to the beginning of a window."""
    for lane in range(previous_id.shape[0]):
        previous_id[lane] = -1
        for i in range(chunk_sum.shape[1]):
            smear_previous[lane, i] = 0
            chunk_sum[lane, i] = 0


@compiled
def _copy(source: Any, target: Any) -> None:
    # an assignment of whole arrays compiles the text of its error messages too
    for r in range(source.shape[0]):
        for i in range(source.shape[1]):
            target[r, i] = source[r, i]


@compiled
def _embed(
    ids: Any, embedding: Any, bigram: Any, smear: Any, constant: int, epsilon: int, previous_id: Any, previous: Any,
    x: Any,
) -> None:  # fmt: skip
    """Fill `x` (R, D) with the normalised, smeared embeddings of `ids` (L, N), and move the state on."""
    num_lanes, count = ids.shape
    D, rows = embedding.shape[1], bigram.shape[0]
    sums, normed = np.empty(D, np.int32), np.empty(D, np.int32)
    for lane in range(num_lanes):
        for n in range(count):
            now, before, r = ids[lane, n], previous_id[lane], lane * count + n
            for i in range(D):
                sums[i] = embedding[now, i]
            if rows:
                row = ((36313 * now) ^ (27191 * before)) % (rows - 1) if before >= 0 else rows - 1
                for i in range(D):
                    sums[i] += bigram[row, i]
            normalize(sums, D, constant, epsilon, RESIDUAL_BITS, RESIDUAL_LIMIT, normed)
            for i in range(D):
                x[r, i] = normed[i]
            if smear.shape[0]:
                for i in range(D):
                    x[r, i] += rounded(np.int64(smear[i]) * (np.int64(previous[lane, i]) - normed[i]), GATE_BITS)
                    previous[lane, i] = normed[i]
            previous_id[lane] = now


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
def _silu(x: Any, sigmoid: Any) -> None:
    """Replace normalised numbers by x * sigmoid(x), in place."""
    fine = NORMED_BITS - SIGMOID_STEP_BITS
    for i in range(x.shape[0]):
        size = min(abs(x[i]), (SIGMOID_RANGE << NORMED_BITS) - 1)
        index, rest = size >> fine, size & ((1 << fine) - 1)
        gate = sigmoid[index] + rounded((sigmoid[index + 1] - sigmoid[index]) * rest, fine)
        if x[i] < 0:
            gate = (1 << GATE_BITS) - gate
        x[i] = rounded(x[i] * gate, GATE_BITS)


@compiled
def _following_injection(
    vector: Any, first_map: int, maps: Any, widths: Any, latent: Any, sigmoid: Any, out: Any
) -> None:
    """Fill `out` (D,) with what the next chunk gets: from a chunk's sum of residuals (first_map 0), or from a latent (2)."""
    which = first_map
    while which < 4:
        part = which // 2
        hidden = np.empty(widths[part, 0], np.int64)
        if which == first_map:
            _dynamic(vector, maps, which, PRENORM_LIMIT, hidden)
        else:
            _dynamic(latent, maps, which, PRENORM_LIMIT, hidden)
        normalize(hidden, widths[part, 0], widths[part, 1], widths[part, 2], NORMED_BITS, INT16_MAX, hidden)
        _silu(hidden, sigmoid)
        _dynamic(hidden, maps, which + 1, PRENORM_LIMIT, latent)
        which += 2
    _dynamic(latent, maps, 4, RESIDUAL_LIMIT, out)


@compiled
def _add_injections(
    x: Any, num_lanes: int, position: int, chunk_bytes: int, maps: Any, widths: Any, start: Any, sigmoid: Any,
    chunk_sum: Any, injection: Any,
) -> None:  # fmt: skip
    """Add to the residuals `x` (L * N, D) what their chunks get, and move the chunks on."""
    count, D = x.shape[0] // num_lanes, x.shape[1]
    latent = np.empty(start.shape[0], np.int64)
    for lane in range(num_lanes):
        for n in range(count):
            place, r = position + n, lane * count + n
            # a chunk's injection is computed when it begins: from the start latent, or from the chunk before
            if place % chunk_bytes == 0:
                vector = start if place == 0 else chunk_sum[lane]
                _following_injection(vector, 2 if place == 0 else 0, maps, widths, latent, sigmoid, injection[lane])
                for i in range(D):
                    chunk_sum[lane, i] = 0
            for i in range(D):
                chunk_sum[lane, i] += x[r, i]
                x[r, i] = clamped(np.int64(x[r, i]) + injection[lane, i], RESIDUAL_LIMIT)


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
def feed(m: Any, s: Any, ids: Any, position: int, first_wanted: int, out: Any) -> None:
    """Advance the lanes by `ids` (L, N), which stand at `position` in their windows (0 begins one).

    `out` (L * n, 256) int64 gets the logits of the last n = N - first_wanted positions of each lane.
    """
    num_lanes, count = ids.shape
    num_rows, D, E, G = num_lanes * count, m.width, m.head_dim, m.num_kv_heads
    num_layers, per_group = m.score_shift.shape[0], m.num_heads // m.num_kv_heads
    x, first = np.empty((num_rows, D), np.int32), np.empty((num_rows, D), np.int32)
    a = np.empty((num_rows, D), np.int16)
    widest = max(m.qkv.codes.shape[1], m.output.codes.shape[1], m.head.codes.shape[1]) * 16
    sums = np.empty((num_rows, widest), np.int32)
    hidden = np.empty((num_rows, m.down.codes.shape[2] * 2), np.int16)
    hidden_sums = np.empty((num_rows, m.up.codes.shape[1] * 16), np.int32)
    skips = np.empty((m.num_encoder_layers, num_rows, D), np.int32)
    queries, own = np.empty((G, count * per_group, E), np.int16), np.empty((count, G, E), np.int16)
    whole = np.full(D, 1 << MIX_BITS, np.int32)
    if position == 0:
        _begin(s.previous_id, s.smear_previous, s.chunk_sum)
    _embed(
        ids, m.embedding, m.bigram, m.smear, m.norm_width, m.embedding_epsilon, s.previous_id, s.smear_previous, first
    )
    _copy(first, x)
    for layer in range(num_layers):
        if m.has_skip[layer]:
            mix(x, whole, skips[2 * m.num_encoder_layers - 1 - layer], m.skip[layer])
        if m.mix.shape[1]:
            mix(x, m.mix[layer, 0], first, m.mix[layer, 1])
        normalize_rows(x, m.norm_width, m.residual_epsilon, a)
        multiply(a, m.qkv.codes[layer], sums)
        for lane in range(num_lanes):
            rows = slice(lane * count, (lane + 1) * count)
            heads(
                sums[rows], m.qkv.multiplier[layer], m.qkv.shift[layer], m.norm_head, m.head_epsilon,
                m.query_sign[layer], m.cosines, m.sines, s.keys, s.values, layer, lane, position, queries, own,
            )  # fmt: skip
            y = a[rows]
            attend(
                queries, s.keys, s.values, layer, lane, position, m.score_multiplier[layer], m.score_shift[layer],
                m.exp2, y,
            )  # fmt: skip
            if m.drops_own_value[layer]:
                drop_own_values(y, own)
        multiply(a, m.output.codes[layer], sums)
        for r in range(num_rows):
            add_scaled(x[r], sums[r], m.output.multiplier[layer], m.output.shift[layer, 0])
        normalize_rows(x, m.norm_width, m.residual_epsilon, a)
        _transform(x, a, m.up, m.down, layer, sums, hidden, hidden_sums)
        if layer < m.num_encoder_layers:
            _copy(x, skips[layer])
    if m.chunk_bytes:
        _add_injections(
            x, num_lanes, position, m.chunk_bytes, m.latent_maps, m.latent_widths, m.latent_start, m.sigmoid,
            s.chunk_sum, s.injection,
        )  # fmt: skip
    wanted = count - first_wanted
    for lane in range(num_lanes):
        for n in range(wanted):
            r = lane * count + first_wanted + n
            normalize(x[r], D, m.norm_width, m.residual_epsilon, NORMED_BITS, INT16_MAX, a[lane * wanted + n])
    multiply(a[: num_lanes * wanted], m.head.codes[0], sums)
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
