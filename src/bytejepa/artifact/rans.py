"""An entropy coder for small symbols: interleaved range asymmetric numeral systems (rANS) over integer frequencies.

Symbol n belongs to lane n mod `lanes`; all lanes share one stream of 16-bit words, and numpy works on a whole round of
lanes at once. Nothing but integers decides what is written, so every machine reads back the same symbols.
Source: Duda 2013 (arXiv 1311.2540); Giesen 2014, "Interleaved entropy coders" (arXiv 1402.3392). `docs/artifact.md`
states the layout for other readers.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

TOTAL_BITS = 14
TOTAL = 1 << TOTAL_BITS
"""Sum of every table's frequencies."""
LOWEST_STATE = 1 << 16
"""Between symbols a lane's state lies in [2^16, 2^32)."""
MAX_LANES = 4096
CODES_PER_LANE = 16_384
"""A lane costs about 16 bits: at this length half a part in a thousand of what it codes."""

Tables = npt.NDArray[np.integer]
"""Frequencies, (tables, symbols); each row sums to TOTAL."""


def lanes_for(num_symbols: int) -> int:
    """Return how many lanes suit `num_symbols` symbols: a power of two up to MAX_LANES."""
    return min(MAX_LANES, 1 << max(0, num_symbols // CODES_PER_LANE).bit_length())


def normalize(counts: npt.NDArray[np.integer]) -> npt.NDArray[np.uint16]:
    """Return frequencies that sum to TOTAL for symbols that occurred `counts` times: at least 1 for every symbol that did.

    The remainder after rounding goes where it saves most. A table without any occurrence gives all to its first symbol.
    """
    counts = counts.astype(np.int64)
    if not counts.any():
        counts = np.eye(1, len(counts), dtype=np.int64)[0]
    occurs = counts > 0
    frequencies = np.where(occurs, np.maximum(1, counts * TOTAL // counts.sum()), 0)
    while (excess := int(frequencies.sum()) - TOTAL) != 0:
        step = 1 if excess < 0 else -1
        with np.errstate(divide="ignore", invalid="ignore"):
            gain = counts * np.log2((frequencies + step) / frequencies)
        gain = np.where(occurs & (frequencies + step >= 1), gain, -np.inf)
        frequencies[int(np.argmax(gain))] += step
    return frequencies.astype(np.uint16)


def encode(
    symbols: npt.NDArray[np.uint8], table_of_symbol: npt.NDArray[np.uint8], frequencies: Tables, lanes: int
) -> bytes:
    """Return `symbols`, each coded with its table: the lanes' last states (uint32), then the words (uint16).

    Every symbol must have a frequency of at least 1 in its table. Little-endian.
    """
    flat, starts = (each.astype(np.uint32).reshape(-1) for each in (frequencies, _starts(frequencies)))
    states = np.full(lanes, LOWEST_STATE, dtype=np.uint32)
    words: list[npt.NDArray[np.uint16]] = []
    block = lanes * max(1, 65_536 // lanes)  # whole rounds, looked up together as far as a cache holds them
    for first in range((len(symbols) - 1) // block * block, -1, -block):  # last first: the decoder runs forwards
        index = table_of_symbol[first : first + block].astype(np.int32) * frequencies.shape[1]
        index += symbols[first : first + block]
        frequency_of, start_of = flat[index], starts[index]
        for begin in range((len(index) - 1) // lanes * lanes, -1, -lanes):
            frequency = frequency_of[begin : begin + lanes]
            state = states[: len(frequency)]
            full = state >> np.uint32(32 - TOTAL_BITS) >= frequency
            words.append(state[full].astype(np.uint16)[::-1])
            state >>= full * np.uint32(16)
            # quotient * TOTAL + remainder + start, without the remainder
            state += state // frequency * (np.uint32(TOTAL) - frequency) + start_of[begin : begin + lanes]
    stream = np.concatenate([*words, np.zeros(0, np.uint16)])[::-1]
    return states.astype("<u4").tobytes() + stream.astype("<u2").tobytes()


def decode(
    data: bytes | memoryview, table_of_symbol: npt.NDArray[np.uint8], frequencies: Tables, lanes: int
) -> npt.NDArray[np.uint8] | None:
    """Return as many symbols as `table_of_symbol` has entries, or None if `data` is not what `encode` made of any.

    Tables that do not sum to TOTAL, a word too few or too many and lanes that do not end where encoding began are noticed.
    """
    if len(data) < 4 * lanes or len(data) % 2 or bool((frequencies.sum(1) != TOTAL).any()):
        return None
    states = np.frombuffer(data, "<u4", lanes).astype(np.uint32)
    words = np.frombuffer(data, "<u2", offset=4 * lanes).astype(np.uint32)
    # what the slot that a state's lowest bits name stands for: symbol, its frequency, and the slot's place in it
    flat = frequencies.astype(np.uint32).reshape(-1)
    symbol_of_slot = np.tile(np.arange(frequencies.shape[1], dtype=np.uint8), len(frequencies)).repeat(flat)
    frequency_of_slot = flat.repeat(flat)
    starts = _starts(frequencies).astype(np.uint32).reshape(-1)
    place_of_slot = np.tile(np.arange(TOTAL, dtype=np.uint32), len(frequencies)) - starts.repeat(flat)
    symbols = np.empty(len(table_of_symbol), dtype=np.uint8)
    position = 0
    for begin in range(0, len(symbols), lanes):
        table = table_of_symbol[begin : begin + lanes].astype(np.int64)
        state = states[: len(table)]
        slot = (table << TOTAL_BITS) + (state & np.uint32(TOTAL - 1))
        symbols[begin : begin + lanes] = symbol_of_slot[slot]
        state >>= np.uint32(TOTAL_BITS)
        state *= frequency_of_slot[slot]
        state += place_of_slot[slot]
        low = np.flatnonzero(state < LOWEST_STATE)
        if position + len(low) > len(words):
            return None
        state[low] = state[low] << np.uint32(16) | words[position : position + len(low)]
        position += len(low)
    whole = position == len(words) and bool((states == LOWEST_STATE).all())
    return symbols if whole else None


def _starts(frequencies: Tables) -> npt.NDArray[np.int64]:
    """Return for every symbol the sum of the frequencies before it in its table."""
    return np.cumsum(frequencies, axis=1, dtype=np.int64) - frequencies
