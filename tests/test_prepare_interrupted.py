"""`prepare` that is killed, stopped, started again with other settings or sources, or left without room."""

from __future__ import annotations

import gzip
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from bytejepa.data import prepare as prepare_module
from bytejepa.data import shards
from bytejepa.data.corpus import embedded_documents
from bytejepa.data.manifest import verify
from bytejepa.data.prepare import prepare
from bytejepa.data.shards import ShardWriter, find_shards
from bytejepa.errors import DataError
from prepared_folders import TEXTS, files_of, write_jsonl

KILLED = """
import sys
from bytejepa.data.prepare import prepare
if __name__ == "__main__":
    prepare([sys.argv[1]], sys.argv[2], val_documents=5, shard_bytes=200_000, workers=int(sys.argv[3]))
"""


@pytest.mark.parametrize("is_same", [True, False])
def test_what_another_process_finishes_meanwhile_is_left_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_same: bool
) -> None:
    source, out = write_jsonl(tmp_path / "a.jsonl", TEXTS), tmp_path / "out"
    plan_jobs, finished = prepare_module.plan_jobs, {}

    def slow_plan(*arguments: Any, **options: Any) -> Any:
        jobs = plan_jobs(*arguments, **options)
        if not finished:
            monkeypatch.setattr(prepare_module, "plan_jobs", plan_jobs)
            prepare([source], out, val_documents=5 if is_same else 9, shard_bytes=2000, workers=1)
            finished.update(times_of(out))
        return jobs

    monkeypatch.setattr(prepare_module, "plan_jobs", slow_plan)
    if is_same:
        assert not prepare([source], out, val_documents=5, shard_bytes=2000, workers=1).is_new
    else:
        with pytest.raises(DataError, match="is finished already, with something else: val_documents is 5, it was 9"):
            prepare([source], out, val_documents=5, shard_bytes=2000, workers=1)
    assert times_of(out) == finished
    assert verify(out).is_good


def times_of(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


@pytest.mark.integration
@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_killed_run_goes_on_where_it_was(tmp_path: Path, num_workers: int) -> None:
    """SIGKILL leaves no time to tidy up: the second run keeps what is whole, and the result is as if nothing was."""
    source = write_jsonl(tmp_path / "a.jsonl", [document.data.decode() for document in embedded_documents()])
    packed = tmp_path / "b.jsonl.gz"  # one job of many shards
    packed.write_bytes(gzip.compress(source.read_bytes() * 6, compresslevel=1))
    (tmp_path / "script.py").write_text(KILLED)
    out = tmp_path / "out"
    command = [sys.executable, str(tmp_path / "script.py"), str(packed), str(out), str(num_workers)]
    journal = out / ".prepare" / "journal.jsonl"
    process = subprocess.Popen(command)
    while process.poll() is None and not (journal.exists() and journal.read_bytes().count(b"\n") >= 9):
        time.sleep(0.002)
    process.kill()
    assert process.wait() == -signal.SIGKILL, "it was finished before it could be killed: make the source larger"
    with journal.open("ab") as file:
        file.write(b'{"job": 3, "sha')  # the power went while a line was written
    (out / ".prepare" / ".job_000001_000099.bin.77.tmp").write_bytes(b"half a shard")
    before = {path: path.stat().st_mtime_ns for path in sorted((out / ".prepare").glob("job_*.bin"))[:5]}
    wrong = sorted((out / ".prepare").glob("job_000001_*.bin"))[5]
    wrong.write_bytes(wrong.read_bytes()[:-2] + b"\0\0")  # changed since: it and what follows is made again
    result = prepare([packed], out, val_documents=5, shard_bytes=200_000, workers=num_workers)
    assert result.num_shards_kept >= 5  # those of job 1 before the changed one; job 0 may not have got as far
    prepare([packed], tmp_path / "whole", val_documents=5, shard_bytes=200_000, workers=1)
    assert files_of(out) == files_of(tmp_path / "whole")
    kept = [(out / f"fineweb_train_{index:06d}.bin").stat().st_mtime_ns for index in range(4)]
    assert set(kept) <= set(before.values())


def prepared_until(count: int, source: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prepare until `count` shards are finished, then stop as Ctrl-C does."""
    finish = ShardWriter.finish
    finished = 0

    def interrupted(writer: ShardWriter) -> shards.ShardRecord:
        nonlocal finished
        if finished == count:
            raise KeyboardInterrupt
        finished += 1
        return finish(writer)

    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "finish", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prepare([source], out, val_documents=5, shard_bytes=1000, workers=1)


def test_an_interruption_leaves_no_half_file_and_no_shard_outside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    prepared_until(3, source, tmp_path / "out", monkeypatch)
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".prepare"]
    assert len(list((tmp_path / "out" / ".prepare").glob("*.bin"))) == 3
    assert not list((tmp_path / "out" / ".prepare").glob("*.tmp"))
    with pytest.raises(DataError, match="run the same command again"):
        find_shards(tmp_path / "out", "train")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"val_documents": 6}, "val_documents is 6, it was 5"),
        ({"shard_bytes": 1001}, "shard_bytes is 1001, it was 1000"),
        ({"kind": "text", "document_separator": "x"}, "the kind is text, it was jsonl"),
    ],
)
@pytest.mark.parametrize("is_finished", [False, True])
def test_other_settings_are_refused_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], expected: str, is_finished: bool
) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    out = tmp_path / "out"
    call: dict[str, Any] = {"val_documents": 5, "shard_bytes": 1000, "workers": 1}
    if is_finished:
        prepare([source], out, **call)
    else:
        prepared_until(3, source, out, monkeypatch)
    before = files_of(out) if is_finished else files_of(out / ".prepare")
    with pytest.raises(DataError, match=expected):
        prepare([source], out, **{**call, **change})
    assert before == (files_of(out) if is_finished else files_of(out / ".prepare"))
    prepare([source], out, force=True, **{**call, **change})
    assert verify(out).is_good


def test_changed_sources_are_refused_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    prepared_until(3, source, tmp_path / "out", monkeypatch)
    os.utime(source, ns=(1, 1))
    with pytest.raises(DataError, match=r"source a\.jsonl was changed since"):
        prepare([source], tmp_path / "out", val_documents=5, shard_bytes=1000)
    write_jsonl(tmp_path / "a.jsonl", TEXTS[:-1])
    with pytest.raises(DataError, match=r"source a\.jsonl has \d+ bytes, it had \d+"):
        prepare([source], tmp_path / "out", val_documents=5, shard_bytes=1000)


def test_a_source_that_changes_meanwhile_is_noticed(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    with pytest.raises(DataError, match="was changed while it was read"):
        prepare([source], tmp_path / "out", val_documents=5, progress=lambda *_: os.utime(source, ns=(1, 1)))


def test_a_finished_folder_is_left_as_it_is(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    first = prepare([source], tmp_path / "out", val_documents=5)
    again = prepare([source], tmp_path / "out", val_documents=5)
    assert (first.is_new, again.is_new) == (True, False)
    assert again.manifest == first.manifest
    (tmp_path / "out" / "fineweb_val_000000.bin").unlink()
    with pytest.raises(DataError, match="missing or damaged since"):
        prepare([source], tmp_path / "out", val_documents=5)


def test_stopped_while_renaming_it_goes_on_renaming(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    call: dict[str, Any] = {"val_documents": 5, "shard_bytes": 1000, "workers": 1}
    prepare([source], tmp_path / "whole", **call)
    replace = Path.replace
    renamed = 0

    def interrupted(path: Path, target: Path) -> Path:
        nonlocal renamed
        renamed += ".prepare" not in str(target)
        if renamed == 4:
            raise KeyboardInterrupt
        return replace(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prepare([source], tmp_path / "out", **call)
    assert len(find_shards(tmp_path / "out", "train")) == 2
    prepare([source], tmp_path / "out", **call)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


def test_foreign_files_are_neither_accepted_nor_removed(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("three years of work")
    with pytest.raises(DataError, match=r"is not empty: it holds thesis\.txt"):
        prepare([source], out, val_documents=5)
    assert files_of(out) == {"thesis.txt": b"three years of work"}
    prepare([source], out, val_documents=5, force=True)
    assert (out / "thesis.txt").read_text() == "three years of work"
    assert verify(out).is_good


def test_a_full_disk_is_one_error_and_keeps_what_is_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    call: dict[str, Any] = {"val_documents": 5, "shard_bytes": 1000, "workers": 1}
    fsync = os.fsync
    num_left = 30

    def full(descriptor: int) -> None:
        nonlocal num_left
        num_left -= 1
        if num_left < 0:
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(DataError, match=r"No space left on device \(free some space.*goes on from here"):
            prepare([source], tmp_path / "out", **call)
    assert not list((tmp_path / "out" / ".prepare").glob("*.tmp"))
    result = prepare([source], tmp_path / "out", **call)
    assert result.num_shards_kept > 2
    prepare([source], tmp_path / "whole", **call)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")
