"""Text out of SentencePiece tokens by a table of pieces, as the SentencePiece decoder gives it, a document at a time.

The challenge's shards hold tokens of a SentencePiece model (sp1024); a document is what lies between two BOS tokens.
The decoder's rules, which this module restates for whole arrays:

- the word-boundary mark is a space; control pieces vanish; an unknown piece is the model's surface for it;
- the dummy space at the start of a document is dropped: at the first piece that is not a control piece, or, when the
  model removes extra white space, at every piece until some text has come out;
- byte pieces that follow each other are UTF-8; each byte that belongs to no valid character becomes U+FFFD.

Source: `SentencePieceProcessor::Decode` of SentencePiece 0.2.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from bytejepa.data.blocks import Block, Segment
from bytejepa.data.shards import HEADER_BYTES, ID_BYTES, open_shard
from bytejepa.errors import DataError, file_errors_as

_MARK = "\u2581"
_REPLACEMENT = "\ufffd".encode()
_TEXT, _BYTE, _SILENT = range(3)
_BLOCK_IDS = 50_000
"""About 120 kB of text: a block's arrays then stay in the processor's cache, which makes it half as fast again."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PieceTable:
    """What each piece of a model decodes to; arrays are (num_pieces + 1,): the last stands for an invalid byte."""

    num_pieces: int
    bos: int
    surfaces: npt.NDArray[np.uint8]
    """All surfaces, one after the other."""
    begins: npt.NDArray[np.int32]
    """Where a piece's surface begins."""
    lengths: npt.NDArray[np.int32]
    """The length of its surface in bytes."""
    sorts: npt.NDArray[np.uint8]
    """`_BYTE` for a byte piece, `_SILENT` for one after which a document's start goes on, `_TEXT` for all others."""
    drops_space: npt.NDArray[np.bool_]
    """A text piece that loses its first byte, a space, at the start of a document."""
    is_lone_mark: npt.NDArray[np.bool_]
    """The piece that is nothing but a space, in a model that drops all spaces at the start of a document."""


def load_table(model: str | Path) -> PieceTable:
    """Return the table of a SentencePiece model.

    Raises:
        DataError: sentencepiece is not installed, the file is no model, it has no BOS piece, or its decoder does
            something that no table can stand for.
    """
    try:
        from sentencepiece import SentencePieceProcessor
    except ImportError as problem:
        raise DataError("reading sp1024 shards needs sentencepiece", hint="pip install 'bytejepa[sp1024]'") from problem
    if not Path(model).is_file():
        raise DataError(f"the SentencePiece model {model} does not exist or is no file", hint="check the path")
    with file_errors_as(DataError, "read the SentencePiece model", model):
        serialized = Path(model).read_bytes()
    try:
        processor = SentencePieceProcessor(model_proto=serialized)
        num_pieces = processor.get_piece_size()
    except (RuntimeError, TypeError) as problem:
        raise DataError(f"{model} is no SentencePiece model", hint="expected the .model file") from problem
    if num_pieces == 0 or processor.bos_id() < 0 or not processor.is_control(processor.bos_id()):
        raise DataError(f"the SentencePiece model {model} has no BOS piece, so documents cannot be told apart")
    table = _table_of(processor)
    # All pieces in one document and back: what the table does not know of (a denormalizer, say) shows here.
    ids = [index for index in range(num_pieces) if index != processor.bos_id()]
    converter = TextConverter(table)
    parts = [converter.convert(np.array(ids, dtype=np.uint16), begins_document=True), converter.flush()]
    if b"".join(data.tobytes() for data, _ in parts) != processor.decode(ids).encode("utf-8"):
        raise DataError(f"the decoder of the SentencePiece model {model} does more than a table of pieces can")
    return table


def _table_of(processor: Any) -> PieceTable:
    """Return the table of a loaded `SentencePieceProcessor`."""
    ids = range(processor.get_piece_size())
    pieces = [processor.id_to_piece(index) for index in ids]
    is_byte = [processor.is_byte(index) for index in ids]
    is_control = [processor.is_control(index) for index in ids]
    is_unknown = [processor.is_unknown(index) for index in ids]
    surfaces: list[bytes] = []
    for index, piece in enumerate(pieces):
        if is_byte[index]:
            surfaces.append(bytes([int(piece[3:5], 16)]))  # "<0xE2>"
        elif is_control[index]:
            surfaces.append(b"")
        elif is_unknown[index]:
            surfaces.append(processor.decode([index]).encode("utf-8"))
        else:
            surfaces.append(piece.replace(_MARK, " ").encode("utf-8"))
    marked = [
        piece.startswith(_MARK) and not (byte or control or unknown)
        for piece, byte, control, unknown in zip(pieces, is_byte, is_control, is_unknown, strict=True)
    ]
    # How a model treats leading spaces is written in a part of it that only protobuf can read, so the decoder is asked.
    first = marked.index(True) if any(marked) else None
    drops = first is not None and processor.decode([first]).encode("utf-8") == surfaces[first][1:]
    lone = pieces.index(_MARK) if drops and _MARK in pieces else None
    drops_all = lone is not None and processor.decode([lone, lone]) == ""
    surfaces.append(_REPLACEMENT)
    lengths = np.array([len(surface) for surface in surfaces], dtype=np.int32)
    is_lone_mark = np.array([drops_all and index == lone for index in range(len(surfaces))])
    return PieceTable(
        num_pieces=len(pieces),
        bos=processor.bos_id(),
        surfaces=np.frombuffer(b"".join(surfaces), dtype=np.uint8),
        begins=(np.cumsum(lengths) - lengths).astype(np.int32),
        lengths=lengths,
        sorts=np.select(
            [np.array([*is_byte, False]), np.array([*is_control, False]) | is_lone_mark], [_BYTE, _SILENT]
        ).astype(np.uint8),
        drops_space=np.array([*marked, False]) & drops & ~is_lone_mark,
        is_lone_mark=is_lone_mark,
    )


class TextConverter:
    """Turns a stream of tokens, cut anywhere, into text; what was cut apart (a character, a start) is joined again."""

    def __init__(self, table: PieceTable) -> None:
        self._table = table
        self._held = np.empty(0, dtype=np.uint16)
        self._at_start = False

    def convert(
        self, ids: npt.NDArray[np.uint16], *, begins_document: bool = False
    ) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
        """Return the text of the next tokens, (num_bytes,), and the offsets at which documents begin in it.

        Up to three bytes of an unfinished character wait for the next call. `begins_document` says that the first
        token begins a document without a BOS; nothing may wait then (`flush` comes before).
        """
        table = self._table
        self._at_start |= begins_document
        ids = np.concatenate([self._held, ids])
        num_held = self._num_unfinished(ids)
        ids, self._held = ids[: len(ids) - num_held], ids[len(ids) - num_held :]
        sorts = np.take(table.sorts, ids)
        self._replace_invalid_bytes(ids, np.flatnonzero(sorts == _BYTE))
        bos_positions = np.flatnonzero(ids == table.bos)
        places = ids.astype(np.intp)
        begins, lengths = np.take(table.begins, places), np.take(table.lengths, places)
        self._drop_spaces(ids, np.flatnonzero(sorts == _SILENT), bos_positions, begins, lengths)
        ends = np.cumsum(lengths, dtype=np.int32)
        starts = (ends - lengths)[bos_positions].astype(np.int64)
        if begins_document:
            starts = np.concatenate([np.zeros(1, dtype=np.int64), starts])
        return np.take(table.surfaces, _surface_places(begins, lengths, ends), mode="clip"), starts

    def flush(self) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
        """Return what still waits, at the end of the stream: bytes of a character that does not come any more."""
        ids, self._held = self._held, np.empty(0, dtype=np.uint16)
        ids = ids.copy()
        self._replace_invalid_bytes(ids, np.arange(len(ids)))
        begins, lengths = self._table.begins[ids], self._table.lengths[ids]
        places = _surface_places(begins, lengths, np.cumsum(lengths, dtype=np.int32))
        return self._table.surfaces[places], np.empty(0, dtype=np.int64)

    def _num_unfinished(self, ids: npt.NDArray[np.uint16]) -> int:
        """Return how many byte pieces at the end may be the beginning of a character."""
        for back in range(1, min(3, len(ids)) + 1):
            piece = int(ids[-back])
            if self._table.sorts[piece] != _BYTE:
                return 0
            value = int(self._table.surfaces[self._table.begins[piece]])
            if value < 0x80:
                return 0
            if value >= 0xC0:
                return back
        return 0

    def _replace_invalid_bytes(self, ids: npt.NDArray[np.uint16], positions: npt.NDArray[np.int64]) -> None:
        """Put the piece of an invalid byte in place of the byte pieces, at `positions`, that belong to no character."""
        table = self._table
        if len(positions) == 0:
            return
        values = table.surfaces[table.begins[ids[positions]]]
        # A zero between two runs keeps their bytes from making a character together.
        gaps = np.cumsum(np.diff(positions, prepend=positions[0]) != 1) - 1
        padded = np.zeros(len(values) + int(gaps[-1]), dtype=np.uint8)
        places = np.arange(len(values)) + gaps
        padded[places] = values
        try:
            padded.tobytes().decode("utf-8")
        except UnicodeDecodeError:
            invalid = ~valid_utf8_bytes(padded)[places]
            ids[positions[invalid]] = table.num_pieces

    def _drop_spaces(
        self,
        ids: npt.NDArray[np.uint16],
        silent: npt.NDArray[np.int64],
        bos_positions: npt.NDArray[np.int64],
        begins: npt.NDArray[np.int32],
        lengths: npt.NDArray[np.int32],
    ) -> None:
        """Take the dropped spaces out of `begins` and `lengths`, and remember whether a document's start goes on.

        `silent` are the positions of silent pieces. Whatever happens at a document's start happens in a run of them,
        and they are few, so the work is done run by run.
        """
        table = self._table
        starts = bos_positions
        if self._at_start:
            # A start that goes on from the tokens before counts as a BOS before the first token.
            starts, silent = np.concatenate([[-1], starts]), np.concatenate([[-1], silent])
        if len(starts) == 0:
            return
        is_first = np.diff(silent, prepend=silent[0] - 2) != 1
        runs = np.cumsum(is_first) - 1
        run_begins = silent[is_first]
        run_ends = silent[np.concatenate([is_first[1:], [True]])] + 1
        # A document's first text is the piece after its run, unless the run holds the next document's BOS.
        first_texts = run_ends[runs[np.searchsorted(silent, starts)]]
        found = first_texts[first_texts < np.concatenate([starts[1:], [len(ids)]])]
        dropping = found[table.drops_space[ids[found]]]
        begins[dropping] += 1
        lengths[dropping] -= 1
        self._at_start = bool(first_texts[-1] == len(ids))
        if table.is_lone_mark.any():
            later = silent >= 0
            is_mark = later & table.is_lone_mark[ids[np.where(later, silent, 0)]] if len(ids) else ~later
            marks = silent[is_mark]
            last_starts = np.concatenate([[-2], starts])[np.searchsorted(starts, marks)]
            lengths[marks[last_starts >= run_begins[runs[is_mark]]]] = 0


def _surface_places(
    begins: npt.NDArray[np.int32], lengths: npt.NDArray[np.int32], ends: npt.NDArray[np.int32]
) -> npt.NDArray[np.intp]:
    """Return, for each byte of the text, where it stands among the surfaces, from the pieces' begins and lengths.

    Inside a piece the place grows by 1, and at a piece's first byte it jumps; the sum over these steps is the place.
    That takes half the time of `np.repeat` over pieces of 2.4 bytes.
    """
    if len(ends) == 0 or ends[-1] == 0:
        return np.empty(0, dtype=np.intp)
    has_text = lengths > 0
    begins, lengths, ends = begins[has_text], lengths[has_text], ends[has_text]
    steps = np.ones(int(ends[-1]), dtype=np.intp)
    steps[0] = begins[0]
    steps[ends[:-1]] = begins[1:] - begins[:-1] - lengths[:-1] + 1
    return np.cumsum(steps, out=steps)


def valid_utf8_bytes(values: npt.NDArray[np.uint8]) -> npt.NDArray[np.bool_]:
    """Return, for each byte, whether it belongs to a valid UTF-8 character, read from left to right.

    No byte that continues a character can begin one, so valid characters never overlap and can be found all at once.
    """
    padded = np.concatenate([values, np.zeros(3, dtype=np.uint8)])
    first, second, third, fourth = (padded[shift : shift + len(values)] for shift in range(4))
    second_continues, third_continues, fourth_continues = ((byte & 0xC0) == 0x80 for byte in (second, third, fourth))
    is_two = (first >= 0xC2) & (first <= 0xDF) & second_continues
    # Longer than needed (E0, F0), surrogates (ED) and beyond U+10FFFF (F4) are told by the second byte.
    is_three = (first >= 0xE0) & (first <= 0xEF) & second_continues & third_continues
    is_three &= ~((first == 0xE0) & (second < 0xA0)) & ~((first == 0xED) & (second > 0x9F))
    is_four = (first >= 0xF0) & (first <= 0xF4) & second_continues & third_continues & fourth_continues
    is_four &= ~((first == 0xF0) & (second < 0x90)) & ~((first == 0xF4) & (second > 0x8F))
    valid = (first < 0x80) | is_two | is_three | is_four
    valid[1:] |= (is_two | is_three | is_four)[:-1]
    valid[2:] |= (is_three | is_four)[:-2]
    valid[3:] |= is_four[:-3]
    return valid


def token_blocks(segments: Iterable[Segment], model: str) -> Iterator[Block]:
    """Yield the text of segments of token shards; a document may run from one segment into the next.

    Raises:
        DataError: a shard is damaged, or holds a token that the model does not have.
    """
    table = load_table(model)
    converter = TextConverter(table)
    for segment in segments:
        begins_document = not segment.continues
        if begins_document:
            data, starts = converter.flush()
            yield Block(data=data, starts=starts, source_bytes=0)
        for position, ids in _token_ids(segment):
            if int(ids.max()) >= table.num_pieces:
                wrong = int(np.argmax(ids >= table.num_pieces))
                raise DataError(
                    f"{segment.path} holds token {int(ids[wrong])} at position {position + wrong}: "
                    f"the model {model} has {table.num_pieces} pieces",
                    hint="give the model that the shards were made with",
                )
            begins_document &= int(ids[0]) != table.bos
            data, starts = converter.convert(ids, begins_document=begins_document)
            begins_document = False
            yield Block(data=data, starts=starts, source_bytes=ID_BYTES * len(ids))
    data, starts = converter.flush()
    yield Block(data=data, starts=starts, source_bytes=0)


def _token_ids(segment: Segment) -> Iterator[tuple[int, npt.NDArray[np.uint16]]]:
    """Yield (position in the shard, ids): read, not mapped, for mapped pages count as memory in use."""
    num_ids = len(open_shard(Path(segment.path)))
    end = num_ids if segment.end is None else segment.end
    with file_errors_as(DataError, "read the shard", segment.path), Path(segment.path).open("rb") as file:
        file.seek(HEADER_BYTES + ID_BYTES * segment.begin)
        for position in range(segment.begin, end, _BLOCK_IDS):
            raw = file.read(ID_BYTES * min(_BLOCK_IDS, end - position))
            yield position, np.frombuffer(raw, dtype="<u2")
