"""The integer forward pass, compiled for CPUs: the fast path of both encoder and decoder.

The same function takes one position of many lanes (decoding) or many positions of one (encoding); every number is an
integer, so the result does not depend on it. `bytejepa.codec.torch_model` is the same arithmetic written for reading, and for
GPUs; tests hold the two together.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from bytejepa.codec import fixed_point as fp
from bytejepa.codec.tiles import compiled, multiply, multiply_wide
from bytejepa.data.vocabulary import BYTE_OFFSET

# numba takes module constants as compile-time numbers
RESIDUAL_BITS, RESIDUAL_LIMIT, NORMED_BITS = fp.RESIDUAL_BITS, fp.RESIDUAL_LIMIT, fp.NORMED_BITS
PRENORM_BITS, PRENORM_LIMIT, HIDDEN_LIMIT = fp.PRENORM_BITS, fp.PRENORM_LIMIT, fp.HIDDEN_LIMIT
NORM_BITS, GATE_BITS, MIX_BITS, ROTARY_BITS = fp.NORM_BITS, fp.GATE_BITS, fp.MIX_BITS, fp.ROTARY_BITS
SOFTMAX_BITS, ATTENTION_BITS, TOTAL_BITS = fp.SOFTMAX_BITS, fp.ATTENTION_BITS, fp.TOTAL_BITS
TANH_STEP_BITS, TANH_BITS, TANH_RANGE = fp.TANH_STEP_BITS, fp.TANH_BITS, fp.TANH_RANGE
SIGMOID_STEP_BITS, SIGMOID_RANGE = fp.SIGMOID_STEP_BITS, fp.SIGMOID_RANGE
LOGIT_BITS, INT16_MAX, FIRST_BYTE_ID = fp.LOGIT_BITS, fp.INT16_MAX, BYTE_OFFSET
INVERSE_BITS = 46
"""Fraction bits of the reciprocal of a softmax's sum."""
FREQUENCY_BITS = 38


@compiled
def _rounded(value: Any, shift: Any) -> Any:
    """Return value / 2^shift, to the nearest integer, halves upwards."""
    return (value + (np.int64(1) << (shift - 1))) >> shift


@compiled
def _clamped(value: int, limit: int) -> int:
    return max(-limit, min(limit, value))


@compiled
def _square_root(value: Any) -> Any:
    """Return the largest integer whose square is at most `value`."""
    root = np.int64(np.sqrt(np.float64(value)))
    while root * root > value:
        root -= 1
    while (root + 1) * (root + 1) <= value:
        root += 1
    return root


@compiled
def _normalize(x: Any, length: int, constant: int, epsilon: int, fraction_bits: int, limit: int, out: Any) -> None:
    """Fill `out` with x / rms(x), with `fraction_bits`."""
    squares = np.int64(epsilon)
    for i in range(length):
        squares += np.int64(x[i]) * np.int64(x[i])
    gain = constant // _square_root(squares)
    shift = NORM_BITS - fraction_bits
    half = np.int64(1) << (shift - 1)
    for i in range(length):
        out[i] = max(-limit, min(limit, (np.int64(x[i]) * gain + half) >> shift))


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
            _normalize(sums, D, constant, epsilon, RESIDUAL_BITS, RESIDUAL_LIMIT, normed)
            for i in range(D):
                x[r, i] = normed[i]
            if smear.shape[0]:
                for i in range(D):
                    x[r, i] += _rounded(np.int64(smear[i]) * (np.int64(previous[lane, i]) - normed[i]), GATE_BITS)
                    previous[lane, i] = normed[i]
            previous_id[lane] = now


@compiled
def _add_scaled(x: Any, sums: Any, multiplier: Any, shift: int) -> None:
    """Add the sums times their multipliers to the residual `x`, saturated."""
    half = np.int64(1) << (shift - 1)
    for i in range(x.shape[0]):
        x[i] = max(-RESIDUAL_LIMIT, min(RESIDUAL_LIMIT, x[i] + ((np.int64(sums[i]) * multiplier[i] + half) >> shift)))


@compiled
def _turn(x: Any, cosines: Any, sines: Any, position: int) -> None:
    """Rotate a head `x` (E,) in place."""
    half = cosines.shape[1]
    for i in range(half):
        a, b = np.int64(x[i]), np.int64(x[half + i])
        cos, sin = np.int64(cosines[position, i]), np.int64(sines[position, i])
        x[i] = _clamped(_rounded(a * cos + b * sin, ROTARY_BITS), INT16_MAX)
        x[half + i] = _clamped(_rounded(b * cos - a * sin, ROTARY_BITS), INT16_MAX)


@compiled
def _softmax(scores: Any, length: int, multiplier: int, shift: int, exp2: Any, weights: Any, out: Any) -> None:
    """Fill `out` int16 with probabilities of sum about 2^15 - 1 over the first `length` scores."""
    largest = scores[0]
    for j in range(1, length):
        largest = max(largest, scores[j])
    half = np.int64(1) << (shift - 1)
    total = np.int64(0)
    for j in range(length):
        exponent = ((np.int64(largest) - np.int64(scores[j])) * multiplier + half) >> shift
        weight = exp2[exponent & ((1 << SOFTMAX_BITS) - 1)] >> min(exponent >> SOFTMAX_BITS, 63)
        weights[j] = weight
        total += weight
    inverse = (np.int64(INT16_MAX) << INVERSE_BITS) // total
    for j in range(length):
        out[j] = (weights[j] * inverse + (np.int64(1) << (INVERSE_BITS - 1))) >> INVERSE_BITS


@compiled
def _attend(
    queries: Any, keys: Any, values: Any, layer: int, lane: int, position: int, multiplier: Any, score_shift: int,
    exp2: Any, y: Any,
) -> None:  # fmt: skip
    """Fill `y` (N, H * E) int16 from `queries` (G, N * H / G, E) int16 of one lane."""
    G, num_rows, E = queries.shape
    per_group = num_rows // y.shape[0]
    positions, outputs = keys.shape[3] * 16, values.shape[3] * 16
    scores = np.empty((4, positions), np.int32)
    weights = np.empty(positions, np.int64)
    shares = np.zeros((4, positions), np.int16)
    sums = np.empty((4, outputs), np.int32)
    scores_at, shares_at, sums_at = scores.ctypes.data, shares.ctypes.data, sums.ctypes.data
    for group in range(G):
        cache = 2 * positions * ((layer * keys.shape[1] + lane) * G + group)
        group_keys, group_values = keys.ctypes.data + cache * E, values.ctypes.data + cache * outputs
        for first in range(0, num_rows, 4):
            rows = min(4, num_rows - first)
            context = position + (first + rows - 1) // per_group + 1
            at = queries.ctypes.data + 2 * E * (group * num_rows + first)
            multiply_wide(at, E, rows, group_keys, 16 * E, (context + 31) // 32 * 2, E // 2, scores_at, positions)
            for row in range(rows):
                length = position + (first + row) // per_group + 1
                head = group * per_group + (first + row) % per_group
                _softmax(scores[row], length, multiplier[head], score_shift, exp2, weights, shares[row])
                for j in range(length, min(context + 1, positions)):
                    shares[row, j] = 0
            pairs = (context + 1) // 2
            multiply_wide(
                shares_at, positions, rows, group_values, 16 * positions, outputs // 16, pairs, sums_at, outputs
            )
            for row in range(rows):
                n, head = (first + row) // per_group, group * per_group + (first + row) % per_group
                for e in range(E):
                    y[n, head * E + e] = _clamped(_rounded(np.int64(sums[row, e]), ATTENTION_BITS), INT16_MAX)


@compiled
def _drop_own_values(y: Any, own: Any) -> None:
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
                y[n, h * E + e] = _clamped(y[n, h * E + e] - _rounded(share * value[e], 16), INT16_MAX)


@compiled
def _heads(
    sums: Any, multiplier: Any, shift: Any, constant: int, epsilon: int, sign: Any, cosines: Any, sines: Any,
    keys: Any, values: Any, layer: int, lane: int, position: int, queries: Any, own: Any,
) -> None:  # fmt: skip
    """Fill `queries` (G, N * H / G, E) and the values `own` (N, G, E) of one lane from `sums` (N, .), and the caches."""
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
                head[e] = _clamped(_rounded(np.int64(sums[n, i]) * multiplier[i], shift[i]), limit)
            if h >= H + G:
                for e in range(E):
                    own[n, h - H - G, e] = head[e]
                continue
            _normalize(head, E, constant, epsilon, NORMED_BITS, INT16_MAX, head)
            _turn(head, cosines, sines, position + n)
            if h < H:
                for e in range(E):
                    queries[h // per_group, n * per_group + h % per_group, e] = sign[h] * head[e]
            else:
                for e in range(E):
                    keys[layer, lane, h - H, (position + n) // 16, e // 2, (position + n) % 16, e % 2] = head[e]
        for group in range(G):
            for e in range(E):
                values[layer, lane, group, e // 16, (position + n) // 2, e % 16, (position + n) % 2] = own[n, group, e]


@compiled
def _bit_length(value: int) -> int:
    length = 0
    while value > 0:
        value >>= 1
        length += 1
    return length


@compiled
def _squared(sums: Any, multiplier: Any, shift: Any, bits: int, squares: Any, out: Any) -> int:
    """Fill `out` int16 with leaky_relu(hidden)^2 of a row under a common exponent, and return the exponent."""
    largest = np.int64(0)
    for i in range(squares.shape[0]):
        hidden = max(-HIDDEN_LIMIT, min(HIDDEN_LIMIT, _rounded(np.int64(sums[i]) * multiplier[i], shift[i])))
        square = hidden * hidden
        if hidden < 0:
            square = (square + 2) >> 2  # the slope is 1/2
        squares[i] = square
        largest = max(largest, square)
    exponent = max(0, _bit_length(largest) - bits)
    half = (np.int64(1) << exponent) >> 1
    limit = (np.int64(1) << bits) - 1
    for i in range(squares.shape[0]):
        out[i] = min(limit, (squares[i] + half) >> exponent)
    return exponent


@compiled
def _dynamic(vector: Any, maps: Any, which: int, limit: int, out: Any) -> None:
    """Fill `out` with the product of one of the matrices and an integer vector, which gets a common exponent first."""
    bits = maps.input_bits[which]
    largest = np.int64(0)
    for i in range(vector.shape[0]):
        largest = max(largest, abs(vector[i]))
    exponent = max(0, _bit_length(largest) - bits)
    half, most = (np.int64(1) << exponent) >> 1, (np.int64(1) << bits) - 1
    a = np.zeros((1, maps.codes.shape[2] * 2), np.int16)
    for i in range(vector.shape[0]):
        a[0, i] = max(-most, min(most, (vector[i] + half) >> exponent))
    sums = np.empty((1, maps.codes.shape[1] * 16), np.int32)
    multiply(a, maps.codes[which], sums)
    for i in range(out.shape[0]):
        product = np.int64(sums[0, i]) * maps.multiplier[which, i]
        out[i] = max(-limit, min(limit, _rounded(product, maps.shift[which, i] - exponent)))


@compiled
def _silu(x: Any, sigmoid: Any) -> None:
    """Replace normalised numbers by x * sigmoid(x), in place."""
    fine = NORMED_BITS - SIGMOID_STEP_BITS
    for i in range(x.shape[0]):
        size = min(abs(x[i]), (SIGMOID_RANGE << NORMED_BITS) - 1)
        index, rest = size >> fine, size & ((1 << fine) - 1)
        gate = sigmoid[index] + _rounded((sigmoid[index + 1] - sigmoid[index]) * rest, fine)
        if x[i] < 0:
            gate = (1 << GATE_BITS) - gate
        x[i] = _rounded(x[i] * gate, GATE_BITS)


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
        _normalize(hidden, widths[part, 0], widths[part, 1], widths[part, 2], NORMED_BITS, INT16_MAX, hidden)
        _silu(hidden, sigmoid)
        _dynamic(hidden, maps, which + 1, PRENORM_LIMIT, latent)
        which += 2
    _dynamic(latent, maps, 4, RESIDUAL_LIMIT, out)


@compiled
def _mix(x: Any, x_weight: Any, other: Any, other_weight: Any) -> None:
    """Replace `x` (R, D) by the weighted sum of it and `other`, saturated."""
    for r in range(x.shape[0]):
        for i in range(x.shape[1]):
            mixed = np.int64(x[r, i]) * x_weight[i] + np.int64(other[r, i]) * other_weight[i]
            x[r, i] = _clamped(_rounded(mixed, MIX_BITS), RESIDUAL_LIMIT)


@compiled
def _normalize_rows(x: Any, constant: int, epsilon: int, a: Any) -> None:
    for r in range(x.shape[0]):
        _normalize(x[r], x.shape[1], constant, epsilon, NORMED_BITS, INT16_MAX, a[r])


@compiled
def _logits(sums: Any, multiplier: Any, shift: Any, tanh: Any, softcap: int, out: Any) -> None:
    """Fill `out` (256,) int64 with logits in binary digits, 16 fraction bits."""
    fine = LOGIT_BITS - TANH_STEP_BITS
    for i in range(256):
        scaled = _rounded(np.int64(sums[i]) * multiplier[i], shift[i])
        size = min(abs(scaled), (TANH_RANGE << LOGIT_BITS) - 1)
        index, rest = size >> fine, size & ((1 << fine) - 1)
        bounded = tanh[index] + _rounded((tanh[index + 1] - tanh[index]) * rest, fine)
        out[i] = _rounded((bounded if scaled >= 0 else -bounded) * softcap, TANH_BITS)


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
    squares, exponents = np.empty(hidden.shape[1], np.int64), np.empty(num_rows, np.int64)
    skips = np.empty((m.num_encoder_layers, num_rows, D), np.int32)
    queries, own = np.empty((G, count * per_group, E), np.int16), np.empty((count, G, E), np.int16)
    whole = np.full(D, 1 << MIX_BITS, np.int32)
    if position == 0:
        for lane in range(num_lanes):
            s.previous_id[lane] = -1
            for i in range(D):
                s.smear_previous[lane, i] = 0
                s.chunk_sum[lane, i] = 0
    latent = np.empty(m.latent_start.shape[0], np.int64)
    _embed(
        ids, m.embedding, m.bigram, m.smear, m.norm_width, m.embedding_epsilon, s.previous_id, s.smear_previous, first
    )
    for r in range(num_rows):
        for i in range(D):
            x[r, i] = first[r, i]
    for layer in range(num_layers):
        if m.has_skip[layer]:
            _mix(x, whole, skips[2 * m.num_encoder_layers - 1 - layer], m.skip[layer])
        if m.mix.shape[1]:
            _mix(x, m.mix[layer, 0], first, m.mix[layer, 1])
        _normalize_rows(x, m.norm_width, m.residual_epsilon, a)
        multiply(a, m.qkv.codes[layer], sums)
        for lane in range(num_lanes):
            rows = slice(lane * count, (lane + 1) * count)
            _heads(
                sums[rows], m.qkv.multiplier[layer], m.qkv.shift[layer], m.norm_head, m.head_epsilon,
                m.query_sign[layer], m.cosines, m.sines, s.keys, s.values, layer, lane, position, queries, own,
            )  # fmt: skip
            y = a[rows]
            _attend(
                queries, s.keys, s.values, layer, lane, position, m.score_multiplier[layer], m.score_shift[layer],
                m.exp2, y,
            )  # fmt: skip
            if m.drops_own_value[layer]:
                _drop_own_values(y, own)
        multiply(a, m.output.codes[layer], sums)
        for r in range(num_rows):
            _add_scaled(x[r], sums[r], m.output.multiplier[layer], m.output.shift[layer, 0])
        _normalize_rows(x, m.norm_width, m.residual_epsilon, a)
        multiply(a, m.up.codes[layer], hidden_sums)
        for r in range(num_rows):
            exponents[r] = _squared(
                hidden_sums[r], m.up.multiplier[layer], m.up.shift[layer], m.down.input_bits[layer], squares, hidden[r]
            )
        multiply(hidden, m.down.codes[layer], sums)
        for r in range(num_rows):
            _add_scaled(x[r], sums[r], m.down.multiplier[layer], m.down.shift[layer, 0] - exponents[r])
        if layer < m.num_encoder_layers:
            for r in range(num_rows):
                for i in range(D):
                    skips[layer, r, i] = x[r, i]
    for lane in range(num_lanes if m.chunk_bytes else 0):
        for n in range(count):
            place, r = position + n, lane * count + n
            # a chunk's injection is computed when it begins: from the start latent, or from the chunk before
            if place % m.chunk_bytes == 0:
                vector = m.latent_start if place == 0 else s.chunk_sum[lane]
                first_map = 2 if place == 0 else 0
                _following_injection(
                    vector, first_map, m.latent_maps, m.latent_widths, latent, m.sigmoid, s.injection[lane]
                )
                for i in range(D):
                    s.chunk_sum[lane, i] = 0
            for i in range(D):
                s.chunk_sum[lane, i] += x[r, i]
                x[r, i] = _clamped(np.int64(x[r, i]) + s.injection[lane, i], RESIDUAL_LIMIT)
    _normalize_rows(x, m.norm_width, m.residual_epsilon, a)
    wanted = count - first_wanted
    for lane in range(num_lanes):
        rows = slice(lane * count + first_wanted, (lane + 1) * count)
        multiply(a[rows], m.head.codes[0], sums[rows])
        for n in range(wanted):
            r = lane * count + first_wanted + n
            _logits(sums[r], m.head.multiplier[0], m.head.shift[0], m.tanh, m.softcap, out[lane * wanted + n])


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
            exponent = _rounded(largest - logits[r, i], LOGIT_BITS - SOFTMAX_BITS)
            weight = exp2[exponent & ((1 << SOFTMAX_BITS) - 1)] >> min(exponent >> SOFTMAX_BITS, 63)
            out[r, i] = weight
            total += weight
        gain = (((np.int64(1) << TOTAL_BITS) - 256) << FREQUENCY_BITS) // total
        left = np.int64(1) << TOTAL_BITS
        for i in range(256):
            out[r, i] = 1 + ((out[r, i] * gain) >> FREQUENCY_BITS)
            left -= out[r, i]
        out[r, best] += left
