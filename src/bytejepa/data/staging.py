"""The staging folder of a preparation: finished shards wait here, with a journal of them, until all are there.

It is the folder `.prepare` inside the output folder. Shards get their own names only at the end, when it is known how
many each job made; until then the output folder holds none, so that nobody trains on half of the data by accident.

    plan.json       what the shards are made of: sources and settings
    journal.jsonl   a line for each finished shard, with its digest, and for each finished job
    job_*.bin       finished shards
    finish.json     written once everything is done: the final names; from then on only files are renamed
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from bytejepa.data.manifest import (
    MANIFEST_NAME,
    Manifest,
    Settings,
    SourceListing,
    sources_from_json,
    split_record,
    write_manifest,
)
from bytejepa.data.plan import Job
from bytejepa.data.shards import SPLITS, ShardRecord, Split, file_sha256, shard_name
from bytejepa.errors import DataError, file_errors_as
from bytejepa.files import flush_folder, locked, write_atomically

STAGING_NAME = ".prepare"
_PLAN = "plan.json"
_JOURNAL = "journal.jsonl"
_FINISH = "finish.json"
_LOCK = "lock"


@dataclass(frozen=True, kw_only=True, slots=True)
class Identity:
    """What decides the output: two preparations with the same identity give the same shards."""

    kind: str
    settings: Settings
    sources: SourceListing

    def differences(self, other: Identity) -> list[str]:
        """Return in what `other`, the earlier one, differs from this one; an empty list when in nothing."""
        found = []
        if self.kind != other.kind:
            found.append(f"the kind is {self.kind}, it was {other.kind}")
        for key in sorted(self.settings.keys() | other.settings.keys()):
            now, before = self.settings.get(key), other.settings.get(key)
            if now != before:
                found.append(f"{key} is {now!r}, it was {before!r}")
        if self.sources != other.sources:
            found.append(_changed_source(self.sources, other.sources))
        return found

    def to_json(self) -> bytes:
        """Return the identity as it stands in `plan.json`."""
        return json.dumps(asdict(self), indent=2).encode("ascii") + b"\n"


def _identity_from(path: Path) -> Identity:
    """Return the identity that `to_json` wrote."""
    try:
        content = json.loads(path.read_bytes())
        sources = sources_from_json(content["sources"])
        return Identity(kind=content["kind"], settings=content["settings"], sources=sources)
    except (ValueError, KeyError, TypeError) as problem:
        raise DataError(f"{path} is damaged: {problem!r}", hint="start anew with --force") from problem


def _changed_source(now: SourceListing, before: SourceListing) -> str:
    """Return the first difference between two listings of sources."""
    for file, earlier in zip(now.files, before.files, strict=False):
        if file.name != earlier.name:
            return f"source {file.name} is where {earlier.name} was"
        if file.num_bytes != earlier.num_bytes:
            return f"source {file.name} has {file.num_bytes} bytes, it had {earlier.num_bytes}"
        if file != earlier:
            return f"source {file.name} was changed since (another time of last change)"
    if now.num_files != before.num_files:
        return f"there are {now.num_files} source files, there were {before.num_files}"
    return "one of the source files was changed since"


@dataclass(kw_only=True, slots=True)
class Progress:
    """What the journal says is finished."""

    shards: dict[int, list[ShardRecord]] = field(default_factory=dict)
    """By job, in order."""
    done: set[int] = field(default_factory=set)
    """Jobs of which no shard is missing."""


def staged_name(job: int, index: int) -> str:
    """Return the file name of a job's shard number `index` while it waits."""
    return f"job_{job:06d}_{index:06d}.bin"


def staging_lock(out: Path) -> AbstractContextManager[None]:
    """Return the lock of the staging folder in `out`. Raises, when entered: DataError if another process holds it."""
    return locked(out / STAGING_NAME / _LOCK, DataError, f"is preparing {out}")


class Staging:
    """The staging folder of one output folder, held by one process at a time."""

    def __init__(self, out: Path, identity: Identity) -> None:
        self.out = out
        self.folder = out / STAGING_NAME
        self.identity = identity
        self.progress = Progress()

    @contextmanager
    def held(self) -> Iterator[Staging]:
        """Hold the folder, made or found: finished shards of an earlier run are checked and taken over.

        Raises:
            DataError: another process holds it, or what waits there was made with other settings or sources.
        """
        with staging_lock(self.out):
            self._take_over()
            try:
                yield self
            finally:
                self.remove_temporaries()

    def _take_over(self) -> None:
        plan = self.folder / _PLAN
        progress = self._journal()
        if plan.exists() and (self.is_finishing or progress.shards):
            with file_errors_as(DataError, "read", plan):
                earlier = _identity_from(plan)
            differences = self.identity.differences(earlier)
            if differences:
                can_be_finished = self.identity.sources == earlier.sources
                raise DataError(
                    f"{self.out} holds an unfinished preparation of something else: {'; '.join(differences)}",
                    hint=("repeat the earlier command to finish it, or " if can_be_finished else "")
                    + "start anew with --force",
                )
            self.progress = progress if self.is_finishing else self._whole(progress)
        else:  # an earlier plan of which no shard was finished binds nobody
            with file_errors_as(DataError, "write", plan):
                (self.folder / _JOURNAL).unlink(missing_ok=True)
                write_atomically(plan, self.identity.to_json())
        self.remove_temporaries()

    @property
    def is_finishing(self) -> bool:
        """Whether all shards are made and only the renaming is left."""
        return (self.folder / _FINISH).exists()

    def remove_temporaries(self) -> None:
        """Remove what killed writers left behind, and shards that the journal does not know."""
        if not self.folder.exists():  # published
            return
        known = {record.name for records in self.progress.shards.values() for record in records}
        for path in self.folder.iterdir():
            is_unknown = path.suffix == ".bin" and path.name not in known and not self.is_finishing
            if path.suffix == ".tmp" or is_unknown:
                path.unlink(missing_ok=True)

    def _journal(self) -> Progress:
        """Return what the journal says."""
        path = self.folder / _JOURNAL
        progress = Progress()
        lines: list[str] = []
        if path.exists():
            with file_errors_as(DataError, "read", path):
                lines = path.read_text(encoding="ascii", errors="replace").splitlines()
        for line in lines:
            try:
                entry = json.loads(line)
                job = int(entry["job"])
                record = ShardRecord(**entry["shard"]) if "shard" in entry else None
            except (ValueError, TypeError, KeyError):
                break  # the line at which the power went
            if record is None:
                progress.done.add(job)
            else:
                progress.shards.setdefault(job, []).append(record)
        return progress

    def _whole(self, progress: Progress) -> Progress:
        """Return what is finished and whole; a job's shards after a damaged one do not count, nor is it done then."""
        for job, records in progress.shards.items():
            num_whole = next((index for index, record in enumerate(records) if not self._is_whole(record)), None)
            if num_whole is not None:
                del records[num_whole:]
                progress.done.discard(job)
        # Written again as it is now: a torn last line must not run into the next one.
        path = self.folder / _JOURNAL
        with file_errors_as(DataError, "write", path):
            write_atomically(path, "".join(_journal_lines(progress)).encode("ascii"))
        return progress

    def _is_whole(self, record: ShardRecord) -> bool:
        path = self.folder / record.name
        return path.is_file() and file_sha256(path) == record.sha256

    def add_shard(self, job: int, record: ShardRecord) -> None:
        """Note a finished shard."""
        self.progress.shards.setdefault(job, []).append(record)
        self._append({"job": job, "shard": asdict(record)})

    def add_done(self, job: int) -> None:
        """Note a finished job."""
        self.progress.done.add(job)
        self._append({"job": job})

    def _append(self, entry: dict[str, object]) -> None:
        path = self.folder / _JOURNAL
        with file_errors_as(DataError, "write", path), path.open("ab") as file:
            file.write(json.dumps(entry).encode("ascii") + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def finish(self, jobs: list[Job]) -> None:
        """Write down the final names and the manifest; `publish` does the rest."""
        assert self.progress.done == {job.index for job in jobs}, "a job was forgotten"
        names: list[tuple[str, str]] = []
        files: dict[Split, list[ShardRecord]] = {split: [] for split in SPLITS}
        for job in jobs:
            for record in self.progress.shards.get(job.index, []):
                final = shard_name(job.split, len(files[job.split]))
                names.append((record.name, final))
                files[job.split].append(replace(record, name=final))
        for split in SPLITS:
            if sum(file.num_text_bytes for file in files[split]) == 0:
                # nothing can go on from here, so nothing that asks for it is left
                shutil.rmtree(self.folder, ignore_errors=True)
                with contextlib.suppress(OSError):
                    self.out.rmdir()
                raise DataError(
                    f"the {split} split would hold no text", hint="check the first documents and --val-documents"
                )
        manifest = Manifest(
            kind=self.identity.kind,
            sources=self.identity.sources,
            settings=self.identity.settings,
            splits={split: split_record(files[split]) for split in ("train", "val")},
        )
        write_manifest(self.folder, manifest)
        with file_errors_as(DataError, "write", self.folder):
            write_atomically(self.folder / _FINISH, json.dumps(names).encode("ascii"))

    def publish(self) -> None:
        """Give the shards their names, then the folder its manifest. Stopped anywhere, it can be done again."""
        with file_errors_as(DataError, "move the finished shards into", self.out):
            for staged, final in json.loads((self.folder / _FINISH).read_bytes()):
                if (self.folder / staged).exists():
                    (self.folder / staged).replace(self.out / final)
                elif not (self.out / final).exists():
                    raise DataError(
                        f"the finished shard {self.folder / staged} is gone", hint="start anew with --force"
                    )
            flush_folder(self.out)
            manifest = self.folder / MANIFEST_NAME
            if manifest.exists():
                manifest.replace(self.out / manifest.name)
            flush_folder(self.out)
            shutil.rmtree(self.folder)

    def final_names(self) -> set[str]:
        """Return the names that an interrupted `publish` may have given already."""
        path = self.folder / _FINISH
        return {final for _, final in json.loads(path.read_bytes())} if path.exists() else set()


def _journal_lines(progress: Progress) -> Iterator[str]:
    for job, records in progress.shards.items():
        for record in records:
            yield json.dumps({"job": job, "shard": asdict(record)}) + "\n"
    for job in sorted(progress.done):
        yield json.dumps({"job": job}) + "\n"
