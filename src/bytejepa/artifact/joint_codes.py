"""The codes of many matrices in one entropy-coded stream: every row names the frequency table that codes it.

The tables are found by alternating two steps, as in k-means with code length for a distance: each row takes the table
that codes it in the fewest bits, its own name included; each table becomes the histogram of its rows. Rows that are
alike, wherever they lie, thus share a table, and a table costs so little that there can be dozens.
Source: entropy-constrained clustering, Chou, Lookabaugh and Gray 1989 (IEEE ASSP 37), applied to histograms.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from bytejepa.artifact import rans
from bytejepa.artifact.codecs import CODECS, StreamRecord, byte_planes, from_byte_planes, require_codec, smallest
from bytejepa.errors import ArtifactError

MAX_TABLES = 64
MAX_SYMBOLS = 256
CLUSTERING_ROUNDS = 8
SAMPLED_ROWS = 8192
"""Most rows that tables are sought on; a model of 35 million weights has 120,000."""
ROUNDS_OF_ALL = 4
"""After that, with all rows."""
FREQUENCY = np.dtype("<u2")
STREAM_NAMES = ("frequencies", "table of each row", "codes")

Codes = npt.NDArray[np.int8]
"""A matrix of codes, (rows, columns)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class JointRecord:
    """Where the joint stream lies in the payload and how to read it."""

    lowest_code: int
    num_symbols: int
    """Codes lie in [lowest_code, lowest_code + num_symbols)."""
    num_tables: int
    lanes: int
    offset: int
    """Of the first byte in the payload."""
    streams: tuple[StreamRecord, ...]
    """Frequencies, the table of each row, codes; without gaps."""
    sha256: str
    """Of all streams together, in hex."""

    @property
    def num_bytes(self) -> int:
        """Bytes of all streams."""
        return sum(stream.num_bytes for stream in self.streams)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class RowTables:
    """Frequency tables and which of them codes each row."""

    frequencies: npt.NDArray[np.uint16]
    """(tables, symbols), each row summing to rans.TOTAL."""
    table_of_row: npt.NDArray[np.uint8]
    bits_of_row: npt.NDArray[np.float64]
    """What each row costs: its codes, and naming its table at the tables' overall frequencies."""


def row_histograms(matrices: Sequence[Codes], lowest: int, num_symbols: int) -> npt.NDArray[np.int32]:
    """Return how often each row of all `matrices` has each code, (rows, symbols)."""
    pieces = [np.zeros((0, num_symbols), np.int32)]
    for codes in matrices:
        rows = len(codes)
        symbols = codes.astype(np.int64) - lowest + np.arange(rows)[:, None] * num_symbols
        counts = np.bincount(symbols.reshape(-1), minlength=rows * num_symbols)
        pieces.append(counts.reshape(rows, num_symbols).astype(np.int32))
    return np.concatenate(pieces)


def choose_tables(histograms: npt.NDArray[np.int32]) -> RowTables:
    """Return the tables, at most MAX_TABLES, that code rows of these histograms in about the fewest bytes.

    How many, and which, is found on at most SAMPLED_ROWS rows; then all rows choose among them.
    """
    sample = _sampled_rows(histograms)
    sampled = histograms[sample].astype(np.float32)  # products of floats are what numpy is quick at
    scale = float(histograms.sum()) / max(1.0, float(sampled.sum(dtype=np.float64)))
    best, least = None, np.inf
    count = 1
    while count <= MAX_TABLES:
        table_of_row = _cluster(sampled, count)
        tables = _row_tables(sampled, table_of_row)
        # a frequency takes about a byte after compression
        total_bits = scale * float(tables.bits_of_row.sum()) + 8 * np.count_nonzero(tables.frequencies)
        if best is not None and total_bits >= least:
            break
        best, least = table_of_row, total_bits
        count *= 2
    assert best is not None
    if len(sample) == len(histograms):
        return _row_tables(sampled, best)
    counts, _, name_bits = _tables_of(sampled, best)
    exact = histograms.astype(np.float32)
    for _ in range(ROUNDS_OF_ALL):
        table_of_row = _cheapest(exact, counts, name_bits)
        counts, table_of_row, name_bits = _tables_of(exact, table_of_row)
    return _row_tables(exact, table_of_row)


def _sampled_rows(histograms: npt.NDArray[np.int32]) -> npt.NDArray[np.int64]:
    """Return which rows stand for all: evenly along their spread, long ones more often; in their order."""
    if len(histograms) <= SAMPLED_ROWS:
        return np.arange(len(histograms))
    ends = np.cumsum(histograms.sum(1, dtype=np.int64)[order := np.argsort(_spread(histograms), kind="stable")])
    places = np.searchsorted(ends, (np.arange(SAMPLED_ROWS) + 0.5) * (ends[-1] / SAMPLED_ROWS))
    return np.sort(order[np.unique(places)])


def _spread(histograms: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Return the variance of each row's codes."""
    symbols = np.arange(histograms.shape[1], dtype=np.float64)
    length, first, second = (histograms @ weight for weight in (np.ones_like(symbols), symbols, symbols**2))
    length = np.maximum(1, length)
    return second / length - np.square(first / length)


def _cluster(histograms: npt.NDArray[np.float32], count: int) -> npt.NDArray[np.int64]:
    """Return each row's table, up to `count` of them, after a few rounds from rows ordered by their spread."""
    rank = np.argsort(np.argsort(_spread(histograms), kind="stable"), kind="stable")
    table_of_row = rank * count // max(1, len(rank))
    for _ in range(CLUSTERING_ROUNDS if count > 1 else 0):
        counts, table_of_row, name_bits = _tables_of(histograms, table_of_row)
        table_of_row = _cheapest(histograms, counts, name_bits)
    return table_of_row


def _cheapest(
    histograms: npt.NDArray[np.float32], counts: npt.NDArray[np.int64], name_bits: npt.NDArray[np.float64]
) -> npt.NDArray[np.int64]:
    """Return for each row the table that codes it in the fewest bits."""
    # a code that a table has not seen is allowed, at a high cost
    code_bits = -np.log2(np.maximum(counts, 2**-6) / np.maximum(1, counts.sum(1, keepdims=True)))
    # in float64, where a table seldom wins by a rounding error that another machine does not make; in parts, for memory's sake
    parts = np.array_split(histograms, 1 + len(histograms) // SAMPLED_ROWS)
    return np.concatenate([(part.astype(np.float64) @ code_bits.T + name_bits).argmin(1) for part in parts])


def _row_tables(histograms: npt.NDArray[np.float32], table_of_row: npt.NDArray[np.int64]) -> RowTables:
    counts, table_of_row, name_bits = _tables_of(histograms, table_of_row)
    frequencies = np.stack([rans.normalize(row) for row in counts])
    code_bits = rans.TOTAL_BITS - np.log2(np.maximum(frequencies, 1))
    bits_of_row = np.empty(len(histograms))
    for table, bits in enumerate(code_bits):
        rows = table_of_row == table
        bits_of_row[rows] = histograms[rows] @ bits + name_bits[table]
    return RowTables(frequencies=frequencies, table_of_row=table_of_row.astype(np.uint8), bits_of_row=bits_of_row)


def _tables_of(
    histograms: npt.NDArray[np.float32], table_of_row: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Return (counts of each table in use, table of each row renumbered, bits that naming each table takes)."""
    used, table_of_row, rows = np.unique(table_of_row, return_inverse=True, return_counts=True)
    if not len(used):
        return np.zeros((1, histograms.shape[1]), np.int64), table_of_row, np.zeros(1)
    sums = [histograms[table_of_row == table].sum(0, dtype=np.float64) for table in range(len(used))]
    return np.rint(np.stack(sums)).astype(np.int64), table_of_row, -np.log2(rows / len(histograms))


def tables_of_matrices(matrices: Sequence[Codes]) -> RowTables:
    """Return the tables of a joint stream of all `matrices`."""
    lowest, num_symbols = _alphabet(matrices)
    return choose_tables(row_histograms(matrices, lowest, num_symbols))


def bits_of_matrices(matrices: Sequence[Codes], tables: RowTables) -> list[float]:
    """Return what each matrix costs in the joint stream of them all, whose tables are `tables`."""
    ends = np.cumsum([len(codes) for codes in matrices])
    return [float(piece.sum()) for piece in np.split(tables.bits_of_row, ends[:-1])]


def encode_joint(
    matrices: Sequence[Codes], tables: RowTables, codecs: Sequence[str], *, offset: int
) -> tuple[JointRecord, bytes]:
    """Return the record and the bytes of a joint stream; its two small streams are compressed by the smallest codec."""
    lowest, num_symbols = _alphabet(matrices)
    symbols = np.concatenate([codes.reshape(-1).astype(np.int16) - lowest for codes in matrices]).astype(np.uint8)
    lanes = rans.lanes_for(len(symbols))
    coded = rans.encode(symbols, _table_of_symbol(tables.table_of_row, matrices), tables.frequencies, lanes)
    planes = byte_planes(tables.frequencies.astype(FREQUENCY))
    packed = [smallest(planes, codecs), smallest(tables.table_of_row.tobytes(), codecs), ("raw", coded)]
    data = b"".join(stream for _, stream in packed)
    record = JointRecord(
        lowest_code=lowest,
        num_symbols=num_symbols,
        num_tables=len(tables.frequencies),
        lanes=lanes,
        offset=offset,
        streams=tuple(StreamRecord(codec=codec, num_bytes=len(stream)) for codec, stream in packed),
        sha256=hashlib.sha256(data).hexdigest(),
    )
    return record, data


def decode_joint(record: JointRecord, shapes: Sequence[tuple[int, ...]], data: bytes | memoryview) -> list[Codes]:
    """Return the matrices of codes, of the given shapes, in order.

    Raises: ArtifactError if the record is impossible or the data do not decode to exactly these matrices.
    """
    check_joint(record)
    if hashlib.sha256(data).hexdigest() != record.sha256:
        raise ArtifactError("the joint codes: checksum differs", hint="the file is damaged, copy it again")
    rows = sum(shape[0] for shape in shapes)
    sizes = (2 * record.num_tables * record.num_symbols, rows, record.streams[2].num_bytes)
    pieces, start = [], 0
    for name, stream, size in zip(STREAM_NAMES, record.streams, sizes, strict=True):
        raw = CODECS[stream.codec].decompress(bytes(data[start : start + stream.num_bytes]), size)
        if raw is None:
            raise _undecodable(f"the {name} do not decode to {size} bytes")
        pieces.append(raw)
        start += stream.num_bytes
    frequencies = from_byte_planes(pieces[0], FREQUENCY).reshape(record.num_tables, record.num_symbols).astype(np.int64)
    table_of_row = np.frombuffer(pieces[1], np.uint8)
    if rows and int(table_of_row.max()) >= record.num_tables:
        raise _undecodable(f"a row names table {int(table_of_row.max())} of {record.num_tables}")
    lengths = np.concatenate([np.full(shape[0], shape[1]) for shape in shapes]).astype(np.int64)
    symbols = rans.decode(pieces[2], np.repeat(table_of_row, lengths), frequencies, record.lanes)
    if symbols is None:
        raise _undecodable(f"the codes do not decode to {int(lengths.sum())} symbols")
    codes = (symbols.astype(np.int16) + record.lowest_code).astype(np.int8)
    ends = np.cumsum([shape[0] * shape[1] for shape in shapes])
    return [piece.reshape(shape) for piece, shape in zip(np.split(codes, ends[:-1]), shapes, strict=True)]


def check_joint(record: JointRecord) -> None:
    """Refuse numbers that no writer writes, before anything is allocated for them. Raises: ArtifactError."""
    possible = (
        1 <= record.num_tables <= 256
        and 1 <= record.num_symbols <= MAX_SYMBOLS
        and -128 <= record.lowest_code <= 128 - record.num_symbols
        and 1 <= record.lanes <= rans.MAX_LANES
        and len(record.streams) == len(STREAM_NAMES)
        and all(stream.num_bytes >= 0 for stream in record.streams)
        and record.streams[2].codec == "raw"
    )
    if not possible:
        raise ArtifactError("the joint codes: impossible record", hint="the file was not written by bytejepa")
    for stream in record.streams:
        require_codec(stream.codec, "the joint codes")


def _alphabet(matrices: Sequence[Codes]) -> tuple[int, int]:
    """Return the lowest code and how many codes there are from it to the highest."""
    filled = [codes for codes in matrices if codes.size]
    lowest = min((int(codes.min()) for codes in filled), default=0)
    highest = max((int(codes.max()) for codes in filled), default=0)
    return lowest, highest - lowest + 1


def _table_of_symbol(table_of_row: npt.NDArray[np.uint8], matrices: Sequence[Codes]) -> npt.NDArray[np.uint8]:
    return np.repeat(table_of_row, np.concatenate([np.full(len(codes), codes.shape[1]) for codes in matrices]))


def _undecodable(reason: str) -> ArtifactError:
    return ArtifactError(f"the joint codes: {reason}", hint="the file was not written by bytejepa")
