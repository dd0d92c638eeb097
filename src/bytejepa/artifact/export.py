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
from torch import Tensor

from bytejepa.artifact.container import ContainerInfo, read_container, write_container
from bytejepa.artifact.load import build, load, run_weights
from bytejepa.artifact.store import code_bytes, store_weights
from bytejepa.config import RunConfig
from bytejepa.config_json import to_dict
from bytejepa.data.loader import IdStream, leading_ids
from bytejepa.errors import ArtifactError
from bytejepa.model.transformer import TRAINING_ONLY
from bytejepa.scoring.evaluate import Score, Scorer
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


def write_artifact(
    path: Path,
    weights: dict[str, Tensor],
    config: RunConfig,
    *,
    metadata: dict[str, Any] | None = None,
    force: bool = False,
) -> ContainerInfo:
    """Quantise, pack and write `weights`; return the file's sizes. Raises: ArtifactError, leaving what existed."""
    return write_container(
        path,
        configuration=to_dict(config),
        tensors=store_weights(weights, config),
        metadata=metadata or {},
        codecs=(*config.artifact.codecs, "raw"),
        force=force,
    )


def export(
    run: Path,
    out: Path,
    *,
    data: Path | None = None,
    score_bytes: int | None = None,
    stride: int | None = None,
    score: bool = True,
    force: bool = False,
    ranks: Ranks | None = None,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> ExportResult:
    """Write the averaged weights of `run` as an artifact and score every stage on its validation split.

    `data`: where the shards are if they moved; `score_bytes`: leading ids scored (default: as while training);
    `stride`: ids scored a window (default: the window, non-overlapping). The artifact is scored after being read back.
    With `ranks` the scoring is divided among them, on their devices; rank 0 writes.
    Raises: CheckpointError without a whole checkpoint, ArtifactError if `out` exists or cannot be written.
    """
    config, raw = run_weights(run, averaged=False)
    _, average = run_weights(run)
    ids = validation_ids(run, config, data, score_bytes) if score else None  # before seconds of compression
    ranks = ranks or Ranks()
    if ranks.is_main:
        write_artifact(out, average, config, metadata={"run": run.name, **_provenance(run)}, force=force)
    ranks.barrier()
    info = read_container(out).info
    source_bytes, archive_bytes = code_bytes()
    scores: dict[str, Score] = {}
    if ids is not None:
        models = {
            "raw": lambda: build(config, raw, source=str(run)),
            "average": lambda: build(config, average, source=str(run)),
            "artifact": lambda: load(out),
        }
        for stage, make in models.items():
            window = min(config.evaluation.window_bytes, len(ids) - 1)
            scores[stage] = score_on_ranks(
                Scorer(make().to(ranks.device)),
                ids,
                ranks,
                window=window,
                stride=window if stride is None else min(stride, window),
                batch_ids=config.evaluation.batch_bytes,
                on_progress=_stage_progress(on_progress, stage, len(ids) - 1),
            )
    return ExportResult(
        path=out,
        sha256=info.sha256,
        num_parameters=sum(value.numel() for name, value in average.items() if not name.startswith(TRAINING_ONLY)),
        weights_bytes=info.file_bytes,
        code_bytes=archive_bytes,
        code_source_bytes=source_bytes,
        limit_bytes=config.artifact.limit_bytes,
        scores=scores,
    )


def validation_ids(run: Path, config: RunConfig, data: Path | None, limit: int | None) -> npt.NDArray[np.uint16]:
    """Return the leading ids of the run's validation split. Raises: DataError if it cannot be found."""
    recorded = RunFolder(run).read_manifest().get("data", {}).get("path")
    if data is None and recorded is None:
        raise ArtifactError(f"{run} does not say where its data is", hint="name it with --data, or use --no-score")
    place = data or Path(recorded)
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
