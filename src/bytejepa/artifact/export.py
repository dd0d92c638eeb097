"""From a run to an artifact, with the price of every stage side by side.

The reference calls the score of its raw weights "pre-quant" while it exports the average (spec section 7, item 7); here
raw weights, average and reloaded artifact are scored apart, so that the loss of quantisation is what it says.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from bytejepa.artifact.container import read_container, refuse_existing
from bytejepa.artifact.load import build, configuration_of, load, run_weights
from bytejepa.artifact.store import code_bytes, needs_calibration
from bytejepa.artifact.write import calibration_sequences, write_artifact
from bytejepa.config import RunConfig, replace
from bytejepa.data.loader import IdStream, leading_ids
from bytejepa.errors import ArtifactError
from bytejepa.model.precision import on_device
from bytejepa.model.transformer import TRAINING_ONLY
from bytejepa.presets import compact
from bytejepa.scoring.evaluate import Score, Scorer
from bytejepa.scoring.windows import check_windows
from bytejepa.training.distributed import Ranks
from bytejepa.training.runlog import RunFolder
from bytejepa.training.shared_scoring import score_on_ranks


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
    on_progress: Callable[[str, int, int], None] | None = None,
) -> ExportResult:
    """Write the averaged weights of `run` as an artifact and score every stage on its validation split.

    `data`: where the shards are if they moved; `score_bytes`: leading ids scored (default: as while training);
    `stride`: ids scored a window (default: the window, non-overlapping). The artifact is scored after being read back.
    `pack_compactly`: with `presets.compact`'s settings instead of the run's. `fit_bytes`: code and weights take as much of
    these as they can and never more; compactly, unless the run's own settings have a clip that can be fitted.
    With `ranks` the scoring is divided among them, on their devices; rank 0 writes.
    Raises: CheckpointError without a whole checkpoint, ArtifactError if `out` exists or cannot be written, or if the model
    cannot fit.
    """
    ranks = ranks or Ranks()
    with ranks.agree():
        config, raw = run_weights(run, averaged=False)
        _, average = run_weights(run)
        config = _packed_so(config, pack_compactly=pack_compactly, fit_bytes=fit_bytes)
        ids = validation_ids(run, config, data, score_bytes) if score else None  # before seconds of compression
        window, every = (0, 0) if ids is None else _windows(config, len(ids) - 1, stride)
        source_bytes, archive_bytes = code_bytes()
        if ranks.is_main:
            refuse_existing(out, force=force)
    with ranks.agree():
        if ranks.is_main:
            write_artifact(
                out,
                average,
                config,
                sequences=_calibration_sequences(run, config, data),
                code_bytes=archive_bytes,
                device=ranks.device,
                metadata={"run": run.name, **_provenance(run)},
                force=force,
                on_stage=on_progress,
            )
    with ranks.agree():
        container = read_container(out)
    info = container.info
    scores: dict[str, Score] = {}
    if ids is not None:
        models = {
            "raw": lambda: build(config, raw, source=str(run)),
            "average": lambda: build(config, average, source=str(run)),
            "artifact": lambda: load(out),
        }
        for stage, make in models.items():
            scores[stage] = score_on_ranks(
                Scorer(on_device(make(), ranks.device)),
                ids,
                ranks,
                window=window,
                stride=every,
                batch_ids=config.evaluation.batch_bytes,
                on_progress=_stage_progress(on_progress, f"score {stage}", len(ids) - 1),
            )
    return ExportResult(
        path=out,
        sha256=info.sha256,
        num_parameters=sum(value.numel() for name, value in average.items() if not name.startswith(TRAINING_ONLY)),
        weights_bytes=info.file_bytes,
        code_bytes=archive_bytes,
        code_source_bytes=source_bytes,
        limit_bytes=config.artifact.limit_bytes,
        fitted_clip=configuration_of(container.configuration, str(out)).artifact.clip_standard_deviations
        if config.artifact.fit
        else None,
        scores=scores,
    )


def _packed_so(config: RunConfig, *, pack_compactly: bool, fit_bytes: int | None) -> RunConfig:
    """Return the configuration that packs as `export` was asked to."""
    if pack_compactly or (fit_bytes is not None and config.artifact.clip not in ("standard_deviations", "sensitivity")):
        config = compact(config)
    return config if fit_bytes is None else replace(config, artifact={"fit": True, "limit_bytes": fit_bytes})


def _windows(config: RunConfig, num_targets: int, stride: int | None) -> tuple[int, int]:
    """Return (window, stride) that `num_targets` are scored in. Raises: ConfigError for a stride that cannot be."""
    window = config.evaluation.window_bytes
    stride = window if stride is None else stride
    check_windows(window=window, stride=stride)  # before short data make both smaller
    return min(window, num_targets), min(stride, num_targets)


def _calibration_sequences(run: Path, config: RunConfig, data: Path | None) -> npt.NDArray[np.int64] | None:
    if not needs_calibration(config.artifact):  # before the data are asked for
        return None
    place = data_of(run, data)
    return calibration_sequences(IdStream.open(place, "train"), config, place)


def data_of(run: Path, data: Path | None) -> Path:
    """Return where the run's shards are. Raises: ArtifactError if neither the run nor the caller says it."""
    recorded = RunFolder(run).read_manifest().get("data", {}).get("path")
    if data is None and recorded is None:
        raise ArtifactError(f"{run} does not say where its data is", hint="name it with --data")
    return data or Path(recorded)


def validation_ids(run: Path, config: RunConfig, data: Path | None, limit: int | None) -> npt.NDArray[np.uint16]:
    """Return the leading ids of the run's validation split. Raises: DataError if it cannot be found."""
    place = data_of(run, data)
    stream = IdStream.open(place, "val")
    return leading_ids(stream, limit or config.training.validation_bytes or stream.num_ids, place)


def _provenance(run: Path) -> dict[str, Any]:
    manifest = RunFolder(run).read_manifest()
    return {key: manifest[key] for key in ("fingerprint", "created", "git_commit", "versions") if key in manifest}


def _stage_progress(
    on_progress: Callable[[str, int, int], None] | None, stage: str, total: int
) -> Callable[[int], None] | None:
    if on_progress is None:
        return None
    return lambda done: on_progress(stage, done, total)
