"""The manifest of a prepared folder: what its shards were made of, how, and what they hold; and the check of a folder.

Sources are recorded by name, length and time of last change, not by a digest: a run reads byte ranges of a source in
several processes and in any order, so a digest would need a second pass over all input, while the shards carry digests
of their own and say exactly what was trained on. Length and time answer the one question asked of a source: is it still
the file that the finished part was made of?
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bytejepa.data.shards import (
    SPLITS,
    ShardRecord,
    Split,
    check_ids,
    file_sha256,
    open_shard,
    shards_in,
)
from bytejepa.errors import DataError, file_errors_as
from bytejepa.files import write_atomically

MANIFEST_NAME = "manifest.json"
MANIFEST_FORMAT = "bytejepa-data"
MANIFEST_VERSION = 1
MAX_LISTED_SOURCES = 1000
"""More source files than this are covered by the listing's digest only: a million small files must not make a manifest
of 100 MB."""

Settings = dict[str, str | int | float | None]


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceFile:
    """One source file, as far as telling a changed one from an unchanged one goes."""

    name: str
    """Relative to the folder that was given, or the file's own name: a copy elsewhere is the same source."""
    num_bytes: int
    modified_ns: int
    """Time of last change in ns since 1970."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceListing:
    """All source files of a preparation, in the order in which they were read."""

    num_files: int
    num_bytes: int
    sha256: str
    """Of the whole listing (names, lengths and times), not of the files' content."""
    files: tuple[SourceFile, ...]
    """The first `MAX_LISTED_SOURCES` of them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SplitRecord:
    """What one split holds."""

    num_documents: int
    num_text_bytes: int
    num_ids: int
    files: tuple[ShardRecord, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """Everything that `manifest.json` states."""

    kind: str
    sources: SourceListing
    settings: Settings
    splits: dict[str, SplitRecord]


@dataclass(frozen=True, kw_only=True, slots=True)
class VerifyResult:
    """The outcome of checking a folder of shards."""

    directory: Path
    has_manifest: bool
    """Without a manifest only the format and the ids were checked: nothing says what the files should hold."""
    num_files: int
    num_ids: int
    problems: tuple[str, ...]
    """One line each; empty when all is well."""

    @property
    def is_good(self) -> bool:
        """Whether no problem was found."""
        return not self.problems


def list_sources(files: list[SourceFile]) -> SourceListing:
    """Return the listing of `files`, keeping their order."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(json.dumps([file.name, file.num_bytes, file.modified_ns]).encode("ascii") + b"\n")
    return SourceListing(
        num_files=len(files),
        num_bytes=sum(file.num_bytes for file in files),
        sha256=digest.hexdigest(),
        files=tuple(files[:MAX_LISTED_SOURCES]),
    )


def split_record(files: list[ShardRecord]) -> SplitRecord:
    """Return the record of a split that consists of `files`."""
    return SplitRecord(
        num_documents=sum(file.num_documents for file in files),
        num_text_bytes=sum(file.num_text_bytes for file in files),
        num_ids=sum(file.num_ids for file in files),
        files=tuple(files),
    )


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write `manifest.json` into `directory`, atomically."""
    content = {"format": MANIFEST_FORMAT, "format_version": MANIFEST_VERSION, **asdict(manifest)}
    path = Path(directory) / MANIFEST_NAME
    with file_errors_as(DataError, "write", path):
        write_atomically(path, json.dumps(content, indent=2).encode("ascii") + b"\n")


def load_manifest(directory: Path) -> Manifest:
    """Return the manifest of a prepared folder.

    Raises:
        DataError: it is missing, unreadable, of another version or not complete.
    """
    path = Path(directory) / MANIFEST_NAME
    if not path.is_file():
        raise DataError(f"no {MANIFEST_NAME} in {directory}", hint="`bytejepa prepare` writes one when it is done")
    with file_errors_as(DataError, "read", path):
        raw = path.read_bytes()
    try:
        content = json.loads(raw)
        found = (content.get("format"), content.get("format_version"))
    except (ValueError, RecursionError, AttributeError) as problem:
        raise DataError(f"{path} is no JSON object: {problem}", hint="prepare the data again") from problem
    if found != (MANIFEST_FORMAT, MANIFEST_VERSION):
        raise DataError(
            f"{path} has format {found[0]!r} version {found[1]!r}: expected {MANIFEST_FORMAT!r} {MANIFEST_VERSION}",
            hint="prepare the data again with this version, or remove a file that is no manifest of it",
        )
    try:
        return _manifest_from_json(content)
    except (KeyError, TypeError, AttributeError) as problem:
        raise DataError(f"{path} is not complete: {problem!r}", hint="prepare the data again") from problem


def has_foreign_manifest(directory: Path) -> bool:
    """Return whether a folder's `manifest.json` is an object that says nothing of shards; a damaged one may be ours."""
    try:
        content = json.loads((directory / MANIFEST_NAME).read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(content, dict) and content.get("format") != MANIFEST_FORMAT


def _manifest_from_json(content: dict[str, Any]) -> Manifest:
    return Manifest(
        kind=content["kind"],
        sources=sources_from_json(content["sources"]),
        settings=dict(content["settings"]),
        splits={
            split: SplitRecord(
                num_documents=record["num_documents"],
                num_text_bytes=record["num_text_bytes"],
                num_ids=record["num_ids"],
                files=tuple(ShardRecord(**file) for file in record["files"]),
            )
            for split, record in content["splits"].items()
        },
    )


def sources_from_json(content: dict[str, Any]) -> SourceListing:
    """Return a listing from its JSON. Raises: KeyError, TypeError for content that is none."""
    return SourceListing(
        num_files=content["num_files"],
        num_bytes=content["num_bytes"],
        sha256=content["sha256"],
        files=tuple(SourceFile(**file) for file in content["files"]),
    )


def verify(directory: Path) -> VerifyResult:
    """Return what is wrong with a folder of shards, reading every byte of it in constant memory.

    With a manifest: its files are there, no others are, and each has the promised count, digest and ids below 260.
    A bare folder is checked for format and ids only; `has_manifest` says so.

    Raises:
        DataError: there is no such folder, no shard in it, or its manifest cannot be read.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise DataError(f"the data folder {directory} does not exist or is no folder", hint="check the path")
    found: dict[Split, list[Path]] = {split: shards_in(directory, split) for split in SPLITS}
    names = {path.name for paths in found.values() for path in paths}
    has_manifest = (directory / MANIFEST_NAME).is_file()
    if not names and not has_manifest:
        raise DataError(f"no shards in {directory}: expected files fineweb_train_*.bin and fineweb_val_*.bin")
    problems: list[str] = []
    promised: dict[str, ShardRecord] = {}
    if has_manifest:
        manifest = load_manifest(directory)
        for split, record in manifest.splits.items():
            promised.update((file.name, file) for file in record.files)
            if split_record(list(record.files)) != record:
                problems.append(f"{MANIFEST_NAME}: the sums of the {split} split are not those of its files")
        problems += [f"{name} is missing" for name in promised if name not in names]
        problems += [f"{name} is not in the manifest" for name in sorted(names) if name not in promised]
    num_ids = 0
    for name in sorted(names):
        try:
            num_ids += _verify_shard(directory / name, promised.get(name))
        except DataError as problem:
            problems.append(problem.message)
    return VerifyResult(
        directory=directory,
        has_manifest=has_manifest,
        num_files=len(names),
        num_ids=num_ids,
        problems=tuple(problems),
    )


def check_split(directory: Path, split: Split, num_ids: dict[str, int], *, digests: bool = False) -> None:
    """Check that the shards of a split, {file name: number of ids}, are those that the folder's manifest promises.

    Names and lengths cost nothing; `digests` reads every byte. A folder without a manifest promises nothing.

    Raises:
        DataError: a shard is missing, was added or changed, or the manifest cannot be read.
    """
    if not (directory / MANIFEST_NAME).is_file():
        return
    record = load_manifest(directory).splits.get(split)
    promised = {} if record is None else {file.name: file for file in record.files}
    hint = f"copy or prepare the data again, or remove {MANIFEST_NAME} to take the shards as they are"
    for name in sorted(promised.keys() ^ num_ids.keys()):
        what = "is missing" if name in promised else "is not in the manifest"
        raise DataError(f"{directory} is not what its manifest says: {name} {what}", hint=hint)
    for name, count in num_ids.items():
        path = directory / name
        if count != promised[name].num_ids:
            raise DataError(f"shard {path} holds {count} ids: the manifest says {promised[name].num_ids}", hint=hint)
        if digests and file_sha256(path) != promised[name].sha256:
            raise DataError(f"shard {path} was changed since the manifest was made", hint=hint)


def _verify_shard(path: Path, promised: ShardRecord | None) -> int:
    """Return the number of ids of a shard that is well-formed and what was promised."""
    ids = open_shard(path)
    check_ids(ids, path)
    if promised is not None:
        if len(ids) != promised.num_ids:
            raise DataError(f"shard {path} holds {len(ids)} ids: the manifest says {promised.num_ids}")
        sha256 = file_sha256(path)
        if sha256 != promised.sha256:
            raise DataError(
                f"shard {path} has sha256 {sha256[:16]}...: the manifest says {promised.sha256[:16]}...",
                hint="the file was changed after it was made; prepare the data again",
            )
    return len(ids)
