"""What an artifact holds against what is read back from it, in logits and in the score of a little text."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bytejepa.artifact.container import read_container, write_container
from bytejepa.artifact.load import configuration_of, load, read_run
from bytejepa.artifact.packing import restore
from bytejepa.artifact.quantize import order_hidden_units
from bytejepa.artifact.store import needs_calibration, store_weights
from bytejepa.artifact.write import write_artifact
from bytejepa.config import RunConfig, replace
from bytejepa.model.transformer import ByteLM, prediction_config
from bytejepa.review.behaviour import Predictions, round_trip
from bytejepa.review.findings import Finding
from bytejepa.scoring.evaluate import Scorer, target_losses

STRIDES = 8
"""Length of the text that is scored, in strides."""


def run_round_trip(path: Path) -> Finding:
    """Judge whether the averaged weights of the run in `path` come back from an artifact as they were stored.

    Packed as the run says, but with each weight to its nearest code and no search for a size: what `gptq` and
    `sensitivity` choose the codes by is training text, which may be gone. Raises: CheckpointError, ArtifactError.
    """
    trained = read_run(path)
    config, weights = trained.config, trained.average
    plain = {"rounding": "nearest", "clip": "standard_deviations"} if needs_calibration(config.artifact) else {}
    config = replace(config, artifact={**plain, "fit": False})
    if config.artifact.hidden_order == "by_scale":
        weights, _ = order_hidden_units(weights, None, by_sensitivity=False)  # so that sums are rounded alike
    stored = {name: restore(tensor) for name, tensor in store_weights(weights, config).items()}

    return _round_trip(config, stored, lambda place: write_artifact(place, weights, config))


def artifact_round_trip(path: Path) -> Finding:
    """Judge whether what the artifact at `path` holds is the same when it is written once more. Raises: ArtifactError."""
    container = read_container(path)
    config = configuration_of(container.configuration, str(path))
    return _round_trip(
        config,
        container.tensors,
        lambda place: write_container(
            place,
            configuration=container.configuration,
            tensors=container.stored,
            metadata=container.metadata,
            codecs=(*config.artifact.codecs, "raw"),
        ),
    )


def _round_trip(config: RunConfig, stored: dict[str, Tensor], write: Callable[[Path], object]) -> Finding:
    """Compare a model that is given `stored` directly with the one that is loaded from what `write` writes."""
    model = ByteLM(prediction_config(config))
    model.load_state_dict(stored, strict=False)  # buffers are no weights
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "model.bjm"

        def export() -> Path:
            write(place)
            return place

        return round_trip(
            export,
            lambda where: _logits_and_prices(load(where)),
            _logits_and_prices(model.eval()),
            length=STRIDES * _stride(config) + 5,
        )


def _stride(config: RunConfig) -> int:
    """Return a short stride of windows that breaks no chunk."""
    chunks = config.model.chunk_stride_bytes if config.model.chunk_blocks is not None else 1
    return math.lcm(config.jepa.chunk_bytes, chunks)


def _logits_and_prices(model: ByteLM) -> Predictions:
    """Return what a model makes of ids (1, T): all logits, and the nats of every target in sliding windows, one vector."""
    stride = _stride(model.config)

    def predict(ids: Tensor) -> Tensor:
        text = ids[0].numpy().astype(np.uint16)
        prices = [nats.flatten() for _, nats in target_losses(Scorer(model), text, window=4 * stride, stride=stride)]
        return torch.cat((model.logits(ids).flatten(), *prices))

    return predict
