import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bytejepa.codec import coder

TOTAL = 1 << 24


def table_of(weights: list[int]) -> np.ndarray:
    """Frequencies of sum 2^24, each at least 1."""
    array = np.array(weights, dtype=np.float64)
    table = 1 + np.floor(array / array.sum() * (TOTAL - len(array))).astype(np.int64)
    table[0] += TOTAL - table.sum()
    return table


def decoded(stream: bytes, table: np.ndarray, count: int) -> list[int]:
    state, out = coder.start_decoding([stream]), np.empty(1, np.int64)
    found = []
    for _ in range(count):
        coder.decode_symbols(state, table[None], 0, out)
        found.append(int(out[0]))
    return found


@given(
    st.lists(st.integers(1, 1 << 30), min_size=2, max_size=256),
    st.lists(st.integers(0, 255), max_size=200),
)
def test_symbols_come_back_and_cost_what_they_should(weights: list[int], picks: list[int]) -> None:
    table = table_of(weights)
    symbols = np.array([pick % len(table) for pick in picks], dtype=np.int64)
    starts = (table.cumsum() - table)[symbols]
    stream = coder.encode(starts, table[symbols])
    assert decoded(stream, table, len(symbols)) == symbols.tolist()
    bits = (24 - np.log2(table[symbols])).sum()
    assert 8 * len(stream) <= bits + 0.001 * len(symbols) + 16


@pytest.mark.parametrize("symbol", [0, 1])
def test_the_rarest_and_the_commonest_symbol_repeat(symbol: int) -> None:
    table = np.array([1, TOTAL - 1], dtype=np.int64)
    symbols = np.full(3000, symbol)
    stream = coder.encode((table.cumsum() - table)[symbols], table[symbols])
    assert decoded(stream, table, 3000) == symbols.tolist()
    assert len(stream) <= (9002 if symbol == 0 else 3)


def test_any_bytes_decode_to_some_symbols() -> None:
    table = table_of([5, 1, 1, 9])
    for stream in (b"", b"\xff" * 20, b"\x00" * 20, bytes(range(40))):
        assert len(decoded(stream, table, 500)) == 500
