"""What a killed run left: checked first, and put in order only when all of it can be used."""

from __future__ import annotations

from pathlib import Path

from bytejepa.config import RunConfig
from bytejepa.config_json import from_dict, to_dict
from bytejepa.errors import CheckpointError, ConfigError, file_errors_as
from bytejepa.files import write_atomically
from bytejepa.training import checkpoint
from bytejepa.training.checkpoint import Checkpoint
from bytejepa.training.clock import read_log
from bytejepa.training.runlog import RunFolder
from bytejepa.training.trainer import Trainer


def check_configuration(found: Checkpoint, config: RunConfig, run: RunFolder) -> None:
    """Refuse a checkpoint that was written under another configuration than the run's `config`.

    Raises: CheckpointError naming the first setting that differs.
    """
    described = found.path.with_suffix(".json")
    try:
        written = from_dict(found.configuration, where=f"{described}, configuration")
    except ConfigError as problem:
        raise CheckpointError(problem.message, hint=problem.hint) from None
    if written == config:
        return
    theirs, ours = to_dict(written), to_dict(config)
    section, setting = next(
        (section, setting)
        for section, settings in theirs.items()
        for setting, value in settings.items()
        if ours[section][setting] != value
    )
    raise CheckpointError(
        f"{run.config_path} is not the configuration of {described.name}: "
        f"{section}.{setting} is {ours[section][setting]!r}, the checkpoint's {theirs[section][setting]!r}",
        hint="put the run's own config.json back, or start a new run",
    )


def check_tensors(found: Checkpoint, trainer: Trainer) -> None:
    """Refuse a checkpoint whose tensors are not those of `trainer`. Raises: CheckpointError naming the first of them."""
    expected = _tensor_shapes(trainer, has_stepped=found.position.step > 0)
    for name, shape in expected.items():
        got = tuple(found.tensors[name].shape) if name in found.tensors else "nothing"
        if got != shape:
            raise CheckpointError(
                f"{found.path}: tensor {name}: expected shape {shape}, got {got}",
                hint="resume with the version of bytejepa that wrote it",
            )
    unknown = sorted(set(found.tensors) - set(expected))
    if unknown:
        raise CheckpointError(
            f"{found.path}: tensor {unknown[0]} has no place in this run",
            hint="resume with the version of bytejepa that wrote it",
        )


def _tensor_shapes(trainer: Trainer, *, has_stepped: bool) -> dict[str, tuple[int, ...]]:
    """Return the shape of everything that `Trainer.state` returns, without asking other ranks."""
    optimizers = trainer.optimizers
    weights = {name: tuple(parameter.shape) for name, parameter in trainer.model.named_parameters()}
    shapes = {f"model.{name}": shape for name, shape in weights.items()}
    if trainer.average.is_kept:
        shapes |= {f"average.{name}": shape for name, shape in weights.items()}
    shapes |= {f"optimizer.muon.{name}": shape for name, shape in optimizers.muon.state_shapes().items()}
    if has_stepped:
        for name in optimizers.adam_names:
            shapes |= {f"optimizer.adam.{moment}.{name}": weights[name] for moment in ("mean", "square")}
            shapes[f"optimizer.adam.step.{name}"] = ()
    return shapes


def recovered_readings(log: Path, found: Checkpoint | None) -> list[float]:
    """Return the clock's readings that a run goes on with from `found`: those logged, or those of the checkpoint.

    A checkpoint is flushed to the disk and the log is not, so after a power cut the log may be short or gone; without
    its readings the run would get its whole wallclock again.
    Raises: CheckpointError for a damaged log, and for a short one beside an old checkpoint that holds no readings.
    """
    logged = read_log(log)
    needed = found.position.step + 1 if found is not None else 0
    held = found.readings_s if found is not None else []
    if len(held) == needed:
        return logged if logged[:needed] == held else held
    if len(logged) < needed:
        raise CheckpointError(
            f"{log}: expected at least {needed} readings for the checkpoint of step {needed - 1}, got {len(logged)}",
            hint="put the run's own clock.log back, or start the run again",
        )
    return logged


def put_in_order(
    run: RunFolder, damaged: list[tuple[int, str]], readings_s: list[float], *, first_step: int
) -> list[str]:
    """Make the run's folder what it was after `first_step`, and return notes on what was lost.

    Damaged checkpoints are set aside, unfinished files deleted, lines of later steps dropped from metrics.jsonl, and
    clock.log is written again if it does not begin with `readings_s`.
    Raises: CheckpointError if the system does not let it.
    """
    notes = []
    for step, problem in damaged:
        name = checkpoint.set_aside(run.checkpoints_path, step)
        notes.append(f"{problem}; it was set aside as {name} and the one before it is used")
    run.remove_unfinished_files()
    run.truncate_metrics(first_step)
    logged = read_log(run.clock_path)
    if logged != readings_s:
        with file_errors_as(CheckpointError, "write", run.clock_path):
            write_atomically(run.clock_path, "".join(f"{reading!r}\n" for reading in readings_s).encode())
        notes.append(
            f"{run.clock_path}: {len(logged)} readings, not those of the checkpoint of step {first_step}; "
            f"its {len(readings_s)} were written again"
        )
    return notes
