"""Shards out of text, JSON Lines, parquet or shards of tokens: `prepare`, the whole way from sources to a folder.

BOS before each document, no EOS; the first documents are validation. The output is the same, byte for byte, for any
number of workers, and for a run that was killed and started again as for one that was not.
"""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bytejepa.data.manifest import MANIFEST_NAME, Manifest, Settings, has_foreign_manifest, list_sources, load_manifest
from bytejepa.data.plan import PLAN_VERSION, Job, Source, find_sources, plan_jobs
from bytejepa.data.sentencepiece_table import load_table
from bytejepa.data.shards import HEADER_BYTES, ID_BYTES, MAX_IDS_PER_SHARD, SPLITS, shards_in
from bytejepa.data.sources import KINDS, Kind, ReadSettings, guess_kind
from bytejepa.data.staging import STAGING_NAME, Identity, Staging, staging_lock
from bytejepa.data.workers import JobSettings, Report, Task, do_jobs
from bytejepa.errors import ConfigError, DataError, file_errors_as
from bytejepa.processors import num_usable_processors

SHARD_BYTES = 100_000_000
"""Ids in a full shard, as in the challenge's exporter (spec, shard format)."""
_MIN_SHARD_BYTES = 16

ProgressCallback = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class PrepareResult:
    """What `prepare` did."""

    directory: Path
    manifest: Manifest
    is_new: bool
    """False when the folder was finished already, with the same sources and settings: nothing was done then."""
    num_shards_kept: int
    """Shards that an earlier, interrupted run had finished."""
    num_workers: int


def prepare(
    sources: Sequence[str | Path],
    out: str | Path,
    *,
    kind: Kind | None = None,
    tokenizer: str | Path | None = None,
    val_documents: int | None = None,
    val_share: float | None = None,
    shard_bytes: int = SHARD_BYTES,
    workers: int | None = None,
    document_separator: str | None = None,
    force: bool = False,
    progress: ProgressCallback | None = None,
) -> PrepareResult:
    """Return what was made of `sources` (files, or folders of files) in the folder `out`.

    The first `val_documents` documents, in the order of the sources, are the validation split, or of every text file that
    is one document its last `val_share`, from the beginning of a line or word; neither: the split of shards of tokens that
    are named fineweb_val_* and fineweb_train_* is kept. A shard holds at most `shard_bytes` ids, each a byte of text or a
    BOS. `workers` None is one process for each CPU. `progress` gets (done, total) bytes of the sources. `force`
    throws away what an earlier preparation left in `out`; foreign files are left alone.

    Interrupted in whatever way, the same call goes on where it was; finished shards are not made again. Finished, the
    same call does nothing.

    Raises:
        DataError: sources that cannot be read, are empty or of two kinds; a split that would be empty; `out` holds
            something else, or an unfinished preparation with other settings or sources; the disk is full.
        ConfigError: a setting out of its range, or one that the kind of the sources does not have or lacks.
    """
    out = Path(out)
    settings, found = _checked(sources, kind, tokenizer, document_separator)
    _refuse_output_inside_source(out, sources)
    _check_numbers(val_documents, shard_bytes, workers)
    _check_share(val_share, val_documents, settings)
    identity = Identity(
        kind=settings.kind,
        settings=_identity_settings(settings, val_documents, val_share, shard_bytes),
        sources=list_sources([source.file for source in found]),
    )
    staging = Staging(out, identity)
    # Planned before anything is written or thrown away: most mistakes show here, and leave no folder behind.
    make_plan = functools.partial(plan_jobs, found, settings, val_documents, shard_bytes, val_share=val_share)
    if force:
        jobs = make_plan()
        _clear(out, found)
    else:
        finished = _finished(out, identity)
        if finished is not None:
            return _nothing_to_do(out, finished)
        _refuse_foreign_files(staging)
        jobs = [] if staging.is_finishing else make_plan()
    common = JobSettings(folder=staging.folder, settings=settings, shard_bytes=shard_bytes)
    with staging.held():
        finished = None if force else _finished_meanwhile(staging)
        if finished is not None:
            return _nothing_to_do(out, finished)
        return _made(jobs, staging, common, workers, found, progress)


def _check_numbers(val_documents: int | None, shard_bytes: int, workers: int | None) -> None:
    """Raise a ConfigError for a number out of its range."""
    if val_documents is not None and val_documents < 1:
        raise ConfigError(f"--val-documents is {val_documents}: expected at least 1")
    if not _MIN_SHARD_BYTES <= shard_bytes <= MAX_IDS_PER_SHARD:
        raise ConfigError(f"--shard-bytes is {shard_bytes}: expected {_MIN_SHARD_BYTES} to {MAX_IDS_PER_SHARD}")
    if workers is not None and workers < 1:
        raise ConfigError(f"--workers is {workers}: expected at least 1")


def _check_share(val_share: float | None, val_documents: int | None, settings: ReadSettings) -> None:
    """Raise a ConfigError for a share that cannot be, or where a file is not one document."""
    if val_share is None:
        return
    if not 0 < val_share < 1:
        raise ConfigError(f"--val-share is {val_share:g}: expected more than 0 and less than 1")
    if val_documents is not None:
        raise ConfigError("--val-share and --val-documents both say what is validation", hint="give one of them")
    if settings.kind != "text" or settings.document_separator is not None:
        what = settings.kind if settings.kind != "text" else "text of many documents"
        raise ConfigError(
            f"--val-share is for text files that are one document each, these sources are {what}",
            hint="use --val-documents",
        )


def _checked(
    sources: Sequence[str | Path], kind: Kind | None, tokenizer: str | Path | None, separator: str | None
) -> tuple[ReadSettings, list[Source]]:
    """Return how to read the sources, and the source files."""
    if kind is not None and kind not in KINDS:
        raise ConfigError(f"there is no kind {kind!r} of sources: expected one of {', '.join(KINDS)}")
    found = find_sources(sources, kind)
    if kind is None:
        kind = guess_kind([source.path for source in found])
    if separator is not None and kind != "text":
        raise ConfigError(f"--document-separator is for plain text, these sources are {kind}", hint="leave it out")
    if separator == "":
        raise ConfigError("--document-separator is empty: expected at least one character", hint="leave it out")
    if kind == "sp1024" and tokenizer is None:
        raise ConfigError(
            "shards of tokens need the model that made them: no --tokenizer given",
            hint="for the challenge's sp1024 shards it is fineweb_1024_bpe.model",
        )
    if kind != "sp1024" and tokenizer is not None:
        raise ConfigError(f"--tokenizer is for shards of tokens, these sources are {kind}", hint="leave it out")
    if tokenizer is not None:
        load_table(tokenizer)  # fails here, once, rather than in each worker
    settings = ReadSettings(
        kind=kind,
        document_separator=None if separator is None else separator.encode("utf-8", "surrogateescape"),
        tokenizer=None if tokenizer is None else str(tokenizer),
    )
    return settings, found


def _identity_settings(
    settings: ReadSettings, val_documents: int | None, val_share: float | None, shard_bytes: int
) -> Settings:
    """Return the settings that decide the output, under their names on the command line."""
    separator, tokenizer = settings.document_separator, settings.tokenizer
    return {
        "document_separator": None if separator is None else separator.decode("utf-8", "backslashreplace"),
        "plan_version": PLAN_VERSION,
        "shard_bytes": shard_bytes,
        "tokenizer_sha256": None if tokenizer is None else hashlib.sha256(Path(tokenizer).read_bytes()).hexdigest(),
        "val_documents": val_documents,
        **({} if val_share is None else {"val_share": val_share}),  # what was prepared before there was one is the same
    }


def _refuse_output_inside_source(out: Path, sources: Sequence[str | Path]) -> None:
    """Raise a DataError if the output would be among the sources the next time."""
    for source in sources:
        if Path(source).is_dir() and out.resolve().is_relative_to(Path(source).resolve()):
            raise DataError(f"the output folder {out} lies inside the source {source}", hint="name another folder")


def _clear(out: Path, sources: Sequence[Source]) -> None:
    """Remove the output of an earlier preparation, finished or not: whatever is named as shards are, and nothing else.

    Raises: DataError if the folder's manifest is another program's, or that of a run, or if a source would be removed.
    """
    if not out.is_dir():
        return
    if has_foreign_manifest(out):
        raise DataError(
            f"{out / MANIFEST_NAME} is no manifest of shards: --force does not replace it", hint="name another folder"
        )
    shards = [path for split in SPLITS for path in shards_in(out, split)]
    real_places = {path.resolve() for path in shards}
    for source in sources:
        if Path(source.path).resolve() in real_places:
            raise DataError(f"--force would remove the source {source.path}", hint="name another folder")
    with file_errors_as(DataError, "clear", out):
        if (out / STAGING_NAME).exists():
            with staging_lock(out):
                shutil.rmtree(out / STAGING_NAME)
        # The manifest goes first: without it nobody takes what is left for a whole corpus.
        (out / MANIFEST_NAME).unlink(missing_ok=True)
        for path in shards:
            path.unlink()


def _finished(out: Path, identity: Identity) -> Manifest | None:
    """Return the manifest of `out` if it is finished and the same as is wanted now, None if it is not finished."""
    if not (out / MANIFEST_NAME).exists():
        return None
    manifest = load_manifest(out)
    earlier = Identity(kind=manifest.kind, settings=manifest.settings, sources=manifest.sources)
    differences = identity.differences(earlier)
    if differences:
        raise DataError(
            f"{out} is finished already, with something else: {'; '.join(differences)}",
            hint="name another folder, or replace it with --force",
        )
    for split in manifest.splits.values():
        for record in split.files:
            path = out / record.name
            if not path.is_file() or path.stat().st_size != HEADER_BYTES + ID_BYTES * record.num_ids:
                raise DataError(f"{path} is missing or damaged since it was made", hint="make it anew with --force")
    if (out / STAGING_NAME).exists():  # stopped while tidying up
        shutil.rmtree(out / STAGING_NAME, ignore_errors=True)
    return manifest


def _finished_meanwhile(staging: Staging) -> Manifest | None:
    """Return what `_finished` does, once the staging folder is held: another process may have finished while this one planned.

    What it made is then all that is left.
    """
    try:
        return _finished(staging.out, staging.identity)
    except DataError:
        shutil.rmtree(staging.folder, ignore_errors=True)
        raise


def _nothing_to_do(out: Path, finished: Manifest) -> PrepareResult:
    return PrepareResult(directory=out, manifest=finished, is_new=False, num_shards_kept=0, num_workers=0)


def _refuse_foreign_files(staging: Staging) -> None:
    """Raise a DataError if the output folder holds anything but an unfinished preparation."""
    if staging.out.exists() and not staging.out.is_dir():
        raise DataError(f"{staging.out} is a file: expected a folder to write to", hint="name another folder")
    if not staging.out.is_dir():
        return
    known = staging.final_names() | {STAGING_NAME, MANIFEST_NAME}
    with file_errors_as(DataError, "read", staging.out):
        foreign = sorted(path.name for path in staging.out.iterdir() if path.name not in known)
    if foreign:
        raise DataError(
            f"{staging.out} is not empty: it holds {', '.join(foreign[:3])}{', ...' if len(foreign) > 3 else ''}",
            hint="name an empty or a new folder; --force replaces shards and leaves other files alone",
        )


def _made(
    jobs: list[Job],
    staging: Staging,
    place: JobSettings,
    workers: int | None,
    sources: Sequence[Source],
    progress: ProgressCallback | None,
) -> PrepareResult:
    """Make what is missing in a staging folder that is held, and publish all of it."""
    num_kept = sum(len(records) for records in staging.progress.shards.values())
    num_workers = 0
    if not staging.is_finishing:
        num_workers = min(workers or num_usable_processors(), len(jobs))
        _do_what_is_left(jobs, staging, place, num_workers, progress)
        _check_unchanged(sources)
        staging.finish(jobs)
    staging.publish()
    manifest = load_manifest(staging.out)
    return PrepareResult(
        directory=staging.out, manifest=manifest, is_new=True, num_shards_kept=num_kept, num_workers=num_workers
    )


def _do_what_is_left(
    jobs: list[Job], staging: Staging, place: JobSettings, num_workers: int, progress: ProgressCallback | None
) -> None:
    """Do all jobs that the journal does not call done, noting each shard in it as it is finished."""
    total = sum(job.source_bytes for job in jobs)
    bytes_of_job = {job.index: job.source_bytes if job.index in staging.progress.done else 0 for job in jobs}
    limits = {job.index: job.source_bytes for job in jobs}
    done = sum(bytes_of_job.values())

    def handle(report: Report) -> None:
        nonlocal done
        if report.shard is not None:
            staging.add_shard(report.job, report.shard)
        if report.is_done:
            staging.add_done(report.job)
        before = bytes_of_job[report.job]
        now = limits[report.job] if report.is_done else min(before + report.source_bytes, limits[report.job])
        bytes_of_job[report.job] = now
        done += now - before
        if progress is not None:
            progress(done, total)

    tasks = [
        Task(job=job, finished=tuple(staging.progress.shards.get(job.index, [])))
        for job in jobs
        if job.index not in staging.progress.done
    ]
    try:
        do_jobs(tasks, place, num_workers, handle)
    except DataError as problem:
        goes_on = "the same command goes on from here, or with --force begins anew once a source was changed"
        raise DataError(problem.message, hint="; ".join(filter(None, (problem.hint, goes_on)))) from problem


def _check_unchanged(sources: Sequence[Source]) -> None:
    """Raise a DataError if a source changed while it was read."""
    for source in sources:
        with file_errors_as(DataError, "read", source.path):
            status = os.stat(source.path)  # noqa: PTH116 - a Path object for each of a million files is too much
        if (status.st_size, status.st_mtime_ns) != (source.file.num_bytes, source.file.modified_ns):
            raise DataError(f"source {source.path} was changed while it was read", hint="start anew with --force")
