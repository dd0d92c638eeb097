"""Documents out of files, in constant memory: text, JSON Lines, parquet and shards of SentencePiece tokens.

A reader yields blocks (`data.blocks`): a few hundred kB of text and where in it documents begin.

- `text`: a file is a document, its bytes kept as they are, in UTF-8 or not. With a separator a file is the documents
  between the separators; what is empty between two separators is no document.
- `jsonl`: a line that is not blank is a record, the value of its key "text" a document. Bytes that are not UTF-8 are
  kept as they are. A lone surrogate, which no UTF-8 can hold, becomes "?", as in the challenge's own exporter.
- `parquet`: a row is a document, the value of its column `text`.
- `sp1024`: see `sentencepiece_table`.

Text and JSON Lines may be compressed: `.gz`, `.xz`, `.zst`.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import lzma
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, get_args

import numpy as np
import zstandard

from bytejepa.data.blocks import Block, Segment
from bytejepa.data.parquet import parquet_blocks
from bytejepa.data.sentencepiece_table import token_blocks
from bytejepa.errors import DataError, file_errors_as

Kind = Literal["text", "jsonl", "parquet", "sp1024"]
KINDS: tuple[Kind, ...] = get_args(Kind)
COMPRESSED_SUFFIXES = (".gz", ".xz", ".zst")
TEXT_KEY = "text"

_BLOCK_BYTES = 500_000
_ZSTANDARD_INPUT_BYTES = 2048
"""A run of one byte packs 128 kB into 4 bytes: 2 kB of input are at most 64 MB of output."""
_SUFFIXES: dict[str, Kind] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".parquet": "parquet",
    ".bin": "sp1024",
}
_NOT_TEXT = (".tar", ".zip", ".bz2", ".7z", ".rar", ".pdf", ".npy", ".npz", ".pt", ".safetensors")
_NOT_ESCAPED_BYTES = re.compile("[\ud800-\udc7f\udd00-\udfff]")


@dataclass(frozen=True, kw_only=True, slots=True)
class ReadSettings:
    """How sources are to be read."""

    kind: Kind
    document_separator: bytes | None = None
    """For text only."""
    tokenizer: str | None = None
    """Path of the SentencePiece model, for sp1024 only."""


def guess_kind(paths: Sequence[str | Path]) -> Kind:
    """Return the kind of sources that the file names tell.

    Raises:
        DataError: no files, files of two kinds (one of each is named), or an archive, which is none of the kinds.
    """
    found: dict[Kind, str] = {}
    for path in paths:
        found.setdefault(kind_of_name(path), str(path))
        if len(found) > 1:
            (first_kind, first), (second_kind, second) = found.items()
            raise DataError(
                f"sources of two kinds in one call: {first} is {first_kind}, {second} is {second_kind}",
                hint="prepare them separately, or say which kind all of them are with --kind",
            )
    if not found:
        raise DataError("no source files: expected at least one file")
    return next(iter(found))


def kind_of_name(path: str | Path) -> Kind:
    """Return the kind that one file name tells; what is not known by its suffix is text.

    Raises:
        DataError: the suffix is that of an archive or of another binary format.
    """
    name = Path(path).name.lower()
    for suffix in COMPRESSED_SUFFIXES:
        name = name.removesuffix(suffix)
    suffix = Path(name).suffix
    if suffix in _NOT_TEXT:
        raise DataError(
            f"{path} is neither text nor JSON Lines nor parquet: its suffix is {suffix}",
            hint="unpack it first, or say --kind text if it is plain text all the same",
        )
    return _SUFFIXES.get(suffix, "text")


def is_compressed(path: str | Path) -> bool:
    """Return whether a file name ends in one of the suffixes of compressed files."""
    return str(path).lower().endswith(COMPRESSED_SUFFIXES)


@contextlib.contextmanager
def opened(path: str) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """Yield a source's uncompressed bytes, as a file, and the raw file below it, whose position tells progress.

    Raises:
        DataError: the file cannot be read, is damaged or ends too early; also while it is read inside the block.
    """
    damaged = f"cannot decompress {path}"
    hint = "an interrupted download? fetch it again"
    with file_errors_as(DataError, "read", path), Path(path).open("rb") as raw:
        try:
            suffix = os.path.splitext(path)[1].lower()  # noqa: PTH122 - no Path object for each of a million files
            if suffix == ".gz":
                yield io.BufferedReader(gzip.GzipFile(fileobj=raw), 1 << 20), raw
            elif suffix == ".xz":
                yield io.BufferedReader(lzma.LZMAFile(raw), 1 << 20), raw  # noqa: SIM115 - closed with `raw`
            elif suffix == ".zst":
                yield io.BufferedReader(_ZstandardReader(raw), 1 << 20), raw
            else:
                yield raw, raw
        except (gzip.BadGzipFile, zlib.error, lzma.LZMAError, zstandard.ZstdError) as problem:
            raise DataError(f"{damaged}: {problem}", hint=hint) from problem
        except EOFError as problem:
            raise DataError(f"{damaged}: the file ends too early", hint=hint) from problem


class _ZstandardReader(io.RawIOBase):
    """Decompressed bytes of zstd frames. The library's own reader takes a truncated file for a finished one."""

    def __init__(self, raw: BinaryIO) -> None:
        self._raw = raw
        self._frame: zstandard.ZstdDecompressionObj | None = None
        self._input = self._output = b""
        self._taken = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        filled = 0
        while filled < len(buffer):
            if self._taken == len(self._output) and not self._decompress():
                break
            part = self._output[self._taken : self._taken + len(buffer) - filled]
            buffer[filled : filled + len(part)] = part
            self._taken += len(part)
            filled += len(part)
        return filled

    def _decompress(self) -> bool:
        """Return whether there was more input."""
        data = self._input or self._raw.read(_ZSTANDARD_INPUT_BYTES)
        self._input, self._output, self._taken = b"", b"", 0
        if not data:
            if self._frame is not None:
                raise EOFError
            return False
        if self._frame is None:
            self._frame = zstandard.ZstdDecompressor().decompressobj()
        self._output = self._frame.decompress(data)
        if self._frame.eof:
            self._input = self._frame.unused_data
            self._frame = None
        return True


def read_blocks(segments: Iterable[Segment], settings: ReadSettings) -> Iterator[Block]:
    """Yield the text of segments that follow each other, a few hundred kB at a time.

    Raises:
        DataError: a file cannot be read or does not hold what its kind promises; file and place are named.
    """
    if settings.kind == "sp1024":
        assert settings.tokenizer is not None, "checked by prepare"
        yield from token_blocks(segments, settings.tokenizer)
        return
    for segment in segments:
        if settings.kind == "jsonl":
            yield from _jsonl_blocks(segment)
        elif settings.kind == "parquet":
            yield from parquet_blocks(segment)
        elif settings.document_separator is None:
            yield from _text_blocks(segment)
        else:
            yield from _separated_blocks(segment, settings.document_separator)


def _text_blocks(segment: Segment) -> Iterator[Block]:
    """Yield a file, or a range of bytes of it, as one document."""
    starts = [] if segment.continues else [0]
    for data, source_bytes in _chunks(segment):
        yield _block(data, starts, source_bytes)
        starts = []
    if starts:
        yield _block(b"", starts, 0)


def _separated_blocks(segment: Segment, separator: bytes) -> Iterator[Block]:
    """Yield the documents between the separators, found from left to right without overlap."""
    inside = segment.continues
    held = b""
    for data, source_bytes in _chunks(segment):
        parts = (held + data).split(separator)
        # The end may be the first half of a separator: it waits for the next chunk.
        keep = max(len(parts[-1]) - len(separator) + 1, 0)
        parts[-1], held = parts[-1][:keep], parts[-1][keep:]
        starts: list[int] = []
        position = 0
        for index, part in enumerate(parts):
            inside = inside and index == 0
            if part and not inside:
                starts.append(position)
                inside = True
            position += len(part)
        yield _block(b"".join(parts), starts, source_bytes)
    if held:
        yield _block(held, [] if inside else [0], 0)


def _chunks(segment: Segment) -> Iterator[tuple[bytes, int]]:
    """Yield the bytes of a segment in chunks, each with the number of bytes read from the disk for it."""
    with opened(segment.path) as (file, raw):
        if segment.begin:
            file.seek(segment.begin)
        left = _BLOCK_BYTES if segment.end is None else segment.end - segment.begin
        position = raw.tell()
        while data := file.read(min(_BLOCK_BYTES, left)):
            left -= 0 if segment.end is None else len(data)
            yield data, raw.tell() - position
            position = raw.tell()


def _block(data: bytes, starts: list[int], source_bytes: int) -> Block:
    return Block(
        data=np.frombuffer(data, dtype=np.uint8),
        starts=np.asarray(starts, dtype=np.int64),
        source_bytes=source_bytes,
    )


def _jsonl_blocks(segment: Segment) -> Iterator[Block]:
    """Yield the texts of the lines that begin in a segment; a segment begins and ends at line ends."""
    with opened(segment.path) as (file, raw):
        if segment.begin:
            file.seek(segment.begin)
        position = raw.tell()
        texts: list[bytes] = []
        num_bytes = num_read = 0
        for number, line in enumerate(file):
            if segment.end is not None and segment.begin + num_read >= segment.end:
                break
            num_read += len(line)
            if line.isspace():
                continue
            texts.append(_text_of(line, segment, number))
            num_bytes += len(texts[-1])
            if num_bytes + 100 * len(texts) >= _BLOCK_BYTES:
                yield _joined(texts, raw.tell() - position)
                position = raw.tell()
                texts, num_bytes = [], 0
        yield _joined(texts, raw.tell() - position)


def _joined(texts: list[bytes], source_bytes: int) -> Block:
    """Return one block of whole documents."""
    lengths = np.fromiter(map(len, texts), dtype=np.int64, count=len(texts))
    data = np.frombuffer(b"".join(texts), dtype=np.uint8)
    return Block(data=data, starts=np.cumsum(lengths) - lengths, source_bytes=source_bytes)


def _text_of(line: bytes, segment: Segment, number: int) -> bytes:
    """Return the text of a JSON record; `number` counts the segment's lines from 0, for the error message."""
    if number == 0 and segment.begin == 0:
        line = line.removeprefix(b"\xef\xbb\xbf")  # a byte order mark, which some editors put first
    is_utf8 = True
    try:
        try:
            record = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError:
            record = json.loads(line.decode("utf-8", "surrogateescape"))
            is_utf8 = False
        problem = _shape_problem(record)
    except (ValueError, RecursionError) as error:
        problem = f"this is no JSON ({error})"
    if problem:
        raise DataError(
            f"{segment.path}:{_lines_before(segment) + number + 1}: "
            f'expected a JSON object with a string under "{TEXT_KEY}": {problem}',
            hint="correct or remove the line; plain text is prepared with --kind text",
        )
    text: str = record[TEXT_KEY]
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError:
        if is_utf8:
            return text.encode("utf-8", "replace")
        return _NOT_ESCAPED_BYTES.sub("?", text).encode("utf-8", "surrogateescape")


def _shape_problem(record: Any) -> str:
    """Return what is wrong with a record that has no text, or nothing."""
    if not isinstance(record, dict):
        return f"this is {type(record).__name__}, not an object"
    if TEXT_KEY not in record:
        keys = ", ".join(sorted(record)[:5]) or "none"
        return f"its keys are {keys}"
    return "" if isinstance(record[TEXT_KEY], str) else f"the value is {type(record[TEXT_KEY]).__name__}"


def _lines_before(segment: Segment) -> int:
    """Return the number of line ends before a segment of a plain file: only errors need it, so it is counted late."""
    if segment.begin == 0:
        return 0
    before = Segment(path=segment.path, end=segment.begin)
    return sum(data.count(b"\n") for data, _ in _chunks(before))
