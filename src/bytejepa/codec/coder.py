"""An integer range coder with totals of 2^24: bytes out of (start, frequency) pairs and back.

State of both sides: a range of at most 2^48, kept above 2^40 by moving whole bytes. The encoder's `low` can carry into
bytes that are not written yet, so the last one and the run of 255s after it are held back, as in LZMA's coder. The end
of a stream is cut to what decides it: bytes beyond it read as zero.

All numbers stay below 2^57, so int64 holds them. Loss against the ideal code length: under 2^-16 of a bit a symbol from
rounding the range, and at most 2 bytes a stream.
Source: G. N. N. Martin, "Range encoding" (1979); the carry rule is that of the LZMA SDK. `docs/codec.md` specifies it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from bytejepa.codec.fixed_point import TOTAL_BITS
from bytejepa.kernels.compilation import compiled
from bytejepa.kernels.mixing_tables import PROBABILITY_BITS

RANGE_BITS = 48
CODE_BYTES = RANGE_BITS // 8
TOP = 1 << RANGE_BITS
RENORMALIZE_BELOW = 1 << (RANGE_BITS - 8)
BIT_SHIFT = TOTAL_BITS - PROBABILITY_BITS
"""A bit's probability, of 2^16, becomes a frequency."""


_LOW, _WIDTH, _HELD, _NUM_HELD, _LENGTH = range(5)
"""Places in the encoder's state: the interval's lower end and width, the byte held back (-1: none yet), how many 255s
follow it, and the bytes written."""


@compiled
def _move_byte(state: Any, out: Any) -> None:
    """Take the top byte out of `low`."""
    top = state[_LOW] >> (RANGE_BITS - 8)
    if top == 255:
        state[_NUM_HELD] += 1
    else:
        carry = top >> 8
        if state[_HELD] >= 0:
            out[state[_LENGTH]] = (state[_HELD] + carry) & 255
            state[_LENGTH] += 1
        for _ in range(state[_NUM_HELD]):
            out[state[_LENGTH]] = (255 + carry) & 255
            state[_LENGTH] += 1
        state[_HELD], state[_NUM_HELD] = top & 255, 0
    state[_LOW] = (state[_LOW] & (RENORMALIZE_BELOW - 1)) << 8


@compiled
def _encode_symbol(state: Any, start: int, frequency: int, out: Any) -> None:
    unit = state[_WIDTH] >> TOTAL_BITS
    state[_LOW] += unit * start
    state[_WIDTH] = unit * frequency
    while state[_WIDTH] < RENORMALIZE_BELOW:
        _move_byte(state, out)
        state[_WIDTH] <<= 8


@compiled
def _finish(state: Any, out: Any) -> int:
    """Write the end of the stream and return its length."""
    # of the numbers in the interval, the one with the most zeros at its end
    step, end = np.int64(1), state[_LOW] + state[_WIDTH]
    while (state[_LOW] + 2 * step - 1) // (2 * step) * (2 * step) < end and step < TOP:
        step *= 2
    state[_LOW] = (state[_LOW] + step - 1) // step * step
    for _ in range(CODE_BYTES + 1):  # the last one lets go of what is held back
        _move_byte(state, out)
    length = state[_LENGTH]
    while length and out[length - 1] == 0:
        length -= 1
    return length


@compiled
def _encode(starts: Any, frequencies: Any, out: Any) -> int:
    state = np.array([0, TOP, -1, 0, 0], dtype=np.int64)
    for index in range(starts.shape[0]):
        _encode_symbol(state, starts[index], frequencies[index], out)
    return _finish(state, out)


@compiled
def _encode_bits(probabilities: Any, bits: Any, out: Any) -> int:
    state = np.array([0, TOP, -1, 0, 0], dtype=np.int64)
    for index in range(bits.shape[0]):
        one = np.int64(probabilities[index]) << BIT_SHIFT
        zero = (np.int64(1) << TOTAL_BITS) - one
        _encode_symbol(state, zero if bits[index] else np.int64(0), one if bits[index] else zero, out)
    return _finish(state, out)


def encode(starts: npt.NDArray[np.int64], frequencies: npt.NDArray[np.int64]) -> bytes:
    """Return the bytes that stand for symbols with these cumulative starts and frequencies, of totals 2^24."""
    out = np.empty(4 * len(starts) + 16, np.uint8)  # a symbol costs at most 24 bits and the rounding
    return out[: _encode(starts, frequencies, out)].tobytes()


def encode_bits(probabilities: npt.NDArray[np.uint16], bits: npt.NDArray[np.uint8]) -> bytes:
    """Return the bytes that stand for `bits`, each of which is 1 with the probability, of 2^16, in the same place."""
    out = np.empty(2 * len(bits) + 16, np.uint8)  # a bit costs at most 16 bits and the rounding
    return out[: _encode_bits(probabilities, bits, out)].tobytes()


class DecoderState(NamedTuple):
    """Lanes of streams being decoded."""

    data: npt.NDArray[np.uint8]
    """All streams, one after the other."""
    places: npt.NDArray[np.int64]
    """(L,): of the next byte of each lane."""
    ends: npt.NDArray[np.int64]
    """(L,): where each lane's stream ends."""
    codes: npt.NDArray[np.int64]
    """(L,): how far into the interval the stream points."""
    widths: npt.NDArray[np.int64]
    """(L,): the interval's width."""


def start_decoding(streams: Sequence[bytes]) -> DecoderState:
    """Return the state at the beginning of `streams`, one a lane."""
    ends = np.cumsum([len(stream) for stream in streams], dtype=np.int64)
    codes = [int.from_bytes(stream[:CODE_BYTES].ljust(CODE_BYTES, b"\0"), "big") for stream in streams]
    begins = ends - [len(stream) for stream in streams]
    return DecoderState(
        data=np.frombuffer(b"".join(streams) + b"\0", dtype=np.uint8),
        places=np.minimum(begins + CODE_BYTES, ends),
        ends=ends,
        codes=np.array(codes, dtype=np.int64),
        widths=np.full(len(streams), TOP, np.int64),
    )


@compiled
def _target(state: DecoderState, lane: int) -> int:
    """Return the number below the total that the stream points to."""
    unit = state.widths[lane] >> TOTAL_BITS
    return max(0, min((1 << TOTAL_BITS) - 1, state.codes[lane] // unit))


@compiled
def _narrow(state: DecoderState, lane: int, start: int, frequency: int) -> None:
    """Take the symbol's interval, and bytes of the stream."""
    unit = state.widths[lane] >> TOTAL_BITS
    state.codes[lane] -= unit * start
    state.widths[lane] = unit * frequency
    while state.widths[lane] < RENORMALIZE_BELOW:
        following = np.int64(0)
        if state.places[lane] < state.ends[lane]:
            following = np.int64(state.data[state.places[lane]])
            state.places[lane] += 1
        state.codes[lane] = (state.codes[lane] << 8) | following
        state.widths[lane] <<= 8


@compiled
def _decode_symbol(state: DecoderState, lane: int, frequencies: Any) -> int:
    target = _target(state, lane)
    symbol, start = 0, np.int64(0)
    while start + frequencies[symbol] <= target:
        start += frequencies[symbol]
        symbol += 1
    _narrow(state, lane, start, frequencies[symbol])
    return symbol


@compiled
def decode_bit(state: DecoderState, lane: int, probability: int) -> int:
    """Return the next bit of a stream, which is 1 with this probability of 2^16."""
    one = np.int64(probability) << BIT_SHIFT
    zero = (np.int64(1) << TOTAL_BITS) - one
    bit = 1 if _target(state, lane) >= zero else 0
    _narrow(state, lane, zero if bit else np.int64(0), one if bit else zero)
    return bit


@compiled
def decode_symbols(state: DecoderState, frequencies: Any, offset: int, out: Any) -> None:
    """Fill `out` (L,) with the next symbol of every lane plus `offset`, given the frequencies (L, symbols) of all."""
    for lane in range(out.shape[0]):
        out[lane] = offset + _decode_symbol(state, lane, frequencies[lane])
