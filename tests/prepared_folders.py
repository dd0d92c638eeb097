"""What the tests of `prepare` begin from and look at: a source of documents, and the content of a prepared folder."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from bytejepa.data.blocks import Block
from bytejepa.data.shards import find_shards, open_shard
from bytejepa.data.vocabulary import BOS, BYTE_OFFSET


def bytes_from_ids(ids: npt.NDArray[np.integer]) -> bytes:
    """The raw bytes of `ids`; the four special ids are zero bytes long."""
    return (ids[ids >= BYTE_OFFSET] - BYTE_OFFSET).astype(np.uint8).tobytes()


def documents_of(out: Path, split: str) -> list[bytes]:
    ids = np.concatenate([open_shard(path) for path in find_shards(out, split)])  # type: ignore[arg-type]
    assert ids[0] == BOS
    return [bytes_from_ids(part) for part in np.split(ids, np.flatnonzero(ids == BOS))[1:]]


def files_of(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.iterdir())}


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


TEXTS = [f"document {number} " + "word " * (number % 50) for number in range(200)]


def documents_from_blocks(blocks: Iterable[Block]) -> Iterator[bytes]:
    """Yield whole documents; text before the first document's start counts as a document of its own."""
    parts: list[bytes] = []
    begun = False
    for block in blocks:
        raw = block.data.tobytes()
        cuts = [0, *block.starts.tolist(), len(raw)]
        for index, (begin, end) in enumerate(itertools.pairwise(cuts)):
            if index > 0:
                if begun:
                    yield b"".join(parts)
                parts, begun = [], True
            if end > begin:
                parts.append(raw[begin:end])
                begun = True
    if begun:
        yield b"".join(parts)
