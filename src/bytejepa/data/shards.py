"""Shards: the files that hold a corpus as ids, one little-endian uint16 an id, in the challenge's format.

A shard is a header of 256 little-endian int32 (magic 20240520, version 1, number of ids, the rest 0) and then the ids.
The file is 1024 + 2 * count bytes long, which is how a truncated download is told from a whole one.
Source: spec section 1.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from dataclasses import dataclass
from io import BufferedRandom
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

import numpy as np
import numpy.typing as npt

from bytejepa.data.vocabulary import BOS, BYTE_OFFSET, VOCABULARY_SIZE
from bytejepa.errors import DataError, file_errors_as
from bytejepa.files import flush_folder

SHARD_MAGIC = 20240520
SHARD_VERSION = 1
HEADER_BYTES = 1024
ID_BYTES = 2
MAX_IDS_PER_SHARD = 2**31 - 1
"""The count is an int32 in the header."""

Split = Literal["train", "val"]
SPLITS: tuple[Split, Split] = ("train", "val")

_BLOCK_IDS = 4_000_000
_LOOKALIKES = (
    (b"version https://git-lfs", "it is a git-lfs pointer, not the data: run `git lfs pull` in its folder"),
    (b"<", "it looks like a web page, perhaps an error page saved by a download: download it again"),
    (b"\x1f\x8b", "it is compressed with gzip: decompress it first"),
    (b"\xfd7zXZ", "it is compressed with xz: decompress it first"),
    (b"\x28\xb5\x2f\xfd", "it is compressed with zstd: decompress it first"),
    (b"PAR1", "it is a parquet file: convert it with `bytejepa prepare --kind parquet`"),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardRecord:
    """What is known of one finished shard, as the manifest and the journal state it."""

    name: str
    """File name, without a folder."""
    num_ids: int
    num_documents: int
    """Number of BOS ids: the documents that begin in this shard."""
    num_text_bytes: int
    """Number of ids that stand for a byte (id >= 4)."""
    sha256: str
    """Of the whole file, header included: what `sha256sum` prints."""


def shard_name(split: Split, index: int) -> str:
    """Return the file name of shard number `index` of a split."""
    return f"fineweb_{split}_{index:06d}.bin"


def shards_in(directory: Path, split: Split) -> list[Path]:
    """Return the shards of `split` in a folder, sorted by name; an empty list when there are none."""
    return sorted(path for path in Path(directory).glob(f"fineweb_{split}_*.bin") if path.is_file())


def find_shards(directory: Path, split: Split) -> list[Path]:
    """Return the shards of `split` ("train" or "val") in a folder, sorted by name: at least one.

    A bare folder without a manifest works too.

    Raises:
        DataError: the folder does not exist or holds no shard of this split.
    """
    directory = Path(directory)
    if split not in SPLITS:
        raise DataError(f"there is no split {split!r}: expected 'train' or 'val'")
    if not directory.is_dir():
        raise DataError(
            f"the data folder {directory} does not exist or is no folder",
            hint="name a folder of shards; `bytejepa prepare` makes one out of text, JSONL, parquet or sp1024 shards",
        )
    found = shards_in(directory, split)
    if not found:
        raise DataError(
            f"no shard of the {split} split in {directory}: expected files fineweb_{split}_*.bin",
            hint="`bytejepa prepare` makes shards of text; if it was interrupted there, run the same command again",
        )
    return found


def open_shard(path: Path) -> npt.NDArray[np.uint16]:
    """Return the ids of a shard, (num_ids,) uint16: read-only and memory-mapped, so that opening costs nothing.

    Checks the header and that the file has exactly the promised length; the ids themselves are not looked at
    (`check_ids` does).

    Raises:
        DataError: the file is missing, empty, truncated, too long, or no shard.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"shard {path} does not exist or is no file", hint="check the path")
    with file_errors_as(DataError, "read the shard", path):
        file_bytes = path.stat().st_size
        with path.open("rb") as file:
            header = file.read(HEADER_BYTES)
    num_ids = _check_header(path, header, file_bytes)
    with file_errors_as(DataError, "map the shard", path):
        mapped = np.memmap(path, dtype="<u2", mode="r", offset=HEADER_BYTES, shape=(num_ids,))
    return mapped


def _check_header(path: Path, header: bytes, file_bytes: int) -> int:
    """Return the number of ids that a header promises, after checking it against the length of the file."""
    if file_bytes == 0:
        raise DataError(
            f"shard {path} is empty (0 bytes)", hint="an interrupted download or a full disk? fetch or prepare it again"
        )
    for start, reason in _LOOKALIKES:
        if header.startswith(start):
            raise DataError(f"{path} is no shard: expected magic {SHARD_MAGIC}", hint=reason)
    if len(header) < HEADER_BYTES:
        raise DataError(
            f"shard {path} is truncated: expected a header of {HEADER_BYTES} bytes, got {len(header)} bytes",
            hint="an interrupted download? fetch or prepare it again",
        )
    magic, version, num_ids = (int(number) for number in np.frombuffer(header, dtype="<i4", count=3))
    if magic != SHARD_MAGIC:
        raise DataError(
            f"{path} is no shard: expected magic {SHARD_MAGIC}, got {magic}",
            hint="raw text becomes shards with `bytejepa prepare`",
        )
    if version != SHARD_VERSION:
        raise DataError(f"shard {path} has version {version}: expected {SHARD_VERSION}", hint="prepare it again")
    if num_ids < 1:
        raise DataError(f"shard {path} promises {num_ids} ids: expected at least 1", hint="prepare it again")
    expected_bytes = HEADER_BYTES + ID_BYTES * num_ids
    if file_bytes != expected_bytes:
        what = "truncated" if file_bytes < expected_bytes else "too long"
        raise DataError(
            f"shard {path} is {what}: {num_ids} ids need {expected_bytes} bytes, the file has {file_bytes}",
            hint="an interrupted download? fetch or prepare it again",
        )
    return num_ids


def check_ids(ids: npt.NDArray[np.uint16], path: Path) -> None:
    """Check that all `ids` of the shard at `path` are byte260 ids (below 260), in constant memory.

    Raises:
        DataError: names the file, the position and the first id that is too large.
    """
    for begin in range(0, len(ids), _BLOCK_IDS):
        block = ids[begin : begin + _BLOCK_IDS]
        if int(block.max()) < VOCABULARY_SIZE:
            continue
        position = int(np.argmax(block >= VOCABULARY_SIZE))
        raise DataError(
            f"shard {path} holds id {int(block[position])} at position {begin + position}: "
            f"byte260 ids are below {VOCABULARY_SIZE}",
            hint="a shard of sp1024 tokens? convert it with `bytejepa prepare --kind sp1024`",
        )


class ShardWriter:
    """Writes one shard in constant memory: a temporary file beside it, the header last, then fsync and rename.

    `finish` returns the record. Leaving the `with` block without it (an exception) removes the temporary file, so that
    `path` holds a whole shard or what it held before.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        # The process id keeps two processes that were started on the same folder out of each other's file.
        self._temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")
        self._num_ids = self._num_documents = self._num_text_bytes = 0
        self._file: BufferedRandom | None = None
        with file_errors_as(DataError, "write the shard", self.path):
            self._file = self._temporary.open("w+b")
            self._file.write(bytes(HEADER_BYTES))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.discard()

    @property
    def num_ids(self) -> int:
        """Number of ids written so far."""
        return self._num_ids

    def write(self, ids: npt.NDArray[np.uint16]) -> None:
        """Append ids, (num_ids,) uint16."""
        assert self._file is not None, "the shard is finished"
        if self._num_ids + len(ids) > MAX_IDS_PER_SHARD:
            raise DataError(f"shard {self.path} would hold more than {MAX_IDS_PER_SHARD} ids, the format's limit")
        with file_errors_as(DataError, "write the shard", self.path):
            self._file.write(np.ascontiguousarray(ids, dtype="<u2").data)
        self._num_ids += len(ids)
        self._num_documents += int(np.count_nonzero(ids == BOS))
        self._num_text_bytes += int(np.count_nonzero(ids >= BYTE_OFFSET))

    def finish(self) -> ShardRecord:
        """Return the record of the finished shard, which is now on the disk under its own name.

        Raises:
            DataError: no id was written, or the disk is full.
        """
        assert self._file is not None, "the shard is finished"
        if self._num_ids == 0:
            raise DataError(f"shard {self.path} would hold no ids: expected at least 1")
        header = np.zeros(HEADER_BYTES // 4, dtype="<i4")
        header[:3] = SHARD_MAGIC, SHARD_VERSION, self._num_ids
        with file_errors_as(DataError, "write the shard", self.path):
            self._file.seek(0)
            self._file.write(header.tobytes())
            self._file.flush()
            os.fsync(self._file.fileno())
            # The count stands before the payload and is known only now, so the file is read again for its digest:
            # from the page cache that is 0.035 s for 200 MB more than hashing on the way out.
            self._file.seek(0)
            sha256 = hashlib.file_digest(self._file, "sha256").hexdigest()
            self._file.close()
            self._file = None
            self._temporary.replace(self.path)
            flush_folder(self.path.parent)
        return ShardRecord(
            name=self.path.name,
            num_ids=self._num_ids,
            num_documents=self._num_documents,
            num_text_bytes=self._num_text_bytes,
            sha256=sha256,
        )

    def discard(self) -> None:
        """Remove what was written, unless the shard is finished."""
        if self._file is not None:
            with contextlib.suppress(OSError):  # closing flushes, which fails again on a full disk
                self._file.close()
            self._file = None
            self._temporary.unlink(missing_ok=True)


def write_shard(path: Path, ids: npt.NDArray[np.uint16]) -> ShardRecord:
    """Return the record of a shard written atomically from `ids`, (num_ids,) uint16.

    Raises:
        DataError: no ids, or the disk is full.
    """
    with ShardWriter(path) as writer:
        for begin in range(0, len(ids), _BLOCK_IDS):
            writer.write(ids[begin : begin + _BLOCK_IDS])
        return writer.finish()


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file in hexadecimal, in constant memory."""
    with file_errors_as(DataError, "read", path), Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
