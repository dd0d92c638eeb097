"""A model from a file: an artifact, or the averaged weights of a run."""

from __future__ import annotations

import dataclasses
import weakref
from pathlib import Path

import torch
from torch import Tensor

from bytejepa.artifact.container import read_container
from bytejepa.artifact.packing import StoredTensor, restore
from bytejepa.artifact.store import store_weights
from bytejepa.config import RunConfig
from bytejepa.config_json import from_dict
from bytejepa.errors import ArtifactError, CheckpointError, ConfigError
from bytejepa.model.initialization import fill_sigreg_directions
from bytejepa.model.precision import Precision, on_device
from bytejepa.model.transformer import ByteLM, prediction_config, prediction_weights
from bytejepa.training import checkpoint
from bytejepa.training.runlog import RunFolder
from bytejepa.training.starting_point import StartingPoint


def load(path: Path | str, *, device: str = "cpu", precision: Precision = "auto") -> ByteLM:
    """Return the model in `path`, ready to predict: an artifact (`.bjm`), or a run folder (its averaged weights).

    Float32 weights. It computes in float32, but on CUDA in bfloat16 as in training, unless it was trained in float32 or
    `precision` asks for that. Raises: ArtifactError or CheckpointError that says what is wrong.
    """
    path = Path(path)
    config, weights, stored = _read(path)
    model = on_device(build(config, weights, source=str(path)), device, precision=precision)
    if stored is not None:
        _stored_forms[model] = stored
    return model


def configuration_in(path: Path) -> RunConfig:
    """Return the configuration of the model in `path`, an artifact or a run folder. Raises: as `starting_point`."""
    if path.is_dir():
        return RunFolder(path).read_config()
    return configuration_of(read_container(path).configuration, str(path))


def starting_point(path: Path) -> StartingPoint:
    """Return the model in `path`, an artifact or a run folder, for another run to begin with.

    Raises: ArtifactError or CheckpointError that says what is wrong with it.
    """
    config, weights, _ = _read(path)
    return StartingPoint(source=str(path.resolve()), config=config, weights=weights)


def _read(path: Path) -> tuple[RunConfig, dict[str, Tensor], dict[str, StoredTensor] | None]:
    """Return (configuration, weights, their storage form in an artifact) of an artifact or a run's averaged weights."""
    if path.is_dir():
        run = read_run(path)
        return run.config, run.average, None
    container = read_container(path)
    return configuration_of(container.configuration, str(path)), container.tensors, container.stored


_stored_forms: weakref.WeakKeyDictionary[ByteLM, dict[str, StoredTensor]] = weakref.WeakKeyDictionary()
"""What the artifact of a loaded model held: codes that no quantiser would find again in the weights."""


def stored_weights(model: ByteLM) -> dict[str, StoredTensor]:
    """Return the weights of `model` in their storage form: as its artifact held them, if it still has those weights,
    otherwise as export would store them."""
    weights: dict[str, Tensor] = dict(model.named_parameters())
    stored = _stored_forms.get(model)
    if stored is not None and all(torch.equal(weights[name].cpu(), restore(stored[name])) for name in weights):
        return stored
    return store_weights(weights, model.config)


def configuration_of(values: dict[str, object], where: str) -> RunConfig:
    """Return the configuration stored in an artifact. Raises: ArtifactError if this version cannot read it."""
    try:
        return from_dict(values, where=where)
    except ConfigError as problem:
        raise ArtifactError(f"{problem.message}", hint=problem.hint or "was it written by another version?") from None


def build(config: RunConfig, weights: dict[str, Tensor], *, source: str) -> ByteLM:
    """Return a ByteLM of `config` with `weights`. Raises: ArtifactError if they do not fit each other."""
    weights, config = prediction_weights(weights, config), prediction_config(config)
    model = ByteLM(config)
    expected = dict(model.named_parameters())
    for name, parameter in expected.items():
        if name not in weights or weights[name].shape != parameter.shape:
            got = tuple(weights[name].shape) if name in weights else "nothing"
            raise ArtifactError(f"{source}: tensor {name}: expected shape {tuple(parameter.shape)}, got {got}")
    unknown = sorted(set(weights) - set(expected))
    if unknown:
        raise ArtifactError(f"{source}: tensor {unknown[0]} has no place in a model of its configuration")
    with torch.no_grad():
        for name, parameter in expected.items():
            parameter.copy_(weights[name])
    fill_sigreg_directions(model, config.training.seed)
    return model.eval()


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TrainedRun:
    """What a run holds: its configuration, and the weights of one of its checkpoints by name."""

    folder: RunFolder
    config: RunConfig
    raw: dict[str, Tensor]
    """As last trained."""
    average: dict[str, Tensor]
    """Averaged over the run (EMA or SWA); the raw ones of a run that keeps no average."""
    step: int
    """Steps taken by then."""


def read_run(path: Path) -> TrainedRun:
    """Return what the run in `path` holds, as of its newest whole checkpoint.

    Raises: CheckpointError if the folder is no run or has no whole checkpoint.
    """
    folder = RunFolder(path)
    config = folder.read_config()
    found = checkpoint.read_newest(folder.checkpoints_path)
    if found is None:
        raise CheckpointError(f"{path} has no checkpoint yet", hint=f"go on with `{folder.resume_command}`")
    raw = found.part("model")
    average = found.part("average") or raw
    return TrainedRun(folder=folder, config=config, raw=raw, average=average, step=found.position.step)
