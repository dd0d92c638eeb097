"""The entropy coder: every symbol comes back, near the entropy, by a decoder written from the documentation too."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bytejepa.artifact import rans


def tables_for(symbols: np.ndarray, table_of_symbol: np.ndarray, count: int, width: int) -> np.ndarray:
    return np.stack(
        [rans.normalize(np.bincount(symbols[table_of_symbol == table], minlength=width)) for table in range(count)]
    )


@st.composite
def messages(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    length, width, count = draw(st.integers(0, 300)), draw(st.integers(1, 256)), draw(st.integers(1, 4))
    random = np.random.default_rng(draw(st.integers(0, 1 << 30)))
    skew = draw(st.sampled_from((0.0, 1.0, 30.0)))
    chances = np.exp(-skew * random.random(width))
    symbols = random.choice(width, length, p=chances / chances.sum()).astype(np.uint8)
    table_of_symbol = random.integers(0, count, length).astype(np.uint8)
    return symbols, table_of_symbol, tables_for(symbols, table_of_symbol, count, width), draw(st.integers(1, 40))


@given(message=messages())
def test_every_symbol_comes_back(message):
    symbols, table_of_symbol, frequencies, lanes = message
    data = rans.encode(symbols, table_of_symbol, frequencies, lanes)
    np.testing.assert_array_equal(rans.decode(data, table_of_symbol, frequencies, lanes), symbols)


@given(message=messages())
def test_the_documentation_is_enough_for_another_reader(message):
    symbols, table_of_symbol, frequencies, lanes = message
    data = rans.encode(symbols, table_of_symbol, frequencies, lanes)
    states = list(struct.unpack_from(f"<{lanes}I", data))
    words = list(struct.unpack(f"<{(len(data) - 4 * lanes) // 2}H", data[4 * lanes :]))
    for position, table in enumerate(table_of_symbol):
        state, low = states[position % lanes], 0
        slot = state % 16384
        for symbol, frequency in enumerate(frequencies[table].tolist()):  # noqa: B007 - the one it stops at is meant
            if slot < low + frequency:
                break
            low += frequency
        assert symbol == symbols[position]
        state = frequency * (state // 16384) + slot - low
        states[position % lanes] = state if state >= 65536 else state * 65536 + words.pop(0)
    assert states == [65536] * lanes
    assert words == []


def test_gaussian_codes_cost_their_entropy_and_no_more_than_a_five_hundredth():
    random = np.random.default_rng(0)
    table_of_symbol = np.repeat(np.arange(4, dtype=np.uint8), 100_000)
    spread = np.array([0.6, 1.5, 2.5, 6.0])[table_of_symbol]
    symbols = (np.clip(np.rint(random.normal(size=400_000) * spread), -31, 31) + 31).astype(np.uint8)
    frequencies = tables_for(symbols, table_of_symbol, 4, 63)
    bound = 0.0
    for table in range(4):
        counts = np.bincount(symbols[table_of_symbol == table])
        counts = counts[counts > 0]
        bound -= float(counts @ np.log2(counts / counts.sum())) / 8
    size = len(rans.encode(symbols, table_of_symbol, frequencies, rans.lanes_for(len(symbols))))
    assert bound < size < 1.002 * bound


@given(counts=st.lists(st.integers(0, 1 << 24), min_size=1, max_size=256))
def test_frequencies_fill_the_total_and_spare_what_occurs(counts):
    frequencies = rans.normalize(np.array(counts))
    assert int(frequencies.sum()) == rans.TOTAL
    if any(counts):
        np.testing.assert_array_equal(frequencies > 0, np.array(counts) > 0)


def test_anything_else_is_no_message():
    symbols = np.random.default_rng(1).integers(0, 9, 500).astype(np.uint8)
    none = np.zeros(500, np.uint8)
    frequencies = tables_for(symbols, none, 1, 9)
    data = rans.encode(symbols, none, frequencies, 4)
    assert rans.decode(data, none, frequencies, 4) is not None
    assert rans.decode(data[:-2], none, frequencies, 4) is None
    assert rans.decode(data + b"\0\0", none, frequencies, 4) is None
    assert rans.decode(data[:-1], none, frequencies, 4) is None
    assert rans.decode(data[:12], none, frequencies, 4) is None
    assert rans.decode(data, none[:-1], frequencies, 4) is None
    assert rans.decode(data, none, frequencies + 1, 4) is None
    for place in range(0, len(data), 7):
        damaged = bytearray(data)
        damaged[place] ^= 16
        again = rans.decode(bytes(damaged), none, frequencies, 4)
        assert again is None or not np.array_equal(again, symbols)


@pytest.mark.parametrize(("symbols", "lanes"), [(0, 1), (16_383, 1), (16_384, 2), (24_000_000, 2048), (1 << 28, 4096)])
def test_long_messages_get_more_lanes(symbols, lanes):
    assert rans.lanes_for(symbols) == lanes
