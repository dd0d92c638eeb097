"""Context mixing: a model's predictions of bytes, and counters of what the content itself has shown so far, mixed bit by bit.

A byte is eight decisions. For each, counters say how often the bit was 1 after the last 1 to 6 bytes and after the word
and the two words so far; a match says what followed the last time that the same 6 bytes stood there; and the model says
what its distribution over all bytes implies. A mixer adds their logarithms of odds with weights that it learns on the
way, and two tables correct the sum. All of it sees bytes only after they were coded, so that a decoder can do the same;
the eight decisions' probabilities multiply to one distribution over the 256 bytes.

Content is taken in segments that advance together, one byte each a round, so that a model can predict for all of them at
once; counters and weights belong to all. Integers only: the same on every machine. Sources: Mahoney, "Adaptive weighing
of context models for lossless data compression" (2005), and his lpaq1 (2007), from whose idea this is written anew;
`docs/codec.md` is the specification.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from bytejepa.kernels.compilation import compiled
from bytejepa.kernels.mixing_state import (
    BIAS,
    CORRECTED_MODEL,
    EXPECTED_BIT,
    EXPECTED_BYTE,
    KNOT_0,
    KNOT_SPAN,
    LAST_BYTE,
    LAST_THREE,
    LEARNING_RATE,
    LENGTH_CLASS,
    MATCH,
    MATCH_BYTES,
    MODEL,
    MOST_COMPARED,
    NODES,
    NUM_CODED,
    NUM_CONTEXTS,
    NUM_INPUTS,
    NUM_MATCH_CLASSES,
    NUM_ORDERS,
    NUM_SETS,
    NUM_STRENGTHS,
    ROW_0,
    SET_BEGINS,
    SUM,
    TWO_WORDS,
    WEIGHT_BITS,
    WORD,
    Mixing,
)
from bytejepa.kernels.mixing_tables import COUNT_LIMIT, NUM_CONFIDENCES, PROBABILITY_BITS, STRETCH_LIMIT

_MULTIPLIER = np.uint64(0x5851F42D4C957F2D)
_NIBBLE_MULTIPLIER = np.uint64(0x1B873593CC9E2D51)
_WORD_MULTIPLIER = 0x2F0B4C47


@compiled
def _hash(value: int, kind: int) -> Any:
    """Return 64 bits that depend on a number below 2^59 and on the kind of context, modulo 2^64: unsigned, for signed
    overflow is undefined."""
    mixed = np.uint64(value * 16 + kind) * _MULTIPLIER
    return mixed ^ (mixed >> np.uint64(29))


@compiled
def _place(value: Any, first_bit: int, size: int) -> Any:
    """Return the number below `size`, a power of two, in the bits from `first_bit` on."""
    return np.int64((value >> np.uint64(first_bit)) & np.uint64(size - 1))


@compiled
def _find_match(m: Mixing, lane: int, offset: int, last_six: int) -> None:
    """Go on with the lane's match, or look for where the last 6 bytes stood before, and note where they stand now.

    Places are noted when their byte is about to be coded, so the byte at one that is found, and those after it, which stay
    as far behind, are coded already.
    """
    place = m.begins[lane] + offset
    state = m.lanes[lane]
    if state[2] >= m.content.shape[0]:
        state[3] = 0
    if offset >= MATCH_BYTES:
        bucket = _place(_hash(last_six, 0), 24, m.last_place.shape[0])
        before = m.last_place[bucket]
        if state[3] == 0 and before >= 0:
            most = min(MOST_COMPARED, before - before // m.begins[1] * m.begins[1], offset)
            length = 0
            while length < most and m.content[before - 1 - length] == m.content[place - 1 - length]:
                length += 1
            if length >= MATCH_BYTES:
                state[2], state[3] = before, length
        m.last_place[bucket] = place
    m.now[EXPECTED_BYTE] = np.int64(m.content[state[2]]) if state[3] else np.int64(-1)
    length = state[3]
    m.now[LENGTH_CLASS] = length if length < 16 else min(31, 16 + (length - 16) // 8)


@compiled
def begin_byte(m: Mixing, lane: int, offset: int) -> None:
    """Prepare to predict the byte at `offset` of the segment `lane`."""
    place = m.begins[lane] + offset
    history = np.int64(0)
    for order in range(NUM_ORDERS):
        if order < offset:
            history |= np.int64(m.content[place - 1 - order]) << (8 * order)
        m.hashes[order] = _hash(history, order + 1)
    m.now[LAST_BYTE], m.now[LAST_THREE] = history & 0xFF, history & 0xFFFFFF
    word, word_before = m.lanes[lane, 0], m.lanes[lane, 1]
    m.hashes[WORD] = _hash(word * 256 + (history & 0xFF), WORD + 1)
    m.hashes[TWO_WORDS] = _hash(word ^ (word_before << 26), TWO_WORDS + 1)
    _find_match(m, lane, offset, history)
    m.now[LEARNING_RATE] = 96 + (8000 * 1024) // (1024 + m.now[NUM_CODED])


@compiled
def _find_buckets(m: Mixing, partial: int) -> None:
    """Find the slots of the next four bits of every context, or make room for them."""
    num_buckets = m.slots.shape[1] // NODES
    for context in range(NUM_CONTEXTS):
        mixed = (m.hashes[context] + np.uint64(partial)) * _NIBBLE_MULTIPLIER
        mixed ^= mixed >> np.uint64(29)
        check = np.uint32(1 + _place(mixed, 44, 1 << 16))
        bucket = _place(mixed, 20, num_buckets) * NODES
        other = bucket ^ NODES
        slots = m.slots[context]
        if slots[bucket] != check:
            if slots[other] == check:
                bucket = other
            else:
                # the one that has seen less makes room
                if slots[bucket] != 0 and (slots[other] == 0 or (slots[other + 1] & 1023) < (slots[bucket + 1] & 1023)):
                    bucket = other
                slots[bucket] = check
                for node in range(1, NODES):
                    slots[bucket + node] = np.uint32(1 << 31)
        m.buckets[context] = bucket


@compiled
def _corrected(m: Mixing, which: int, row: int, v: int) -> Any:
    """Return the correction `which` of a sum `v` in a context, and remember where it was taken."""
    lower = (v + STRETCH_LIMIT + 1) // KNOT_SPAN
    rest = v + STRETCH_LIMIT + 1 - lower * KNOT_SPAN
    m.now[ROW_0 + which] = row
    m.now[KNOT_0 + which] = lower + (1 if rest > KNOT_SPAN // 2 else 0)
    left, right = np.int64(m.corrections[which, row, lower]), np.int64(m.corrections[which, row, lower + 1])
    return (left * (KNOT_SPAN - rest) + right * rest) // KNOT_SPAN


@compiled
def predict_bit(m: Mixing, index: int, partial: int, model: int) -> int:
    """Return the probability, of 2^16, that bit `index` (0: the highest) of the byte at hand is 1.

    `partial`: the bits before it, with a 1 in front; `model`: what the model says, of 2^16.
    """
    if index == 0 or index == 4:
        _find_buckets(m, partial)
    node = partial if index < 4 else (1 << (index - 4)) | (partial & ((1 << (index - 4)) - 1))
    longest = 0
    for context in range(NUM_CONTEXTS):
        slot = np.int64(m.slots[context, m.buckets[context] + node])
        count = slot & 1023
        m.inputs[context] = m.stretch[slot >> 16] if count else 0
        m.places[context] = context * NUM_CONFIDENCES + m.confidence[count]
        if count and context < NUM_ORDERS:
            longest = context + 1
    expected, match_class = m.now[EXPECTED_BYTE], 0
    m.now[EXPECTED_BIT], m.inputs[MATCH] = -1, 0
    if expected >= 0 and (expected | 256) >> (8 - index) == partial:
        bit, length_class = (expected >> (7 - index)) & 1, m.now[LENGTH_CLASS]
        goes_on = m.stretch[m.match_probability[length_class]]
        m.now[EXPECTED_BIT], m.inputs[MATCH] = bit, goes_on if bit else -goes_on
        match_class = 1 + min(NUM_MATCH_CLASSES - 2, length_class // 4)
    m.places[MATCH] = MATCH * NUM_CONFIDENCES + match_class
    said = m.stretch[model]
    after_one = (m.now[LAST_BYTE] << 8) | partial
    after_three = _place(_hash(m.now[LAST_THREE] * 256 + partial, 0), 40, 1 << 16)
    m.inputs[MODEL], m.places[MODEL] = said, MODEL * NUM_CONFIDENCES
    m.inputs[CORRECTED_MODEL] = m.stretch[_corrected(m, 2, after_three, said)]
    m.places[CORRECTED_MODEL] = CORRECTED_MODEL * NUM_CONFIDENCES
    m.inputs[BIAS], m.places[BIAS] = 1 << 8, BIAS * NUM_CONFIDENCES
    m.rows[0] = match_class * (NUM_ORDERS + 1) + longest
    m.rows[1] = SET_BEGINS[1] + partial
    m.rows[2] = SET_BEGINS[2] + min(NUM_STRENGTHS - 1, abs(said) >> 7) * 8 + index
    m.rows[3] = SET_BEGINS[3]
    m.rows[4] = SET_BEGINS[4] + m.now[LAST_BYTE]
    total: Any = np.int64(1) << (WEIGHT_BITS - 1)
    for which in range(NUM_SETS):
        weights: Any = m.weights[m.rows[which]]
        dot: Any = np.int64(1) << (WEIGHT_BITS - 1)
        for i in range(NUM_INPUTS):
            dot += weights[m.places[i]] * m.inputs[i]
        m.sums[which] = max(-STRETCH_LIMIT, min(STRETCH_LIMIT, dot >> WEIGHT_BITS))
        total += m.final_weights[partial, which] * m.sums[which]
    v: Any = max(-STRETCH_LIMIT, min(STRETCH_LIMIT, total >> WEIGHT_BITS))
    m.now[SUM] = v
    corrected = _corrected(m, 0, after_one, v) + _corrected(m, 1, after_three, v)
    p = (2 * m.squash[v + STRETCH_LIMIT] + corrected + 2) >> 2
    return max(1, min((1 << PROBABILITY_BITS) - 1, p))


@compiled
def learn_bit(m: Mixing, index: int, partial: int, bit: int) -> None:
    """Let everything that took part in the last prediction learn the bit."""
    target = ((np.int64(1) << PROBABILITY_BITS) - 1) * bit
    for which in range(NUM_SETS):
        step = ((bit << PROBABILITY_BITS) - m.squash[m.sums[which] + STRETCH_LIMIT]) * m.now[LEARNING_RATE]
        weights = m.weights[m.rows[which]]
        for i in range(NUM_INPUTS):
            moved = weights[m.places[i]] + ((m.inputs[i] * step + (1 << 23)) >> 24)
            weights[m.places[i]] = max(-(1 << 24), min(1 << 24, moved))
    error = (bit << PROBABILITY_BITS) - m.squash[m.now[SUM] + STRETCH_LIMIT]
    for which in range(NUM_SETS):
        m.final_weights[partial, which] += (m.sums[which] * error * 8 + (1 << 19)) >> 20
    for which in range(3):
        row, knot = m.now[ROW_0 + which], m.now[KNOT_0 + which]
        before = np.int64(m.corrections[which, row, knot])
        m.corrections[which, row, knot] = before + ((target - before) >> 5)
    node = partial if index < 4 else (1 << (index - 4)) | (partial & ((1 << (index - 4)) - 1))
    for context in range(NUM_CONTEXTS):
        place = m.buckets[context] + node
        slot = np.int64(m.slots[context, place])
        count, p = slot & 1023, slot >> 10
        p += (((np.int64(1) << 22) - 1) * bit - p) * m.rate[count] >> 16
        m.slots[context, place] = (p << 10) | min(COUNT_LIMIT, count + 1)
    if m.now[EXPECTED_BIT] >= 0:
        is_right = 1 if m.now[EXPECTED_BIT] == bit else 0
        before = m.match_probability[m.now[LENGTH_CLASS]]
        after = before + ((((np.int64(1) << 16) - 1) * is_right - before) >> 6)
        m.match_probability[m.now[LENGTH_CLASS]] = after


@compiled
def end_byte(m: Mixing, lane: int, offset: int, byte: int) -> None:
    """Take in the byte at `offset` of the segment `lane`."""
    m.content[m.begins[lane] + offset] = byte
    m.now[NUM_CODED] += 1
    state = m.lanes[lane]
    if state[3]:
        if m.now[EXPECTED_BYTE] == byte:
            state[2] += 1
            state[3] += 1
        else:
            state[3] = 0
    letter = byte + 32 if 65 <= byte <= 90 else byte
    if 97 <= letter <= 122 or letter >= 128:
        state[0] = ((state[0] + letter) * _WORD_MULTIPLIER) & 0xFFFFFFFF
    elif state[0]:
        state[1], state[0] = state[0], 0


@compiled
def fill_cumulative(frequencies: Any, cumulative: Any) -> None:
    """Fill `cumulative` (257,) with the sums of the frequencies (256,) before each byte, and of all."""
    for byte in range(256):
        cumulative[byte + 1] = cumulative[byte] + frequencies[byte]


@compiled
def model_bit(cumulative: Any, index: int, partial: int) -> int:
    """Return the probability, of 2^16, that bit `index` is 1 given the bits before it, by sums (257,) of frequencies."""
    size = 256 >> index
    first = (partial << (8 - index)) - 256
    end = cumulative[first + size]
    share = ((end - cumulative[first + size // 2]) << PROBABILITY_BITS) // (end - cumulative[first])
    return max(1, min((1 << PROBABILITY_BITS) - 1, share))


@compiled
def _mix_byte(m: Mixing, lane: int, offset: int, byte: int, path: Any, probabilities: Any, bits: Any) -> None:
    begin_byte(m, lane, offset)
    partial = np.int64(1)
    for index in range(8):
        bit = (byte >> (7 - index)) & 1
        probabilities[index] = predict_bit(m, index, partial, np.int64(path[index]))
        bits[index] = bit
        learn_bit(m, index, partial, bit)
        partial = (partial << 1) | bit
    end_byte(m, lane, offset, byte)


@compiled
def mix_content(m: Mixing, content: Any, paths: Any, probabilities: Any, bits: Any) -> None:
    """Fill `bits` (8 N,) uint8 with the bits of `content` (N,) uint8 in the order in which they are coded, and
    `probabilities` (8 N,) uint16 with those, of 2^16, that each is 1.

    `paths` (N, 8) uint16: what the model says of the bits of each byte, the highest first.
    """
    mix_rounds(m, 0, m.begins[1], content, paths, probabilities, bits)


@compiled
def mix_rounds(m: Mixing, first: int, end: int, content: Any, paths: Any, probabilities: Any, bits: Any) -> None:
    """Do what `mix_content` does for the rounds from `first` on, those before them being done, to `end`."""
    coded = 8 * m.now[NUM_CODED]
    for offset in range(first, end):
        for lane in range(m.lanes.shape[0]):
            place = m.begins[lane] + offset
            if place < m.begins[lane + 1]:
                byte, part = np.int64(content[place]), slice(coded, coded + 8)
                _mix_byte(m, lane, offset, byte, paths[place], probabilities[part], bits[part])
                coded += 8


@compiled
def mix_following(m: Mixing, offset: int, content: Any, paths: Any, probabilities: Any, bits: Any) -> None:
    """Do what `mix_content` does for the next piece of content of one segment, which begins at `offset`."""
    for place in range(content.shape[0]):
        byte, part = np.int64(content[place]), slice(8 * place, 8 * place + 8)
        _mix_byte(m, 0, offset + place, byte, paths[place], probabilities[part], bits[part])


@compiled
def fill_paths(frequencies: Any, symbols: Any, out: Any) -> None:
    """Fill `out` (R, 8) with what frequencies (R, 256) say of the bits of `symbols` (R,), each given those before it."""
    cumulative = np.zeros(257, np.int64)
    for r in range(symbols.shape[0]):
        fill_cumulative(frequencies[r], cumulative)
        for index in range(8):
            out[r, index] = model_bit(cumulative, index, (symbols[r] | 256) >> (8 - index))
