"""Blocks: the form in which text travels from a source to a shard, a few hundred kB at a time.

A document may run over many blocks, so that one giant document costs no more memory than many small ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from bytejepa.data.vocabulary import BOS, BYTE_OFFSET


@dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """Some text of a source and where documents begin in it."""

    data: npt.NDArray[np.uint8]
    """(num_bytes,) the raw text."""
    starts: npt.NDArray[np.int64]
    """(num_documents,) ascending offsets into `data`; an offset stands twice where an empty document lies."""
    source_bytes: int
    """How much further the source was read for this block, for progress."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Segment:
    """A stretch of one source file."""

    path: str
    begin: int = 0
    end: int | None = None
    """Bytes of plain text and JSON Lines, row groups of parquet, ids of a shard; None is the end of the file."""
    continues: bool = False
    """The segment begins inside a document that began before it."""
    source_bytes: int = 0
    """Its length on the disk, for progress."""


def limited(blocks: Iterable[Block], skip_documents: int, take_documents: int | None) -> Iterator[Block]:
    """Yield the blocks without their first `skip_documents` documents and, of the rest, the first `take_documents`."""
    end = None if take_documents is None else skip_documents + take_documents
    num_seen = 0
    for block in blocks:
        count = len(block.starts)
        low, high, first, last = 0, count, 0, len(block.data)
        if skip_documents > 0 and skip_documents >= num_seen:
            low = min(skip_documents - num_seen, count)
            first = int(block.starts[low]) if low < count else last
        if end is not None and end - num_seen < count:
            high = end - num_seen
            last = int(block.starts[high])
        yield Block(data=block.data[first:last], starts=block.starts[low:high] - first, source_bytes=block.source_bytes)
        num_seen += count
        if end is not None and num_seen > end:
            return


def ids_from_block(block: Block) -> npt.NDArray[np.uint16]:
    """Return a block's ids, (num_bytes + num_documents,) uint16: BOS before each document."""
    num_documents = len(block.starts)
    if num_documents == 0:
        return np.add(block.data, BYTE_OFFSET, dtype=np.uint16)
    ids = np.empty(len(block.data) + num_documents, dtype=np.uint16)
    positions = block.starts + np.arange(num_documents)
    is_byte = np.ones(len(ids), dtype=bool)
    is_byte[positions] = False
    ids[is_byte] = block.data
    ids += BYTE_OFFSET
    ids[positions] = BOS
    return ids
