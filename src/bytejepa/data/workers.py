"""Runs jobs in this process, or in several that are given one job after the other.

Workers are started anew ("spawn"), so no lock or open file of the caller's is inherited in a state nobody knows. They
end with their caller, however that ends: they are daemons, and a worker whose caller was killed finds its pipe closed
at its next report, a few MB of text later.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path

from bytejepa.data.blocks import ids_from_block
from bytejepa.data.plan import Job, part_blocks
from bytejepa.data.shards import ShardRecord, ShardWriter
from bytejepa.data.sources import ReadSettings
from bytejepa.data.staging import staged_name
from bytejepa.errors import DataError


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """A job and what is finished of it."""

    job: Job
    finished: tuple[ShardRecord, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class JobSettings:
    """What all jobs have in common."""

    folder: Path
    """Where the shards go."""
    settings: ReadSettings
    shard_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """What a job has to tell: some source was read, a shard is finished, or the job is."""

    job: int
    source_bytes: int = 0
    shard: ShardRecord | None = None
    is_done: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class _Failure:
    """Why a worker could not do its job. Plain strings, since an exception with arguments of its own may not travel."""

    message: str
    hint: str | None = None
    is_users: bool = True


def do_job(task: Task, place: JobSettings, report: Callable[[Report], None]) -> None:
    """Write the shards of a job that are not finished yet, `shard_bytes` ids each but for the last.

    Raises:
        DataError: a source cannot be read or a shard cannot be written.
    """
    job = task.job
    num_finished_ids = sum(record.num_ids for record in task.finished)
    index = len(task.finished)
    writer: ShardWriter | None = None
    try:
        for part in job.parts:
            for block in part_blocks(part, place.settings):
                ids = ids_from_block(block)
                num_skipped = min(num_finished_ids, len(ids))
                num_finished_ids -= num_skipped
                ids = ids[num_skipped:]
                while len(ids):
                    if writer is None:
                        writer = ShardWriter(place.folder / staged_name(job.index, index))
                    room = place.shard_bytes - writer.num_ids
                    writer.write(ids[:room])
                    ids = ids[room:]
                    if writer.num_ids == place.shard_bytes:
                        report(Report(job=job.index, shard=writer.finish()))
                        writer = None
                        index += 1
                report(Report(job=job.index, source_bytes=block.source_bytes))
        if writer is not None:
            report(Report(job=job.index, shard=writer.finish()))
            writer = None
    finally:
        if writer is not None:
            writer.discard()
    report(Report(job=job.index, is_done=True))


def do_jobs(tasks: Sequence[Task], place: JobSettings, num_workers: int, handle: Callable[[Report], None]) -> None:
    """Do all tasks in `num_workers` processes (in this one, if that is 1); `handle` is called here for each report.

    Raises:
        DataError: of the first job that failed, or a worker was killed from outside; the other workers are stopped.
    """
    if num_workers == 1 or len(tasks) <= 1:
        for task in tasks:
            do_job(task, place, handle)
        return
    context = multiprocessing.get_context("spawn")
    waiting = iter(tasks)
    workers: dict[Connection, SpawnProcess] = {}
    try:
        # The range comes first: zip takes from its first iterator before it finds the second one at its end.
        for _, task in zip(range(num_workers), waiting, strict=False):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs, place), daemon=True)
            process.start()
            theirs.close()
            workers[ours] = process
            _send(ours, task)
        while workers:
            for connection in wait(list(workers)):
                assert isinstance(connection, Connection)
                message = _received(connection, workers[connection])
                handle(message)
                if message.is_done:
                    following = next(waiting, None)
                    if following is None:
                        connection.close()
                        workers.pop(connection).join()
                    else:
                        _send(connection, following)
    finally:
        for connection, process in workers.items():
            process.terminate()
            process.join()
            connection.close()


def _send(connection: Connection, task: Task) -> None:
    # A worker that died meanwhile is noticed when its next report is awaited.
    with contextlib.suppress(ConnectionError):
        connection.send(task)


def _received(connection: Connection, process: SpawnProcess) -> Report:
    """Return a worker's next report."""
    try:
        message = connection.recv()
    except (EOFError, ConnectionError) as problem:
        process.join()
        raise DataError(
            f"a worker process was stopped from outside (exit code {process.exitcode})",
            hint="out of memory? run the same command again with fewer --workers; finished shards are kept",
        ) from problem
    if isinstance(message, _Failure):
        if message.is_users:
            raise DataError(message.message, hint=message.hint)
        raise RuntimeError(f"a worker process failed:\n{message.message}")
    assert isinstance(message, Report)
    return message


def _work(connection: Connection, place: JobSettings) -> None:
    """Do jobs until the caller closes the pipe."""
    # Ctrl-C reaches the whole process group; the caller alone decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        while True:
            task = connection.recv()
            try:
                do_job(task, place, connection.send)
            except DataError as problem:
                connection.send(_Failure(message=problem.message, hint=problem.hint))
            except (BrokenPipeError, ConnectionError):
                return
            except Exception:
                connection.send(_Failure(message=traceback.format_exc(), is_users=False))
    except (EOFError, ConnectionError):
        return
