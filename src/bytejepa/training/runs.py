"""Runs from beginning to end: `train` starts one in a new folder, `resume` goes on with one."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from bytejepa.config import RunConfig
from bytejepa.data.loader import IdStream
from bytejepa.errors import CheckpointError, ConfigError, DataError
from bytejepa.files import locked
from bytejepa.training import checkpoint, recovery
from bytejepa.training.distributed import Ranks, join
from bytejepa.training.loop import TrainingLoop, TrainProgress, TrainResult
from bytejepa.training.runlog import RunFolder, describe_machine, run_manifest
from bytejepa.training.starting_point import StartingPoint
from bytejepa.training.trainer import Trainer


def train(
    config: RunConfig,
    data: Path,
    out: Path,
    *,
    start: StartingPoint | None = None,
    force: bool = False,
    on_progress: Callable[[TrainProgress], None] | None = None,
) -> TrainResult:
    """Train a new run of `config` on the shards in `data`, in the folder `out`, and return how it ended.

    It begins with the weights of `start`, or with random ones; rates, data and averages begin anew in either case.
    Raises: ConfigError, DataError and CheckpointError for what cannot be; Interrupted after SIGTERM or Ctrl-C.
    """
    ranks = join(config.training.device)
    run = RunFolder(out)
    with ranks.agree():
        if start is not None and Path(start.source) == out.resolve():
            raise ConfigError(f"{out} is the model to begin with, and would be replaced", hint="name another folder")
        trainer = Trainer(config, data, ranks)
        if start is not None:
            start.load_into(trainer.model)
            trainer.average.begin_with_live()
    with _locked(run, ranks):
        with ranks.agree():
            if ranks.is_main:
                described = {"path": str(data.resolve()), **_described_data(data)}
                manifest = run_manifest(config, described, _machine(trainer))
                if start is not None:
                    manifest["started_from"] = start.described()
                run.create(config, manifest, force=force)
        return _loop(trainer, run, on_progress, keeps_beginning=start is not None)


def resume(
    run_path: Path,
    *,
    data: Path | None = None,
    on_progress: Callable[[TrainProgress], None] | None = None,
    on_note: Callable[[str], None] | None = None,
) -> TrainResult:
    """Continue the run in `run_path` from its newest whole checkpoint (or from the start if it has none yet).

    `data` says where its shards are now, if they moved. Damaged checkpoints are set aside and named through `on_note`.
    Raises: CheckpointError if the folder holds no run, is in use, no checkpoint is whole, or another of its files is
    damaged or cannot be read; nothing has been touched then.
    """
    run = RunFolder(run_path)
    config, ranks = _config_and_ranks(run)
    with ranks.agree():
        manifest = run.read_manifest()
        data = run.data_path(data)
    with _locked(run, ranks):
        # whatever is damaged is refused before anything is touched, and before a model is built
        damaged: list[tuple[int, str]] = []
        with ranks.agree():
            found = checkpoint.read_newest(run.checkpoints_path, on_damaged=damaged)
            if found is not None:
                recovery.check_configuration(found, config, run)
            elif begun_with := manifest.get("started_from"):
                raise CheckpointError(
                    f"{run.path} was killed before it held the weights of {begun_with.get('path')}, which it was to begin with",
                    hint="start it again with --force",
                )
            readings_s = recovery.recovered_readings(run.clock_path, found)
            run.read_metrics()
            trainer = Trainer(config, data, ranks)
            _check_same_data(manifest.get("data", {}), _described_data(data), data)
            if found is not None:
                recovery.check_tensors(found, trainer)
        with ranks.agree():
            if ranks.is_main:
                first_step = found.position.step if found is not None else 0
                notes = recovery.put_in_order(run, damaged, readings_s, first_step=first_step)
                run.add_resumption({"after_step": first_step, **_machine(trainer)})
                for text in notes if on_note is not None else ():
                    on_note(text)
        if found is not None:
            trainer.restore(found.tensors, found.position)
        return _loop(trainer, run, on_progress)


def _config_and_ranks(run: RunFolder) -> tuple[RunConfig, Ranks]:
    """Return a run's configuration and the ranks that go on with it; one that lacks the folder has to join to say so."""
    config: RunConfig | None = None
    problem: CheckpointError | None = None
    try:
        config = run.read_config()
    except CheckpointError as unreadable:
        problem = unreadable
    ranks = join(config.training.device if config is not None else "auto")
    with ranks.agree():
        if problem is not None:
            raise problem
    assert config is not None
    return config, ranks


def _loop(
    trainer: Trainer,
    run: RunFolder,
    on_progress: Callable[[TrainProgress], None] | None,
    *,
    keeps_beginning: bool = False,
) -> TrainResult:
    loop = TrainingLoop(trainer, run, on_progress, keeps_beginning=keeps_beginning)
    try:
        return loop.run_to_end()
    finally:
        loop.release()
        trainer.close()


@contextlib.contextmanager
def _locked(run: RunFolder, ranks: Ranks) -> Iterator[None]:
    """Hold the run folder's lock on rank 0; every rank raises if another process has it.

    A folder that was made for it and is empty in the end is removed again.
    """
    with contextlib.ExitStack() as held:
        with ranks.agree():
            if ranks.is_main:
                if not run.path.exists():
                    held.callback(_remove_if_empty, run.path)
                held.enter_context(locked(run.lock_path, CheckpointError, f"is training in {run.path}"))
        yield


def _remove_if_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()


def _described_data(data: Path) -> dict[str, object]:
    """Return what tells one data folder from another: sizes and first and last ids of its shards, in their order."""
    digest = hashlib.sha256()
    for split in ("train", "val"):
        with contextlib.suppress(DataError):
            stream = IdStream.open(data, split)
            for shard in stream.shards:
                digest.update(f"{split}:{len(shard)}:".encode() + shard[:4096].tobytes() + shard[-4096:].tobytes())
    return {"sha256_of_ends": digest.hexdigest()}


def _check_same_data(recorded: dict[str, object], found: dict[str, object], data: Path) -> None:
    if recorded.get("sha256_of_ends") not in (None, found["sha256_of_ends"]):
        raise CheckpointError(
            f"{data} does not hold the shards that the run began with", hint="name their folder with --data"
        )


def _machine(trainer: Trainer) -> dict[str, object]:
    """Return where a run computes and how: what the manifest says of it."""
    return {
        **describe_machine(),
        "device": _device_name(trainer.ranks),
        "world_size": trainer.ranks.world_size,
        "num_threads": torch.get_num_threads(),
        "attention": ", ".join(trainer.attention_kernels),
        "compiled": trainer.compiled,
    }


def _device_name(ranks: Ranks) -> str:
    return torch.cuda.get_device_name(ranks.device) if ranks.device.type == "cuda" else "cpu"
