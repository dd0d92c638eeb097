"""Promise: a run that was killed and resumed is, bit for bit, the run that was not."""

import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

from bytejepa.config import RunConfig, replace
from bytejepa.errors import CheckpointError, Interrupted
from bytejepa.scoring.evaluate import Scorer
from bytejepa.training import checkpoint
from bytejepa.training.runlog import RunFolder
from bytejepa.training.runs import resume, train
from small_models import same_tensors

pytestmark = pytest.mark.integration


@pytest.fixture
def config(minimal_config: RunConfig) -> RunConfig:
    return replace(
        minimal_config,
        schedule={"steps": 24},
        optimizer={"muon_beta2": 0.9, "muon_cautious_weight_decay": True},  # state beside the momentum
        training={"checkpoint_every_s": 0.0, "keep_checkpoints": 3, "validate_every_steps": 8, "validation_bytes": 300},
    )


def final_state(run: Path) -> dict[str, torch.Tensor]:
    folder = RunFolder(run).checkpoints_path
    return checkpoint.read(folder, checkpoint.steps_on_disk(folder)[0]).tensors


def timeless(run: Path) -> list[dict[str, float]]:
    return [{k: v for k, v in line.items() if k != "elapsed_s"} for line in RunFolder(run).read_metrics()]


def in_child(call, *, kill_after_s: float | None) -> int | None:
    """Run `call` in a forked child; return its exit status, or None if it was killed first."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            with Path(os.devnull).open("w") as nothing:
                sys.stderr = nothing
                call()
            status = 0
        finally:
            os._exit(status)
    deadline = None if kill_after_s is None else time.monotonic() + kill_after_s
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status
        if deadline is not None and time.monotonic() >= deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return None
        time.sleep(0.002)


def killed_until_done(run: Path, *, kills: int, longest_s: float, seed: int) -> int:
    """Resume `run` again and again, killing it at random times, until it ends; return the number of kills."""
    at_random, killed = random.Random(seed), 0
    while True:
        wait = at_random.uniform(0.0, longest_s) if killed < kills else None
        status = in_child(lambda: resume(run), kill_after_s=wait)
        if status is None:
            killed += 1
            continue
        assert status == 0
        return killed


def begin(config: RunConfig, data: Path, run: Path) -> None:
    """Leave `run` as a run that was killed before its first step."""
    train(replace(config, schedule={"steps": 1}), data, run)
    folder = RunFolder(run)
    folder.config_path.unlink()
    folder.create(config, {"data": {"path": str(data)}}, force=True)


@pytest.mark.parametrize("kills", [4, pytest.param(50, marks=[pytest.mark.slow, pytest.mark.timeout(1200)])])
def test_killed_at_random_times_it_ends_with_the_same_bits(config, embedded_shards, tmp_path, kills) -> None:
    whole = tmp_path / "whole"
    began = time.monotonic()
    train(config, embedded_shards, whole)
    takes_s = time.monotonic() - began
    killed, num_runs = 0, 0
    while killed < kills:  # a run that ends before it was killed often enough is followed by another
        run = tmp_path / f"killed_{num_runs}"
        begin(config, embedded_shards, run)
        killed += killed_until_done(run, kills=kills - killed, longest_s=1.2 * takes_s, seed=kills + num_runs)
        assert same_tensors(final_state(whole), final_state(run))
        assert timeless(whole) == timeless(run)
        shutil.rmtree(run)
        num_runs += 1
    assert killed == kills


def test_under_a_wallclock_cap_the_logged_clock_is_replayed(config, embedded_shards, tmp_path) -> None:
    capped = replace(config, schedule={"steps": None, "max_wallclock_s": 0.6}, training={"validate_every_steps": None})
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train(capped, embedded_shards, whole)
    begin(capped, embedded_shards, killed)
    shutil.copy(RunFolder(whole).clock_path, RunFolder(killed).clock_path)
    killed_until_done(killed, kills=2, longest_s=0.5, seed=0)
    assert same_tensors(final_state(whole), final_state(killed))
    assert RunFolder(whole).read_metrics() == RunFolder(killed).read_metrics()


def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_it_used(config, embedded_shards, tmp_path) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    train(config, embedded_shards, whole)
    train(config, embedded_shards, run)
    newest = RunFolder(run).checkpoints_path / "step_00000024.safetensors"
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 1
    newest.write_bytes(data)
    notes: list[str] = []
    resume(run, on_note=notes.append)
    assert len(notes) == 1
    assert "step_00000024" in notes[0]
    assert same_tensors(final_state(whole), final_state(run))


def test_if_every_checkpoint_is_damaged_nothing_is_overwritten(config, embedded_shards, tmp_path) -> None:
    run = tmp_path / "run"
    train(config, embedded_shards, run)
    for path in RunFolder(run).checkpoints_path.glob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"no checkpoint .* is whole"):
        resume(run)


def test_sigterm_writes_a_checkpoint_and_resume_goes_on(config, embedded_shards, tmp_path) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    train(config, embedded_shards, whole)
    patient = replace(config, training={"checkpoint_every_s": None})

    def stop_at_ten(at) -> None:
        if at.step == 10:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted, match="step 10, checkpoint written") as stopped:
        train(patient, embedded_shards, run, on_progress=stop_at_ten)
    assert stopped.value.exit_code == 7
    resume(run)
    assert same_tensors(final_state(whole), final_state(run))
    assert timeless(whole) == timeless(run)


def test_sigterm_ends_a_validation_between_batches_and_resume_makes_up_for_it(
    config, embedded_shards, tmp_path, monkeypatch
) -> None:
    config = replace(config, training={"validate_every_steps": 12}, evaluation={"batch_bytes": 256})
    whole, run, scored = tmp_path / "whole", tmp_path / "run", []
    train(config, embedded_shards, whole)
    price = Scorer.window_losses

    def stop_at_the_second_batch(self, ids, windows):
        scored.append(len(windows))
        if len(scored) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return price(self, ids, windows)

    monkeypatch.setattr(Scorer, "window_losses", stop_at_the_second_batch)
    with pytest.raises(Interrupted, match="step 12, checkpoint written"):
        train(config, embedded_shards, run)
    assert len(scored) == 2
    monkeypatch.undo()
    resume(run)
    assert same_tensors(final_state(whole), final_state(run))
    assert timeless(whole) == timeless(run)


def test_two_processes_on_one_run_the_second_is_refused(config, embedded_shards, tmp_path) -> None:
    run = tmp_path / "run"

    def second(at) -> None:
        if at.step == 3:
            # another process, because a lock does not stop the one that holds it
            assert in_child(lambda: refused(run), kill_after_s=None) == 0

    def refused(path: Path) -> None:
        with pytest.raises(CheckpointError, match="another process is training"):
            resume(path)

    train(config, embedded_shards, run, on_progress=second)


def test_a_full_disk_stops_training_with_the_last_checkpoint_intact(
    config, embedded_shards, tmp_path, monkeypatch
) -> None:
    run, writes = tmp_path / "run", []
    write = checkpoint.write_atomically

    def fill_up(path: Path, data: bytes) -> None:
        writes.append(path)
        if len(writes) > 6:
            raise OSError(28, "No space left on device")
        write(path, data)

    monkeypatch.setattr(checkpoint, "write_atomically", fill_up)
    with pytest.raises(CheckpointError, match="No space left"):
        train(config, embedded_shards, run)
    monkeypatch.undo()
    assert checkpoint.read_newest(RunFolder(run).checkpoints_path).position.step == 3
    resume(run)
    assert checkpoint.steps_on_disk(RunFolder(run).checkpoints_path)[0] == 24


def test_settings_of_the_run_hold_and_other_data_is_refused(config, embedded_shards, tmp_path) -> None:
    from bytejepa.data.shards import write_shard

    run, other = tmp_path / "run", tmp_path / "other"
    train(config, embedded_shards, run)
    shutil.copytree(embedded_shards, other)
    (other / "manifest.json").unlink()
    import numpy as np

    write_shard(other / "fineweb_train_000000.bin", np.full(5000, 70, dtype=np.uint16))
    with pytest.raises(CheckpointError, match="does not hold the shards"):
        resume(run, data=other)
