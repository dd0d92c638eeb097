"""The state of context mixing (`context_mixing`): counters, weights, what every segment remembers."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from bytejepa.kernels.mixing_tables import (
    NUM_CONFIDENCES,
    STRETCH_LIMIT,
    confidence_table,
    rate_table,
    squash_table,
    stretch_table,
)

MOST_SEGMENTS = 16
NUM_ORDERS = 6
NUM_CONTEXTS = NUM_ORDERS + 2
"""The last 1 to 6 bytes; the word so far; it and the word before."""
WORD, TWO_WORDS, MATCH, MODEL, CORRECTED_MODEL, BIAS = range(NUM_ORDERS, NUM_ORDERS + 6)
NUM_INPUTS = NUM_CONTEXTS + 4
"""The contexts' counters, the match, the model, the model corrected by what followed its predictions, and a constant."""
WEIGHT_BITS = 16
FIRST_WEIGHTS = (0.07, 0.06, 0.06, 0.06, 0.06, 0.06, 0.2, 0.1, 0.3, 0.4, 0.5, 0.0)
"""Of the inputs: the model is believed at first, so that short text of its domain costs hardly more than by the model alone."""
NUM_MATCH_CLASSES = 8
NUM_STRENGTHS = 16
SET_BEGINS = (0, 56, 312, 440, 441)
"""Where the sets of weights begin: by match and longest known context, by the byte's bits so far, by the model's certainty
and the place of the bit, one for all, and by the last byte."""
NUM_SETS = len(SET_BEGINS)
NUM_WEIGHT_ROWS = SET_BEGINS[-1] + 256
NUM_KNOTS = 33
KNOT_SPAN = 192
"""Corrections are interpolated between knots that lie so far apart in logarithms of odds."""
BUCKET_BITS, LONGEST_OF_BUCKET_BITS = 17, (1 << 20, 1 << 22)
"""A context has up to 2^17 buckets, 67 MB for all; twice as many beyond 2^20 bytes of content, four times beyond 2^22. Long
contexts of 2^20 bytes of text fill 2^17; twice as many made six texts 0.15 % smaller, half as many 0.35 % larger."""
MATCH_BYTES = 6
MOST_COMPARED = 32
NODES = 16
"""Slots of a bucket: its check, and the 15 nodes of four bits."""


class Mixing(NamedTuple):
    """What is known after some rounds over a piece of content of N bytes in S segments."""

    content: npt.NDArray[np.uint8]
    """(N,): bytes that were coded so far; others mean nothing."""
    begins: npt.NDArray[np.int64]
    """(S + 1,): where segments begin, and where the last one ends."""
    slots: npt.NDArray[np.uint32]
    """(contexts, buckets * 16): probability (22 bits) and count (10 bits) of the bits after a context."""
    weights: npt.NDArray[np.int32]
    """(sets' rows, inputs * confidences), 16 fraction bits."""
    final_weights: npt.NDArray[np.int64]
    """(256, sets): of the sets' sums, by the byte's bits so far."""
    corrections: npt.NDArray[np.uint16]
    """(3, 2^16, knots): of the sum by the last byte, of the sum by the last three, of the model's by the last three."""
    match_probability: npt.NDArray[np.int64]
    """(32,): that a match of this length goes on, of 2^16."""
    last_place: npt.NDArray[np.int64]
    """(8 * buckets of a context,): where the same 6 bytes ended last; -1: nowhere."""
    lanes: npt.NDArray[np.int64]
    """(S, 4): word so far, word before, where a match points, its length."""
    now: npt.NDArray[np.int64]
    """Scratch numbers of the bit at hand, `FIELDS` of them."""
    hashes: npt.NDArray[np.uint64]
    """(contexts,): of the byte at hand."""
    buckets: npt.NDArray[np.int64]
    """(contexts,): where the slots of the four bits at hand begin."""
    inputs: npt.NDArray[np.int64]
    """(inputs,): logarithms of odds."""
    places: npt.NDArray[np.int64]
    """(inputs,): of their weights in a row."""
    rows: npt.NDArray[np.int64]
    """(sets,): of the weights."""
    sums: npt.NDArray[np.int64]
    """(sets,)"""
    cumulative: npt.NDArray[np.int64]
    """(257,): sums of a table of frequencies."""
    squash: npt.NDArray[np.int64]
    stretch: npt.NDArray[np.int64]
    rate: npt.NDArray[np.int64]
    confidence: npt.NDArray[np.int64]


(
    LAST_BYTE, LAST_THREE, EXPECTED_BYTE, EXPECTED_BIT, LENGTH_CLASS, LEARNING_RATE, KNOT_0, KNOT_1, KNOT_2,
    ROW_0, ROW_1, ROW_2, SUM, NUM_CODED,
) = range(14)  # fmt: skip
FIELDS = 14


def segment_begins(num_bytes: int, least_bytes: int) -> list[int]:
    """Return where the segments of `num_bytes` of content begin, and its end: up to 16 of one length, of `least_bytes` or more
    unless there is but one, the last as long or shorter."""
    length = max(1, -(-num_bytes // max(1, min(MOST_SEGMENTS, num_bytes // least_bytes))))
    return [*range(0, max(1, num_bytes), length), num_bytes]


def new_mixing(num_bytes: int, least_segment_bytes: int, *, most_bucket_bits: int | None = None) -> Mixing:
    """Return the state before the first byte of content of `num_bytes`.

    Memory: 14 MB, the content, and 576 bytes a byte up to 2^most_bucket_bits of them: by default 76 MB, 151 MB beyond 2^20
    bytes and 302 MB beyond 2^22.
    """
    begins = np.array(segment_begins(num_bytes, least_segment_bytes), dtype=np.int64)
    if most_bucket_bits is None:
        most_bucket_bits = BUCKET_BITS + sum(num_bytes > longest for longest in LONGEST_OF_BUCKET_BITS)
    bucket_bits = max(8, min(most_bucket_bits, num_bytes.bit_length() - 1))
    slots = np.full((NUM_CONTEXTS, NODES << bucket_bits), 1 << 31, dtype=np.uint32)
    slots[:, ::NODES] = 0
    first = [round(weight * (1 << WEIGHT_BITS)) for weight in FIRST_WEIGHTS for _ in range(NUM_CONFIDENCES)]
    knots = (np.arange(NUM_KNOTS) * KNOT_SPAN).clip(1, 2 * STRETCH_LIMIT + 1) - 1
    return Mixing(
        content=np.zeros(num_bytes, np.uint8),
        begins=begins,
        slots=slots,
        weights=np.tile(np.array(first, dtype=np.int32), (NUM_WEIGHT_ROWS, 1)),
        final_weights=np.full((256, NUM_SETS), (1 << WEIGHT_BITS) // NUM_SETS, dtype=np.int64),
        corrections=np.tile(squash_table()[knots].astype(np.uint16), (3, 1 << 16, 1)),
        match_probability=32768 + 30000 * np.arange(32) // 32,
        last_place=np.full(1 << (bucket_bits + 3), -1, dtype=np.int64),
        lanes=np.zeros((len(begins) - 1, 4), dtype=np.int64),
        now=np.zeros(FIELDS, np.int64),
        hashes=np.zeros(NUM_CONTEXTS, np.uint64),
        buckets=np.zeros(NUM_CONTEXTS, np.int64),
        inputs=np.zeros(NUM_INPUTS, np.int64),
        places=np.zeros(NUM_INPUTS, np.int64),
        rows=np.zeros(NUM_SETS, np.int64),
        sums=np.zeros(NUM_SETS, np.int64),
        cumulative=np.zeros(257, np.int64),
        squash=squash_table(),
        stretch=stretch_table(),
        rate=rate_table(),
        confidence=confidence_table(),
    )
