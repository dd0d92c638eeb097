"""What work a preparation consists of: a pure function of the sources and the settings, never of the workers.

Source files become parts, the smallest pieces that can be read on their own: a whole file, a range of bytes of a big
plain file, a row group, a shard of tokens with the end of its last document in the next one. Parts that follow each
other are grouped into jobs of about one shard. Each job writes its own shards, so the output is the same whichever
process does which job and in whatever order.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bytejepa.data.blocks import Block, Segment, limited
from bytejepa.data.manifest import SourceFile
from bytejepa.data.parquet import open_parquet, parquet_text_bytes
from bytejepa.data.sentencepiece_table import load_table
from bytejepa.data.shards import ID_BYTES, Split, open_shard
from bytejepa.data.sources import (
    Kind,
    ReadSettings,
    is_compressed,
    kind_of_name,
    read_blocks,
)
from bytejepa.data.vocabulary import VOCABULARY_SIZE
from bytejepa.errors import DataError, file_errors_as

PLAN_VERSION = 1
"""Goes up when the same sources and settings begin to give other jobs."""
_TEXT_BYTES_PER_COMPRESSED_BYTE = 4
_TEXT_BYTES_PER_TOKEN = 2.5
_SPARE_PART = 50
"""A range ends with the document that runs over its target: 2 % are left for it, so that it does not begin a second shard."""
_SEARCH_BYTES = 1 << 20
_MAX_AMBIGUOUS_CUTS = 1000
_BLOCK_IDS = 4_000_000
_BYTE_SHARD_SAMPLE_IDS = 100_000
_SHARD_NAME = re.compile(r"fineweb_(train|val)_.*\.bin")


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """Some documents that can be read on their own."""

    segments: tuple[Segment, ...]
    expected_ids: int
    """About how many ids will come out."""
    num_documents: int | None
    """How many documents begin in it, where that is known without reading."""
    skip_documents: int = 0
    take_documents: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """Parts that one process turns into shards of their own."""

    index: int
    split: Split
    parts: tuple[Part, ...]

    @property
    def source_bytes(self) -> int:
        """The length of what is read, on the disk."""
        return sum(segment.source_bytes for part in self.parts for segment in part.segments)


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """A source file: where it is, and what the manifest says of it."""

    path: str
    file: SourceFile


def find_sources(sources: Sequence[str | Path], kind: Kind | None) -> list[Source]:
    """Return the source files: the given ones, and those inside the given folders, sorted by their path in it.

    Hidden files are left out. With an explicit kind other than text, a folder gives only the files named as such.

    Raises:
        DataError: a source does not exist, is neither file nor folder, comes twice, or there is none.
    """
    found: list[Source] = []
    seen: dict[tuple[int, int], str] = {}
    for given in sources:
        with file_errors_as(DataError, "read", given):
            inside = list(_files_in(Path(given), kind))
        for path, name in inside:
            with file_errors_as(DataError, "read", path):
                status = os.stat(path)  # noqa: PTH116 - a Path object for each of a million files is too much
            identity = (status.st_dev, status.st_ino)
            if identity in seen:
                raise DataError(f"source {path} is given twice (also as {seen[identity]})", hint="name it once")
            seen[identity] = path
            file = SourceFile(name=name, num_bytes=status.st_size, modified_ns=status.st_mtime_ns)
            found.append(Source(path=path, file=file))
    if not found:
        what = "source files" if kind is None else f"source files of kind {kind}"
        raise DataError(f"no {what} in {', '.join(map(str, sources)) or 'an empty list'}: expected at least one")
    return found


def _files_in(given: Path, kind: Kind | None) -> Iterator[tuple[str, str]]:
    """Yield (path, name) of a file, or of the files inside a folder."""
    if given.is_file():
        yield str(given), given.name
    elif given.is_dir():
        inside = []
        for folder, folders, names in os.walk(given):
            folders[:] = [name for name in folders if not name.startswith(".")]
            inside += [os.path.join(folder, name) for name in names if not name.startswith(".")]  # noqa: PTH118
        for path in sorted(inside, key=lambda path: Path(path).parts):
            if os.path.isfile(path) and (kind in (None, "text") or _is_named(path, kind)):  # noqa: PTH113
                yield path, os.path.relpath(path, given).replace(os.sep, "/")
    else:
        what = "is neither a file nor a folder" if given.exists() else "does not exist"
        raise DataError(f"source {given} {what}", hint="check the path")


def _is_named(path: str, kind: Kind | None) -> bool:
    try:
        return kind_of_name(path) == kind
    except DataError:  # an archive beside the data
        return False


def plan_jobs(
    sources: Sequence[Source],
    settings: ReadSettings,
    val_documents: int | None,
    shard_bytes: int,
    *,
    val_share: float | None = None,
) -> list[Job]:
    """Return the jobs, validation first: the first `val_documents` documents, in the order of the sources, or of every
    text file that is one document its last `val_share`, from the beginning of a line, or of a word where no line begins.

    Without either the split is that of the names fineweb_val_* and fineweb_train_* of token shards.

    Raises:
        DataError: a source cannot be read, or a split would be empty.
    """
    if val_share is not None:
        parts: dict[Split, list[Part]] = _parts_by_share(sources, val_share, shard_bytes)
    elif val_documents is None:
        by_split = _named_splits(sources, settings)
        parts = {split: list(_parts(by_split[split], settings, shard_bytes)) for split in by_split}
    else:
        val, train = _divided(_parts(sources, settings, shard_bytes), settings, val_documents)
        parts = {"val": val, "train": train}
    jobs: list[Job] = []
    for split, of_split in parts.items():
        for group in _grouped(of_split, shard_bytes):
            jobs.append(Job(index=len(jobs), split=split, parts=tuple(group)))
    return jobs


def _named_splits(sources: Sequence[Source], settings: ReadSettings) -> dict[Split, list[Source]]:
    """Return the sources by the split that their names tell."""
    hint = "say how many documents, from the first on, are validation: --val-documents (50000 in the challenge)"
    if settings.kind == "text" and settings.document_separator is None:
        hint += "; or which share of each text file, at its end: --val-share 0.1"
    by_split: dict[Split, list[Source]] = {"val": [], "train": []}
    for source in sources:
        match = _SHARD_NAME.fullmatch(Path(source.path).name)
        if settings.kind != "sp1024" or match is None:
            raise DataError(f"nothing says which documents are validation: {source.path} has no split", hint=hint)
        by_split["val" if match[1] == "val" else "train"].append(source)
    for split, of_split in by_split.items():
        if not of_split:
            raise DataError(f"the {split} split would be empty: no source is named fineweb_{split}_*.bin", hint=hint)
    return by_split


def _divided(parts: Iterable[Part], settings: ReadSettings, val_documents: int) -> tuple[list[Part], list[Part]]:
    """Return the parts of the first `val_documents` documents and those of the others."""
    val: list[Part] = []
    train: list[Part] = []
    num_seen = 0
    for part in parts:
        if train:
            train.append(part)
            continue
        wanted = val_documents - num_seen
        count = part.num_documents
        if count is None:
            count = _count_documents(part, settings, limit=wanted + 1)
        if count <= wanted:
            val.append(part)
            num_seen += count
        elif wanted == 0:
            train.append(part)
        else:
            val.append(dataclasses.replace(part, take_documents=wanted))
            train.append(dataclasses.replace(part, skip_documents=wanted))
    if not train:
        why = "a text file without --document-separator is one document, whose end --val-share 0.1 makes validation"
        if settings.document_separator is not None:
            why = "--document-separator, which may hold \\n, \\r and \\t, has to occur in the text"
        documents = "1 document" if num_seen == 1 else f"{num_seen} documents"
        raise DataError(
            f"the training split would be empty: the sources hold {documents}, {val_documents} are wanted for validation",
            hint="give a smaller --val-documents" + (f"; {why}" if settings.kind == "text" else ""),
        )
    return val, train


def _count_documents(part: Part, settings: ReadSettings, limit: int) -> int:
    """Return how many documents a part holds, or some number from `limit` on if it holds at least as many."""
    count = 0
    if settings.kind == "sp1024":
        assert settings.tokenizer is not None, "checked by prepare"
        bos = load_table(settings.tokenizer).bos
        for segment in part.segments:
            ids = open_shard(Path(segment.path))[segment.begin : segment.end]
            count += int(not segment.continues and len(ids) > 0 and ids[0] != bos)
            for begin in range(0, len(ids), _BLOCK_IDS):
                count += int(np.count_nonzero(ids[begin : begin + _BLOCK_IDS] == bos))
                if count >= limit:
                    return count
        return count
    for block in read_blocks(part.segments, settings):
        count += len(block.starts)
        if count >= limit:
            break
    return count


def _grouped(parts: Iterable[Part], shard_bytes: int) -> Iterator[list[Part]]:
    """Yield groups of parts that follow each other and are expected to fill at most one shard."""
    group: list[Part] = []
    expected = 0
    for part in parts:
        if group and expected + part.expected_ids > shard_bytes:
            yield group
            group, expected = [], 0
        group.append(part)
        expected += part.expected_ids
    if group:
        yield group


def _parts(sources: Sequence[Source], settings: ReadSettings, shard_bytes: int) -> Iterator[Part]:
    """Yield the parts of all sources in order."""
    if settings.kind == "sp1024":
        yield from _token_parts(sources, settings)
        return
    for source in sources:
        size = source.file.num_bytes
        if settings.kind == "parquet":
            yield from _parquet_parts(source.path)
        elif is_compressed(source.path):
            segment = Segment(path=source.path, source_bytes=size)
            is_one = settings.kind == "text" and settings.document_separator is None
            expected = size * _TEXT_BYTES_PER_COMPRESSED_BYTE
            yield Part(segments=(segment,), expected_ids=expected, num_documents=1 if is_one else None)
        elif settings.kind == "text" and settings.document_separator is None:
            yield from _one_document_parts(source.path, 0, size, shard_bytes)
        else:
            separator = b"\n" if settings.document_separator is None else settings.document_separator
            begin = 0
            while begin < size or begin == 0:
                end = _cut_after(source.path, size, begin + shard_bytes - shard_bytes // _SPARE_PART, separator)
                segment = Segment(path=source.path, begin=begin, end=end, source_bytes=end - begin)
                yield Part(segments=(segment,), expected_ids=end - begin, num_documents=None)
                begin = max(end, 1)


def _parts_by_share(sources: Sequence[Source], val_share: float, shard_bytes: int) -> dict[Split, list[Part]]:
    """Return the parts of each split where each file is two documents: its end is validation.

    A file in which neither line nor word begins where it would be cut, such as an empty one, is for training as a whole.
    Raises: DataError for a compressed file, and if no file can be cut.
    """
    parts: dict[Split, list[Part]] = {"val": [], "train": []}
    for source in sources:
        size = source.file.num_bytes
        if is_compressed(source.path):
            raise DataError(
                f"{source.path} is compressed: --val-share cuts plain files only",
                hint="unpack it, or give --document-separator and --val-documents",
            )
        target = max(1, round(size * (1 - val_share)))
        cuts = (_cut_after(source.path, size, target, separator) for separator in (b"\n", b" "))
        cut = next((place for place in cuts if place < size), None)
        parts["train"] += _one_document_parts(source.path, 0, size if cut is None else cut, shard_bytes)
        if cut is not None:
            parts["val"] += _one_document_parts(source.path, cut, size, shard_bytes)
    if not parts["val"]:
        which = sources[0].path if len(sources) == 1 else f"each of {len(sources)} files, {sources[0].path} the first,"
        raise DataError(
            f"{which} has no line or word that begins in its last {val_share:.2%}",
            hint="give a larger --val-share, or --document-separator and --val-documents",
        )
    return parts


def _one_document_parts(path: str, begin: int, end: int, shard_bytes: int) -> Iterator[Part]:
    """Yield ranges of one document of which each fills a shard; BOS is an id too, so the first is a byte shorter."""
    place, starts = begin, True
    while place < end or starts:
        cut = min(end, place + shard_bytes - starts)
        segment = Segment(path=path, begin=place, end=cut, continues=not starts, source_bytes=cut - place)
        yield Part(segments=(segment,), expected_ids=cut - place + starts, num_documents=int(starts))
        place, starts = cut, False


def _cut_after(path: str, size: int, target: int, separator: bytes) -> int:
    """Return where the first separator that ends at or after byte `target` ends, or the file's size.

    A separator that overlaps another one is no place to cut: which of the two counts depends on everything before it.
    """
    length = len(separator)
    num_ambiguous = 0
    with file_errors_as(DataError, "read", path), Path(path).open("rb") as file:
        begin = max(target - 2 * length, 0)
        while target < size:
            file.seek(begin)
            data = file.read(_SEARCH_BYTES + 2 * length)
            place = data.find(separator, max(target - length - begin, 0))
            while place >= 0:
                if data.find(separator, max(place - length + 1, 0)) == place:
                    return begin + place + length
                num_ambiguous += 1
                if num_ambiguous > _MAX_AMBIGUOUS_CUTS:
                    return size
                place = data.find(separator, place + 1)
            if begin + len(data) >= size:
                break
            # Enough is read twice that a separator on the border, and one that overlaps it, lie in one window.
            begin += len(data) - 2 * length
            target = begin + 2 * length
    return size


def _parquet_parts(path: str) -> Iterator[Part]:
    """Yield the row groups of a file."""
    with open_parquet(path) as file:
        for group in range(file.num_row_groups):
            packed_bytes, text_bytes = parquet_text_bytes(file, group)
            num_rows = file.metadata.row_group(group).num_rows
            segment = Segment(path=path, begin=group, end=group + 1, source_bytes=packed_bytes)
            yield Part(segments=(segment,), expected_ids=text_bytes + num_rows, num_documents=num_rows)


def _token_parts(sources: Sequence[Source], settings: ReadSettings) -> Iterator[Part]:
    """Yield, for each shard of tokens, its own documents, the last one with its end in the shards that follow."""
    assert settings.tokenizer is not None, "checked by prepare"
    bos = load_table(settings.tokenizer).bos
    shards = [(source.path, *_first_document(source.path, bos)) for source in sources]
    continues = [index > 0 and _follows(shards[index - 1][0], shards[index][0]) for index in range(len(shards))]
    for index, (path, first, num_ids) in enumerate(shards):
        begin = first if continues[index] else 0
        if begin == num_ids:
            continue
        segments = [Segment(path=path, begin=begin, end=num_ids, source_bytes=ID_BYTES * (num_ids - begin))]
        for later in range(index + 1, len(shards)):
            if not continues[later]:
                break
            later_path, end, later_num_ids = shards[later]
            segments.append(Segment(path=later_path, end=end, continues=True, source_bytes=ID_BYTES * end))
            if end < later_num_ids:
                break
        num_ids = sum((segment.end or 0) - segment.begin for segment in segments)
        yield Part(segments=tuple(segments), expected_ids=int(num_ids * _TEXT_BYTES_PER_TOKEN), num_documents=None)


def _first_document(path: str, bos: int) -> tuple[int, int]:
    """Return the position of a shard's first BOS (the number of ids if there is none) and the number of ids."""
    ids = open_shard(Path(path))
    if len(ids) >= _BYTE_SHARD_SAMPLE_IDS and int(ids[:_BYTE_SHARD_SAMPLE_IDS].max()) < VOCABULARY_SIZE:
        raise DataError(
            f"{path} holds byte260 ids already: its first {_BYTE_SHARD_SAMPLE_IDS} ids are below {VOCABULARY_SIZE}",
            hint="train on it as it is",
        )
    for begin in range(0, len(ids), _BLOCK_IDS):
        found = np.flatnonzero(ids[begin : begin + _BLOCK_IDS] == bos)
        if len(found):
            return begin + int(found[0]), len(ids)
    return len(ids), len(ids)


def _follows(earlier: str, later: str) -> bool:
    """Return whether a document may run on from one shard into the other: not where the numbering has a gap."""
    numbers = [re.search(r"(\d+)\.bin$", path) for path in (earlier, later)]
    if numbers[0] is None or numbers[1] is None:
        return True
    return int(numbers[1][1]) == int(numbers[0][1]) + 1


def part_blocks(part: Part, settings: ReadSettings) -> Iterator[Block]:
    """Yield the blocks of a part."""
    blocks = read_blocks(part.segments, settings)
    if part.skip_documents or part.take_documents is not None:
        return limited(blocks, part.skip_documents, part.take_documents)
    return blocks
