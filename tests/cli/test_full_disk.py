"""A full disk: one line that says so, the documented exit code, and what existed is as it was."""

import errno
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bytejepa.files import write_atomically
from bytejepa.training import checkpoint, runlog
from conftest import MINIMAL
from prepared_folders import files_of

Refuses = Callable[..., str]
DATA, RUN, ARTIFACT = 3, 4, 5


def no_space(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_at_export(
    refuses: Refuses, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, minimal_run: Path
) -> None:
    out = tmp_path / "model.bjm"
    out.write_bytes(b"the old one")
    monkeypatch.setattr("os.fsync", no_space)
    line = refuses(ARTIFACT, "export", minimal_run, "-o", out, "--no-score", "--force")
    assert "No space left on device (free some space; nothing that existed was changed)" in line
    assert files_of(tmp_path) == {"model.bjm": b"the old one"}


@pytest.mark.parametrize("is_there", [False, True])
def test_a_full_disk_at_the_beginning_of_a_run_leaves_nothing_of_it(
    refuses: Refuses,
    command: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    embedded_shards: Path,
    is_there: bool,
) -> None:
    run = tmp_path / "run"
    if is_there:
        run.mkdir()
    words = ("train", *MINIMAL, "--data", embedded_shards, "--out", run)
    for name in ("config.json", "manifest.json"):

        def full(path: Path, data: bytes, name: str = name) -> None:
            if path.name == name:
                no_space()
            write_atomically(path, data)

        with monkeypatch.context() as patch:
            patch.setattr(runlog, "write_atomically", full)
            line = refuses(RUN, *words)
        assert f"cannot create run folder {run}: No space left on device" in line
        assert run.exists() == is_there
        assert list(tmp_path.rglob("*")) == [run] * is_there
    assert command(*words).code == 0


def test_a_full_disk_at_a_checkpoint(
    refuses: Refuses, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, embedded_shards: Path
) -> None:
    run = tmp_path / "run"
    written = checkpoint.write_atomically

    def only_the_first(path: Path, data: bytes) -> None:
        if "00000001" not in path.name:
            no_space()
        written(path, data)

    monkeypatch.setattr(checkpoint, "write_atomically", only_the_first)
    words = ("--training.checkpoint-every-s=0", "--data", embedded_shards, "--out", run)
    line = refuses(RUN, "train", *MINIMAL, *words)
    assert "cannot write checkpoint" in line
    assert "No space left on device" in line
    assert checkpoint.read_newest(run / "checkpoints").position.step == 1


def test_a_full_disk_under_the_output(refuses: Refuses, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bytejepa.cli.terminal.print_json", no_space)
    assert "No space left on device" in refuses(1, "config", "tiny", "--json")


def test_no_place_for_temporary_files(refuses: Refuses, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: [str(tmp_path / "nowhere")])
    line = refuses(1, "bench", "--what", "prepare", "--megabytes", 1)
    assert f"No usable temporary directory found in ['{tmp_path / 'nowhere'}'] (set TMPDIR to a folder" in line


def test_a_full_disk_under_the_clock(refuses: Refuses, tmp_path: Path, embedded_shards: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("this system has no device that is always full")
    words = ("--data", embedded_shards, "--out", tmp_path / "run")
    # a log that leads to the full device stands for a disk that fills up between two checkpoints
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bytejepa.training.loop.Clock", lambda _: full_clock())
        line = refuses(RUN, "train", *MINIMAL, *words)
    assert "cannot write /dev/full: No space left on device" in line


def full_clock() -> Any:
    from bytejepa.training.clock import Clock

    clock = Clock()
    clock._file = Path("/dev/full").open("a", encoding="ascii")  # noqa: SIM115 - the clock closes it
    return clock


def test_a_full_disk_at_prepare(refuses: Refuses, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"The state of the Union is strong. " * 40)
    (tmp_path / "b.txt").write_bytes(b"The state of the Union is strong. " * 40)
    monkeypatch.setattr("os.fsync", no_space)
    words = (tmp_path / "a.txt", tmp_path / "b.txt", "--out", tmp_path / "s", "--val-documents", 1, "--workers", 1)
    assert "No space left on device" in refuses(DATA, "prepare", *words)
    assert list((tmp_path / "s").glob("fineweb_*")) == []
