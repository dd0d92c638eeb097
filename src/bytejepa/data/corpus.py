"""The embedded corpus: 90 State of the Union addresses, 1934-2021, so that a first run needs no download.

Public domain (CC0, PDDL); origin, licence and digest stand in `state_of_the_union.md` beside the data.
Validation is 2011-2021, training what came before: the split is by time, so that no later address is trained on.
"""

from __future__ import annotations

import hashlib
import json
import lzma
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

from bytejepa.data.manifest import (
    MANIFEST_NAME,
    Manifest,
    SourceFile,
    list_sources,
    load_manifest,
    split_record,
    write_manifest,
)
from bytejepa.data.shards import SPLITS, ShardRecord, Split, open_shard, shard_name, shards_in, write_shard
from bytejepa.data.vocabulary import BOS, ids_from_bytes
from bytejepa.errors import DataError, file_errors_as

CORPUS_NAME = "state_of_the_union.jsonl.xz"
CORPUS_SHA256 = "2fa45b72e4f7e32cec1143701dc2a87fa9ab93c9ef3eaa5976a50301399e8edb"
"""Of the shipped file. `benchmarks/make_embedded_corpus.py` makes it."""
FIRST_VALIDATION_YEAR = 2011


@dataclass(frozen=True, kw_only=True, slots=True)
class Document:
    """One address."""

    id: str
    """Year, president and party, for instance `1934_franklin_d_roosevelt_d`."""
    year: int
    data: bytes
    """The text in UTF-8, without white space around it."""

    @property
    def split(self) -> Split:
        """The split that the address belongs to."""
        return "val" if self.year >= FIRST_VALIDATION_YEAR else "train"


def corpus_path() -> Path:
    """Return where the shipped file lies."""
    return Path(__file__).parent / CORPUS_NAME


def embedded_documents() -> list[Document]:
    """Return all 90 addresses in order of time.

    Raises:
        DataError: the shipped file is missing or not the one that belongs to this version.
    """
    return list(_documents())


@cache
def _documents() -> tuple[Document, ...]:
    path = corpus_path()
    with file_errors_as(DataError, "read the embedded corpus", path):
        packed = path.read_bytes()
    sha256 = hashlib.sha256(packed).hexdigest()
    if sha256 != CORPUS_SHA256:
        raise DataError(
            f"the embedded corpus {path} has sha256 {sha256[:16]}...: expected {CORPUS_SHA256[:16]}...",
            hint="the installation is damaged; install bytejepa again",
        )
    records = [json.loads(line) for line in lzma.decompress(packed).splitlines()]
    return tuple(
        Document(id=record["id"], year=int(record["id"][:4]), data=record["text"].encode("utf-8")) for record in records
    )


def embedded_text(split: Split) -> bytes:
    """Return the addresses of `split` ("train" or "val") as one text, a blank line between two, a newline at the end.

    Raises:
        DataError: unknown split, or the shipped file is damaged.
    """
    return b"\n\n".join(document.data for document in _documents_of(split)) + b"\n"


def write_embedded_shards(out: Path) -> Manifest:
    """Return the manifest of the two shards, train and val, written into `out`: BOS before each address.

    The files are the same, byte for byte, wherever and whenever they are written. Writing over such a folder is
    harmless; a folder with other shards or another manifest is refused.

    Raises:
        DataError: `out` holds something else, cannot be written, or the shipped file is damaged.
    """
    out = Path(out)
    ids = {split: _ids_of(split) for split in SPLITS}
    with file_errors_as(DataError, "make the folder", out):
        out.mkdir(parents=True, exist_ok=True)
    _refuse_other_data(out, ids)
    records: dict[Split, ShardRecord] = {split: write_shard(out / shard_name(split, 0), ids[split]) for split in SPLITS}
    packed = SourceFile(name=CORPUS_NAME, num_bytes=corpus_path().stat().st_size, modified_ns=0)
    manifest = Manifest(
        kind="embedded",
        sources=list_sources([packed]),
        settings={"source_sha256": CORPUS_SHA256, "first_validation_year": FIRST_VALIDATION_YEAR},
        splits={split: split_record([record]) for split, record in records.items()},
    )
    write_manifest(out, manifest)
    return manifest


def _refuse_other_data(out: Path, ids: dict[Split, npt.NDArray[np.uint16]]) -> None:
    """Raise a DataError unless the shards and the manifest in `out`, if any, are those of the embedded corpus."""
    for split in SPLITS:
        for path in shards_in(out, split):
            if path.name != shard_name(split, 0) or not np.array_equal(open_shard(path), ids[split]):
                raise DataError(f"{out} holds other data already: {path.name}", hint="name an empty folder")
    if (out / MANIFEST_NAME).exists() and load_manifest(out).kind != "embedded":
        raise DataError(f"{out} holds the manifest of other data already", hint="name an empty folder")


def _documents_of(split: Split) -> list[Document]:
    if split not in SPLITS:
        raise DataError(f"there is no split {split!r}: expected 'train' or 'val'")
    return [document for document in embedded_documents() if document.split == split]


def _ids_of(split: Split) -> npt.NDArray[np.uint16]:
    """Return the ids of a split, (num_ids,) uint16."""
    begin = np.array([BOS], dtype=np.uint16)
    return np.concatenate(
        [part for document in _documents_of(split) for part in (begin, ids_from_bytes(document.data))]
    )
