"""Blocks whose bytes are coded bit by bit, under the mixture of a model with what the block has shown (`context_mixing`).

A block is cut into segments that are coded together, a byte of each a round, into one stream.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from bytejepa.codec import coder
from bytejepa.data.vocabulary import BYTE_OFFSET
from bytejepa.kernels.compilation import compiled
from bytejepa.kernels.context_mixing import (
    begin_byte,
    end_byte,
    fill_cumulative,
    learn_bit,
    mix_rounds,
    model_bit,
    predict_bit,
)
from bytejepa.kernels.mixing_state import NUM_CODED, Mixing, new_mixing, segment_begins

BYTES_AT_ONCE = 16_384
"""Bytes that are mixed between two reports."""


def encode_mixed(
    block: bytes, paths: npt.NDArray[np.uint16], segment_bytes: int, *, on_progress: Callable[[int], None] | None = None
) -> bytes:
    """Return the stream of a block, of whose bits `paths` (N, 8) is what the model says. `on_progress` is called every tenth
    of a second or so with the number of bytes mixed so far, and may raise."""
    mixing = new_mixing(len(block), segment_bytes)
    content, (rounds, lanes) = np.frombuffer(block, np.uint8), (int(mixing.begins[1]), len(mixing.lanes))
    probabilities, bits = np.empty(8 * len(block), np.uint16), np.empty(8 * len(block), np.uint8)
    at_once = max(1, BYTES_AT_ONCE // lanes)
    for first in range(0, rounds, at_once):
        mix_rounds(mixing, first, min(rounds, first + at_once), content, paths, probabilities, bits)
        if on_progress is not None:
            on_progress(int(mixing.now[NUM_CODED]))
    return coder.encode_bits(probabilities, bits)


class MixedDecoder:
    """Blocks being decoded round by round; the lanes are their segments, in order."""

    def __init__(self, streams: Sequence[bytes], lengths: Sequence[int], segment_bytes: int) -> None:
        self._decoder = coder.start_decoding(streams)
        self._mixings = [new_mixing(length, segment_bytes) for length in lengths]
        begins = [segment_begins(length, segment_bytes) for length in lengths]
        self.segment_lengths = [end - begin for ends in begins for begin, end in itertools.pairwise(ends)]
        """Of every lane."""
        self.first_lanes = np.cumsum([0, *(len(ends) - 1 for ends in begins)]).tolist()
        """(B + 1,): of every block, and one after the last."""

    def choose(self, offset: int, tables: npt.NDArray[np.int64], following: npt.NDArray[np.int64]) -> None:
        """Fill `following` (L,) with the ids at `offset` in every lane, given the model's frequencies (L, 256)."""
        for block, mixing in enumerate(self._mixings):
            lanes = slice(self.first_lanes[block], self.first_lanes[block + 1])
            _decode_round(mixing, self._decoder, block, offset, tables[lanes], BYTE_OFFSET, following[lanes])


@compiled
def _decode_round(
    m: Mixing, decoder: Any, stream: int, offset: int, tables: Any, first_byte: int, following: Any
) -> None:
    for lane in range(m.lanes.shape[0]):
        if m.begins[lane] + offset >= m.begins[lane + 1]:
            continue
        fill_cumulative(tables[lane], m.cumulative)
        begin_byte(m, lane, offset)
        partial = np.int64(1)
        for index in range(8):
            p = predict_bit(m, index, partial, model_bit(m.cumulative, index, partial))
            bit = coder.decode_bit(decoder, stream, p)
            learn_bit(m, index, partial, bit)
            partial = (partial << 1) | bit
        byte = partial - 256
        end_byte(m, lane, offset, byte)
        following[lane] = byte + first_byte
