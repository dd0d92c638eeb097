"""Resuming from a folder that is not as it was left: what can be used is, what cannot is one line, nothing is lost."""

import contextlib
import errno
import itertools
import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bytejepa.config import RunConfig, replace
from bytejepa.errors import CheckpointError, Interrupted
from bytejepa.files import atomic_file
from bytejepa.training import checkpoint
from bytejepa.training.checkpoint import CheckpointWriter, Position
from bytejepa.training.clock import Clock, read_log
from bytejepa.training.loop import TrainProgress
from bytejepa.training.runlog import RunFolder
from bytejepa.training.runs import resume, train

NEWEST = "step_00000006"
EXIT_CODE = 4


def snapshot(run: Path) -> dict[str, bytes]:
    files = (path for path in sorted(run.rglob("*")) if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(run)): path.read_bytes() for path in files}


@pytest.fixture
def run(minimal_run: Path, tmp_path: Path) -> Path:
    """A finished run of 6 steps, to be spoiled."""
    return shutil.copytree(minimal_run, tmp_path / "run")


@pytest.fixture(scope="module")
def run_with_checkpoints(
    tmp_path_factory: pytest.TempPathFactory, minimal_config: RunConfig, embedded_shards: Path
) -> Path:
    """A finished run with a checkpoint after each of its last 5 steps; read-only."""
    path = tmp_path_factory.mktemp("checkpoints") / "run"
    often = {"checkpoint_every_s": 0.0, "keep_checkpoints": 5, "validate_every_steps": None, "validation_bytes": 300}
    train(replace(minimal_config, training=often), embedded_shards, path)
    return path


def test_damaged_checkpoints_are_kept_under_names_of_their_own(run_with_checkpoints: Path, tmp_path: Path) -> None:
    run = shutil.copytree(run_with_checkpoints, tmp_path / "run")
    folder, spoiled = run / "checkpoints", {}
    for name in (f"damaged_{NEWEST}", f"damaged_{NEWEST}_2"):
        tensors, description = (folder / f"{NEWEST}{suffix}" for suffix in (".safetensors", ".json"))
        tensors.write_bytes(tensors.read_bytes()[:-1] + bytes([len(spoiled)]))
        spoiled |= {f"{name}.safetensors": tensors.read_bytes(), f"{name}.json": description.read_bytes()}
        notes: list[str] = []
        resume(run, on_note=notes.append)
        assert f"set aside as {name} and" in notes[0]
    assert {name: (folder / name).read_bytes() for name in spoiled} == spoiled
    assert checkpoint.steps_on_disk(folder)[0] == 6


def test_a_resumed_run_does_not_write_the_checkpoint_again_that_it_begins_from(
    minimal_config: RunConfig, embedded_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticks = itertools.count(step=10.0)
    monkeypatch.setattr("bytejepa.training.clock.time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    saved, save = list[int](), CheckpointWriter.save

    def noted(writer: CheckpointWriter, at: Position, *state: Any, **log: Any) -> None:
        saved.append(at.step)
        save(writer, at, *state, **log)

    monkeypatch.setattr(CheckpointWriter, "save", noted)
    settings = {"checkpoint_every_s": 25.0, "validate_every_steps": None}

    def stop_at_four(at: TrainProgress) -> None:
        if at.step == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted):
        train(replace(minimal_config, training=settings), embedded_shards, tmp_path / "run", on_progress=stop_at_four)
    assert saved == [3, 4]
    resume(tmp_path / "run")
    assert saved == [3, 4, 6]


def test_a_run_folder_is_free_only_when_nothing_is_being_written(
    minimal_config: RunConfig, embedded_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written, write = list[int](), CheckpointWriter._write

    def slow(writer: CheckpointWriter, at: Position, *state: Any) -> None:
        time.sleep(0.3)
        write(writer, at, *state)
        written.append(at.step)

    def break_down(at: TrainProgress) -> None:
        if at.step == 3:
            raise RuntimeError("out of memory")

    monkeypatch.setattr(CheckpointWriter, "_write", slow)
    settings = {"checkpoint_every_s": 0.0, "validate_every_steps": None}
    with pytest.raises(RuntimeError, match="out of memory"):
        train(replace(minimal_config, training=settings), embedded_shards, tmp_path / "run", on_progress=break_down)
    assert written[-1:] == checkpoint.steps_on_disk(tmp_path / "run" / "checkpoints")[:1] == [2]


def test_half_a_checkpoint_is_damaged_and_the_one_before_it_is_used(run_with_checkpoints: Path, tmp_path: Path) -> None:
    run = shutil.copytree(run_with_checkpoints, tmp_path / "run")
    (run / "checkpoints" / f"{NEWEST}.safetensors").unlink()
    notes: list[str] = []
    resume(run, on_note=notes.append)
    assert f"{NEWEST}.safetensors: this half of a checkpoint is missing" in notes[0]
    assert (run / "checkpoints" / f"damaged_{NEWEST}.json").exists()


def test_a_checkpoint_that_cannot_be_read_just_now_is_reported_and_nothing_touched(
    run_with_checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = shutil.copytree(run_with_checkpoints, tmp_path / "run")
    before, read_bytes = snapshot(run), Path.read_bytes

    def flaky(path: Path) -> bytes:
        if path.name == f"{NEWEST}.safetensors":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read_bytes(path)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", flaky)
        with pytest.raises(CheckpointError, match=rf"cannot read checkpoint .*{NEWEST}.*: Input/output error"):
            resume(run)
    assert snapshot(run) == before


@pytest.mark.parametrize("every", [8, None])
def test_resuming_a_finished_run_logs_nothing_again_and_returns_the_same(
    minimal_config: RunConfig, embedded_shards: Path, tmp_path: Path, every: int | None
) -> None:
    run = tmp_path / "run"
    training = {"validate_every_steps": every, "validation_bytes": 300}
    result = train(replace(minimal_config, schedule={"steps": 25}, training=training), embedded_shards, run)
    metrics = RunFolder(run).read_metrics()
    assert sum("val_bpb" in line for line in metrics) == (4 if every else 1)
    assert resume(run) == result
    assert RunFolder(run).read_metrics() == metrics


def test_resuming_a_finished_run_that_did_not_log_its_last_step_prints_valid_json(
    command: Callable[..., Any], minimal_config: RunConfig, embedded_shards: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    train(replace(minimal_config, training={"log_every_steps": 4}), embedded_shards, run)
    outcome = command("train", "--resume", run, "--json")
    assert json.loads(outcome.out, parse_constant=pytest.fail)["train_bpb"] is None
    assert command("train", "--resume", run).code == 0


@pytest.mark.parametrize("lines_left", [None, 0, 1])
def test_a_lost_or_short_clock_log_is_written_again_from_the_checkpoint(
    minimal_config: RunConfig, embedded_shards: Path, tmp_path: Path, lines_left: int | None
) -> None:
    run, notes = tmp_path / "run", []
    capped = {"steps": None, "max_wallclock_s": 0.3}
    training = {"validate_every_steps": None, "validation_bytes": 200}
    result = train(replace(minimal_config, schedule=capped, training=training), embedded_shards, run)
    log = run / "clock.log"
    whole = log.read_text()
    if lines_left is None:
        log.unlink()
    else:
        log.write_text("".join(whole.splitlines(keepends=True)[:lines_left]))
    assert resume(run, on_note=notes.append) == result
    assert log.read_text() == whole
    assert "clock.log" in notes[0]
    assert f"its {result.steps + 1} were written again" in notes[0]


def test_a_checkpoint_holds_the_readings_up_to_its_step(run_with_checkpoints: Path) -> None:
    readings = read_log(run_with_checkpoints / "clock.log")
    for step in (2, 6):
        assert checkpoint.read(run_with_checkpoints / "checkpoints", step).readings_s == readings[: step + 1]


def test_a_short_clock_log_beside_a_checkpoint_without_readings_is_refused(
    refuses: Callable[..., str], run: Path
) -> None:
    newest = checkpoint.read(run / "checkpoints", 6)
    writer = checkpoint.CheckpointWriter(run / "checkpoints", keep=1)
    writer.save(newest.position, newest.tensors, newest.configuration)
    writer.close()
    resume(run)  # a whole log will do
    (run / "clock.log").write_text("0.0\n")
    before = snapshot(run)
    line = refuses(EXIT_CODE, "train", "--resume", run)
    assert "clock.log: expected at least 7 readings for the checkpoint of step 6, got 1" in line
    assert snapshot(run) == before


def test_the_clock_takes_no_reading_at_a_wrong_place(tmp_path: Path) -> None:
    (tmp_path / "clock.log").write_text("0.0\n")
    with pytest.raises(AssertionError, match="1 readings"):
        Clock(tmp_path / "clock.log").read(2)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("clock.log", b"0.0\nabc\n0.3\n", "expected in line 2 seconds of at least 0.0, got b'abc'"),
        ("clock.log", b"0.1\n\xff\n", "expected in line 2"),
        ("clock.log", b"0.2\n0.1\n", "expected in line 2 seconds of at least 0.2"),
        ("clock.log", b"nan\n", "expected in line 1"),
        ("metrics.jsonl", b'{"step": 1}\nnot json\n', "expected in line 2 an object with a step, got b'not json'"),
        ("metrics.jsonl", b'{"foo": 1}\n', "expected in line 1 an object with a step"),
        ("metrics.jsonl", b'{"step": "1"}\n', "expected in line 1"),
        ("metrics.jsonl", b"[]\n\xff\n", "expected in line 1"),
        ("manifest.json", b"[]", "damaged: expected an object, got []"),
        ("manifest.json", b"\xff", "damaged"),
        ("manifest.json", b'{"data": 3}', "expected data to be of type dict, got 3"),
        ("manifest.json", b'{"resumed": {}}', "expected resumed to be of type list"),
        ("manifest.json", b"{}", "expected data.path, got None"),
        ("config.json", b"{}", "damaged: it has no section 'model'"),
        ("config.json", b'{"model": {}}', "is not the configuration of step_00000006.json: model."),
        ("config.json", b"\xff", "damaged"),
        (f"checkpoints/{NEWEST}.json", b"[]", "expected an object, got list"),
        (f"checkpoints/{NEWEST}.json", b"\xff", "damaged"),
    ],
)
def test_a_damaged_file_is_one_line_and_nothing_is_touched(
    refuses: Callable[..., str], run: Path, name: str, content: bytes, words: str
) -> None:
    (run / name).write_bytes(content)
    before = snapshot(run)
    line = refuses(EXIT_CODE, "train", "--resume", run)
    assert words in line
    assert str(run / name).removesuffix(".json") in line
    assert snapshot(run) == before


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda described: described.pop("configuration"), "expected configuration to be of type dict, got None"),
        (lambda described: described.pop("tensors_sha256"), "expected tensors_sha256 to be of type str, got None"),
        (lambda described: described["position"].pop("step"), "missing 1 required keyword-only argument: 'step'"),
        (lambda described: described["position"].update(stage="0"), "expected position.stage to be a whole number"),
        (lambda described: described["position"].update(step=5), "expected position.step 6, got 5"),
        (lambda described: described["configuration"].update(modle={}), "configuration: unknown setting 'modle'"),
    ],
)
def test_a_damaged_description_of_a_checkpoint_is_one_line(
    refuses: Callable[..., str], run: Path, change: Callable[[dict[str, Any]], object], words: str
) -> None:
    path = run / "checkpoints" / f"{NEWEST}.json"
    described = json.loads(path.read_bytes())
    change(described)
    path.write_text(json.dumps(described))
    before = snapshot(run)
    assert words in refuses(EXIT_CODE, "train", "--resume", run)
    assert snapshot(run) == before


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("model.token_embedding.weight", lambda value: value[:-1], r"expected shape .*, got "),
        ("average.token_embedding.weight", lambda _: None, "expected shape .*, got nothing"),
        ("optimizer.adam.square.token_embedding.weight", lambda _: None, "expected shape .*, got nothing"),
        ("optimizer.adam.step.token_embedding.weight", lambda value: value[None], r"expected shape \(\), got \(1,\)"),
        ("model.new.weight", lambda _: torch.zeros(3), "has no place in this run"),
    ],
)
def test_tensors_of_another_model_are_one_line(
    refuses: Callable[..., str], run: Path, name: str, change: Callable[[Any], torch.Tensor | None], words: str
) -> None:
    newest = checkpoint.read(run / "checkpoints", 6)
    changed = change(newest.tensors.get(name))
    tensors = {key: value for key, value in newest.tensors.items() if key != name}
    if changed is not None:
        tensors[name] = changed
    writer = checkpoint.CheckpointWriter(run / "checkpoints", keep=1)
    writer.save(newest.position, tensors, newest.configuration, readings_s=newest.readings_s)
    writer.close()
    before = snapshot(run)
    with pytest.raises(CheckpointError, match=f"tensor {name}:? {words}"):
        resume(run)
    assert refuses(EXIT_CODE, "train", "--resume", run)
    assert snapshot(run) == before


def killed_while_writing(path: Path) -> Path:
    """Leave what the writer of all these files leaves when it is killed, and return where."""
    before = set(path.parent.iterdir())
    with contextlib.suppress(FileNotFoundError), atomic_file(path):
        (left,) = set(path.parent.iterdir()) - before
        left.rename(left.with_name("kept"))  # so that the writer, which lives on here, can neither finish nor tidy up
    return left.with_name("kept").rename(left)


def spoil(run: Path) -> list[Path]:
    """Leave what kills during writes leave."""
    unfinished = [
        run / "checkpoints" / ".step_00000005.safetensors.abcd.tmp",
        run / "checkpoints" / ".step_00000005.json.abcd.tmp",
        run / "checkpoints" / "step_00000007.safetensors",
        run / ".metrics.jsonl.abcd.tmp",
        run / ".manifest.json.abcd.tmp",
    ]
    for path in unfinished:
        path.write_bytes(b"half")
    for written in (run / "manifest.json", run / "checkpoints" / "step_00000005.json"):
        unfinished.append(killed_while_writing(written))
    (run / ".notes.tmp").write_bytes(b"not ours")
    return unfinished


@pytest.mark.parametrize("way", ["resume", "force"])
def test_what_a_kill_during_a_write_left_is_deleted(
    minimal_config: RunConfig, embedded_shards: Path, run: Path, way: str
) -> None:
    unfinished = spoil(run)
    if way == "resume":
        resume(run)
    else:
        train(minimal_config, embedded_shards, run, force=True)
    assert [path for path in unfinished if path.exists()] == []
    assert (run / ".notes.tmp").exists()
    assert checkpoint.steps_on_disk(run / "checkpoints") == [6]


def test_nothing_of_a_run_that_is_in_use_is_deleted(run: Path) -> None:
    import filelock

    unfinished = spoil(run)
    with filelock.FileLock(run / ".lock"), pytest.raises(CheckpointError, match="another process"):
        resume(run)
    assert all(path.exists() for path in unfinished)
