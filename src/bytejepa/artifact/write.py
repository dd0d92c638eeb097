"""Weights into an artifact file, as the settings say: calibrate, order, quantise, fit to a size, pack, write."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bytejepa.artifact.calibration import Calibration, calibrate
from bytejepa.artifact.container import ContainerInfo, refuse_existing, write_container
from bytejepa.artifact.fit import SizeError, fit
from bytejepa.artifact.load import build
from bytejepa.artifact.quantize import order_hidden_units
from bytejepa.artifact.store import needs_calibration, store_weights
from bytejepa.config import RunConfig
from bytejepa.config_json import to_dict
from bytejepa.data.loader import IdStream
from bytejepa.data.shards import check_ids
from bytejepa.errors import ArtifactError, DataError
from bytejepa.progress import StageProgress, stage_progress


def write_artifact(
    path: Path,
    weights: dict[str, Tensor],
    config: RunConfig,
    *,
    sequences: npt.NDArray[np.int64] | None = None,
    code_bytes: int = 0,
    device: torch.device | str = "cpu",
    metadata: dict[str, Any] | None = None,
    force: bool = False,
    on_stage: StageProgress | None = None,
) -> ContainerInfo:
    """Quantise, pack and write `weights`; return the file's sizes.

    `sequences`: training text, (sequences, T), for settings that need it (`needs_calibration`); it is read on `device`.
    With `artifact.fit` file and `code_bytes` together take as much of `artifact.limit_bytes` as they can, never more.
    Raises: ConfigError if the file exists, ArtifactError if it cannot be written or cannot fit, leaving what existed.
    """
    refuse_existing(path, force=force)  # before seconds or minutes of work
    settings, calibration = config.artifact, None
    if needs_calibration(settings) and sequences is not None:
        calibration = _calibrate(weights, config, sequences, device, on_stage)
        weights = {name: value.to(device) for name, value in weights.items()}
    if settings.hidden_order == "by_scale":
        by_sensitivity = settings.clip == "sensitivity"
        weights, calibration = order_hidden_units(weights, calibration, by_sensitivity=by_sensitivity)
    if not settings.fit:
        tensors = store_weights(weights, config, calibration)
    else:
        room = settings.limit_bytes - code_bytes
        if room <= 0:
            raise ArtifactError(
                f"the code alone takes {code_bytes} bytes, no room is left in {settings.limit_bytes}",
                hint="give it more",
            )
        try:
            found = fit(
                weights,
                config,
                calibration,
                file_bytes=room,
                metadata=metadata or {},
                on_progress=stage_progress(on_stage, "fit"),
            )
        except SizeError as problem:
            raise ArtifactError(
                f"the model cannot be packed into {settings.limit_bytes} bytes: the smallest possible are about"
                f" {problem.smallest_bytes + code_bytes}, {code_bytes} of them code",
                hint="train a smaller model; or allow a few bytes more than that, since the file also holds the budget",
            ) from problem
        tensors, config = found.tensors, found.config
    return write_container(
        path,
        configuration=to_dict(config),
        tensors=tensors,
        metadata=metadata or {},
        codecs=(*settings.codecs, "raw"),
        force=force,
    )


def calibration_sequences(stream: IdStream, config: RunConfig, place: Path) -> npt.NDArray[np.int64] | None:
    """Return sequences of a training split, (sequences, T), spread evenly over it; None if the settings need none.

    Raises: DataError if it is shorter than one sequence or holds ids that are none; `place` is named.
    """
    if not needs_calibration(config.artifact):
        return None
    length = max(length for _, length in config.data.stages)
    if stream.num_ids < length:
        raise DataError(f"the training split of {place} has {stream.num_ids} ids, a sequence takes {length}")
    count = max(1, min(config.artifact.calibration_bytes, stream.num_ids) // length)
    starts = np.linspace(0, stream.num_ids - length, count).astype(np.int64)
    sequences = [stream.read(int(start), length) for start in starts]
    for sequence in sequences:
        check_ids(sequence, place)
    return np.stack(sequences).astype(np.int64)


def _calibrate(
    weights: dict[str, Tensor],
    config: RunConfig,
    sequences: npt.NDArray[np.int64],
    device: torch.device | str,
    on_stage: StageProgress | None,
) -> Calibration:
    model = build(config, weights, source="the weights to pack").to(device)
    for name, value in model.named_parameters():  # the passes would only say that something is not finite
        if not bool(torch.isfinite(value).all()):
            raise ArtifactError(
                f"tensor {name!r} has values that are not finite", hint="do not export a diverged model"
            )
    ids = torch.from_numpy(sequences).to(device)
    return calibrate(
        model, ids, damping=config.artifact.gptq_damping, on_progress=stage_progress(on_stage, "calibrate")
    )
