"""From a run to an artifact, with the price of every stage side by side.

The reference calls the score of its raw weights "pre-quant" while it exports the average (spec section 7, item 7); here
raw weights, average and reloaded artifact are scored apart, so that the loss of quantisation is what it says.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from bytejepa.artifact.container import ContainerInfo, read_container, refuse_existing
from bytejepa.artifact.load import TrainedRun, build, configuration_of, load, read_run
from bytejepa.artifact.store import code_bytes, needs_calibration
from bytejepa.artifact.write import calibration_sequences, write_artifact
from bytejepa.config import RunConfig, replace
from bytejepa.data.loader import IdStream, validation_ids
from bytejepa.errors import ConfigError
from bytejepa.model.precision import on_device
from bytejepa.model.transformer import ByteLM, prediction_weights
from bytejepa.presets import compact
from bytejepa.progress import StageProgress, stage_count
from bytejepa.scoring.evaluate import Score, Scorer
from bytejepa.scoring.windows import window_and_stride
from bytejepa.training.distributed import Ranks
from bytejepa.training.shared_scoring import score_on_ranks

PROVENANCE = ("fingerprint", "created", "git_commit", "versions")
"""What an artifact repeats of its run's manifest."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ExportResult:
    """An artifact, what it weighs and what its making cost."""

    path: Path
    sha256: str
    num_parameters: int
    weights_bytes: int
    """The artifact file."""
    code_bytes: int
    """The package's source as an importable zip."""
    code_source_bytes: int
    """The package's source as it stands."""
    limit_bytes: int
    fitted_clip: float | None
    """The clip in standard deviations that was found to fit; None if nothing was fitted."""
    scores: dict[str, Score]
    """Of `raw` weights, their `average` and the reloaded `artifact`; empty if nothing was scored."""

    @property
    def total_bytes(self) -> int:
        """Bytes counted against the budget: weights and zipped code."""
        return self.weights_bytes + self.code_bytes

    @property
    def bits_per_parameter(self) -> float:
        """Bits of the file a parameter."""
        return 8 * self.weights_bytes / self.num_parameters

    @property
    def fits(self) -> bool:
        """Whether weights and code are within the budget."""
        return self.total_bytes <= self.limit_bytes


def export(
    run: Path,
    out: Path,
    *,
    data: Path | None = None,
    score_bytes: int | None = None,
    stride: int | None = None,
    score: bool = True,
    pack_compactly: bool = False,
    fit_bytes: int | None = None,
    force: bool = False,
    ranks: Ranks | None = None,
    on_progress: StageProgress | None = None,
) -> ExportResult:
    """Write the averaged weights of `run` as an artifact and score every stage on its validation split.

    `data`: where the shards are if they moved; `score_bytes`: leading ids scored (default: as while training);
    `stride`: ids scored a window (default: the window, non-overlapping). The artifact is scored after being read back.
    `pack_compactly`: with `presets.compact`'s settings instead of the run's. `fit_bytes`: code and weights take as much of
    these as they can and never more; compactly, unless the run's own settings have a clip that can be fitted.
    With `ranks` the scoring is divided among them, on their devices; rank 0 writes.
    Raises: CheckpointError without a whole checkpoint, or if the shards are not told of; ConfigError if `out` exists, or
    for `data` of which nothing would be read; ArtifactError if `out` cannot be written, or if the model cannot fit.
    """
    ranks = ranks or Ranks()
    with ranks.agree():
        trained = read_run(run)
        config = _packed_so(trained.config, pack_compactly=pack_compactly, fit_bytes=fit_bytes)
        trained = dataclasses.replace(trained, config=config)
        scoring = _scoring(trained, data, score_bytes, stride) if score else None  # before seconds of compression
        if scoring is None and data is not None and not needs_calibration(config.artifact):
            raise ConfigError(
                f"--data has no effect with --no-score: nothing of {data} is read to pack {run}", hint="leave it out"
            )
        source_bytes, archive_bytes = code_bytes()
        if ranks.is_main:
            refuse_existing(out, force=force)
    with ranks.agree():
        if ranks.is_main:
            device = ranks.device
            pack_run(
                trained, out, data=data, code_bytes=archive_bytes, device=device, force=force, on_stage=on_progress
            )
    with ranks.agree():
        container = read_container(out)
    scores = {} if scoring is None else _scores_of_stages(trained, out, scoring, ranks, on_progress)
    fitted = configuration_of(container.configuration, str(out)).artifact.clip_standard_deviations
    return ExportResult(
        path=out,
        sha256=container.info.sha256,
        num_parameters=sum(value.numel() for value in prediction_weights(trained.average, config).values()),
        weights_bytes=container.info.file_bytes,
        code_bytes=archive_bytes,
        code_source_bytes=source_bytes,
        limit_bytes=config.artifact.limit_bytes,
        fitted_clip=fitted if config.artifact.fit else None,
        scores=scores,
    )


def pack_run(
    trained: TrainedRun,
    out: Path,
    *,
    data: Path | None = None,
    code_bytes: int = 0,
    device: torch.device | str = "cpu",
    force: bool = False,
    on_stage: StageProgress | None = None,
) -> ContainerInfo:
    """Write the averaged weights of `trained` as the artifact `out`, packed as its configuration says.

    `data`: where its shards are if they moved; training text is read there if the packing needs it. The rest as
    `write_artifact`. Raises: ArtifactError, and CheckpointError or DataError if that text cannot be found.
    """
    manifest = trained.folder.read_manifest()
    metadata = {key: manifest[key] for key in PROVENANCE if key in manifest}
    return write_artifact(
        out,
        trained.average,
        trained.config,
        sequences=calibration_text(trained, data),
        code_bytes=code_bytes,
        device=device,
        metadata={"run": trained.folder.path.name, **metadata},
        force=force,
        on_stage=on_stage,
    )


def calibration_text(trained: TrainedRun, data: Path | None = None) -> npt.NDArray[np.int64] | None:
    """Return the training text, (sequences, T), by which the run's weights are packed; None if its settings need none.

    Raises: CheckpointError or DataError if it cannot be found.
    """
    if not needs_calibration(trained.config.artifact):  # before the data are asked for
        return None
    shards = trained.folder.data_path(data)
    return calibration_sequences(IdStream.open(shards, "train"), trained.config, shards)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Scoring:
    """What every stage is scored on, and how."""

    ids: npt.NDArray[np.uint16]
    window: int
    stride: int


def _scoring(trained: TrainedRun, data: Path | None, score_bytes: int | None, stride: int | None) -> _Scoring:
    """Return how to score a run. Raises: ConfigError for a stride that cannot be, and what the shards raise."""
    config = trained.config
    window, every = window_and_stride(config.evaluation, stride=stride, sliding=False)
    ids = validation_ids(trained.folder.data_path(data), score_bytes or config.training.validation_bytes)
    return _Scoring(ids=ids, window=window, stride=every)


def _scores_of_stages(
    trained: TrainedRun, artifact: Path, how: _Scoring, ranks: Ranks, on_progress: StageProgress | None
) -> dict[str, Score]:
    return {
        stage: score_on_ranks(
            Scorer(on_device(model, ranks.device)),
            how.ids,
            ranks,
            window=how.window,
            stride=how.stride,
            batch_ids=trained.config.evaluation.batch_bytes,
            on_progress=stage_count(on_progress, f"score {stage}", len(how.ids) - 1),
        )
        for stage, model in _models_of_stages(trained, artifact)
    }


def _models_of_stages(trained: TrainedRun, artifact: Path) -> Iterator[tuple[str, ByteLM]]:
    """Yield the model of every stage, each built when it is its turn."""
    source = str(trained.folder.path)
    yield "raw", build(trained.config, trained.raw, source=source)
    yield "average", build(trained.config, trained.average, source=source)
    yield "artifact", load(artifact)


def _packed_so(config: RunConfig, *, pack_compactly: bool, fit_bytes: int | None) -> RunConfig:
    """Return the configuration that packs as `export` was asked to."""
    if pack_compactly or (fit_bytes is not None and config.artifact.clip not in ("standard_deviations", "sensitivity")):
        config = compact(config)
    return config if fit_bytes is None else replace(config, artifact={"fit": True, "limit_bytes": fit_bytes})
