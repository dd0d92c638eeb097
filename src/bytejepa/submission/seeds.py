"""Finished runs as seeds of one submission: checked against each other, packed, scored, and their logs."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from bytejepa.artifact.export import calibration_text
from bytejepa.artifact.load import build, read_run
from bytejepa.artifact.write import write_artifact
from bytejepa.config import RunConfig, replace
from bytejepa.config_json import to_dict
from bytejepa.data.vocabulary import BOS
from bytejepa.errors import ArtifactError, CheckpointError
from bytejepa.model.precision import on_device
from bytejepa.progress import StageProgress, stage_count
from bytejepa.scoring.evaluate import Score, Scorer
from bytejepa.scoring.windows import window_and_stride
from bytejepa.submission import log_lines
from bytejepa.submission.program import packed_scorer
from bytejepa.training import checkpoint, schedule
from bytejepa.training.clock import read_log
from bytejepa.training.distributed import Ranks
from bytejepa.training.runlog import RunFolder
from bytejepa.training.shared_scoring import score_on_ranks


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class FinishedRun:
    """A run whose schedule has ended."""

    folder: Path
    config: RunConfig
    steps: int
    train_s: float
    num_bytes: int
    """Ids read."""
    machine: dict[str, object]
    """Its manifest."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SeedResult:
    """A run, packed and scored."""

    run: FinishedRun
    num_parameters: int
    weights_bytes: int
    average: Score
    """Of the averaged weights before packing, windows that do not overlap."""
    roundtrip: Score
    """Of the artifact, read back, windows that do not overlap."""
    sliding: Score
    """Of the artifact in sliding windows: the score that is submitted."""
    roundtrip_s: float
    sliding_s: float

    @property
    def seed(self) -> int:
        """The run's seed."""
        return self.run.config.training.seed


def read_runs(folders: Sequence[Path]) -> list[FinishedRun]:
    """Return the runs in `folders`. Raises: CheckpointError unless all are finished and differ in the seed alone."""
    runs = [_read_run(folder) for folder in folders]
    first = to_dict(replace(runs[0].config, training={"seed": 0}))
    for run in runs[1:]:
        other = to_dict(replace(run.config, training={"seed": 0}))
        different = [f"{s}.{name}" for s in first for name in first[s] if first[s][name] != other[s][name]]
        if different:
            raise CheckpointError(
                f"{run.folder} ran with another configuration than {runs[0].folder}: {', '.join(different[:4])}",
                hint="the seeds of a submission differ in the seed alone",
            )
    seeds = [run.config.training.seed for run in runs]
    if len(set(seeds)) < len(seeds):
        raise CheckpointError(f"two runs have the same seed: {', '.join(map(str, seeds))}")
    data = {str(run.machine.get("data", {}).get("sha256_of_ends")) for run in runs}  # type: ignore[attr-defined]
    if len(data) > 1:
        raise CheckpointError("the runs were trained on different data", hint="use runs on the same shards")
    return runs


def _read_run(folder: Path) -> FinishedRun:
    run = RunFolder(folder)
    config = run.read_config()
    newest = checkpoint.read_newest(run.checkpoints_path)
    metrics, manifest = run.read_metrics(), run.read_manifest()
    if begun_with := manifest.get("started_from"):
        raise CheckpointError(
            f"{folder} began with the weights of {begun_with.get('path')}",
            hint="a submission's training counts from random weights; use a run of a preset",
        )
    if config.training.attention == "blocked":
        raise CheckpointError(
            f"{folder} asks for training.attention blocked, whose kernels a submission's script does not have",
            hint="use a run with training.attention auto or flash",
        )
    if newest is None or not metrics:
        raise CheckpointError(f"{folder} has no checkpoint yet", hint=f"go on with `{run.resume_command}`")
    at, readings_s = newest.position, read_log(run.clock_path)
    # the last line of the log may hold what the clock said at the beginning of the last step
    elapsed_s = readings_s[at.step] if at.step < len(readings_s) else max(line["elapsed_s"] for line in metrics)
    progress = schedule.progress(config.schedule, step=at.step, num_bytes=at.num_bytes, elapsed_s=elapsed_s)
    if progress < 1 and metrics[-1]["progress"] < 1:
        raise CheckpointError(f"{folder} stopped at {progress:.0%} of its schedule", hint=f"`{run.resume_command}`")
    return FinishedRun(
        folder=folder,
        config=config,
        steps=at.step,
        train_s=elapsed_s,
        num_bytes=at.num_bytes,
        machine=manifest,
    )


def pack_and_score(
    run: FinishedRun,
    ids: npt.NDArray[np.uint16],
    artifact: Path,
    code_bytes: int,
    ranks: Ranks,
    data: Path | None = None,
    on_progress: StageProgress | None = None,
) -> SeedResult:
    """Write the run's artifact to `artifact` and score averaged weights, round trip and sliding windows.

    `data`: the run's shards if they moved; settings that calibrate read training text there.

    With several ranks the scoring is divided among them; rank 0 writes.
    Raises: ArtifactError if weights and code are over the budget.
    """
    with ranks.agree():
        trained = read_run(run.folder)
        config = trained.config
    with ranks.agree():
        if ranks.is_main:
            write_artifact(  # as the script does, which knows nothing of a run folder
                artifact,
                trained.average,
                config,
                sequences=calibration_text(trained, data),
                code_bytes=code_bytes,
                device=ranks.device,
                force=True,
            )
    with ranks.agree():
        weights_bytes, limit_bytes = artifact.stat().st_size, config.artifact.limit_bytes
        if weights_bytes + code_bytes > limit_bytes:  # before minutes of scoring
            raise ArtifactError(
                f"{run.folder}: weights of {weights_bytes:,} bytes and code of {code_bytes:,} are over the budget of {limit_bytes:,}",
                hint="--packed makes the code smaller; a smaller model or fewer bits the weights",
            )
        averaged = Scorer(on_device(build(config, trained.average, source=str(run.folder)), ranks.device))
        packed = packed_scorer(artifact, config, ranks)
    score = functools.partial(_timed_score, config, ids, ranks, on_progress)
    average, _ = score("averaged weights", averaged, sliding=False)
    roundtrip, roundtrip_s = score("round trip", packed, sliding=False)
    sliding, sliding_s = score("sliding windows", packed, sliding=True)
    return SeedResult(
        run=run,
        num_parameters=sum(parameter.numel() for parameter in packed.model.parameters()),
        weights_bytes=weights_bytes,
        average=average,
        roundtrip=roundtrip,
        sliding=sliding,
        roundtrip_s=roundtrip_s,
        sliding_s=sliding_s,
    )


def _timed_score(
    config: RunConfig,
    ids: npt.NDArray[np.uint16],
    ranks: Ranks,
    on_progress: StageProgress | None,
    what: str,
    scorer: Scorer,
    *,
    sliding: bool,
) -> tuple[Score, float]:
    """Return the score of ids[1:], in windows that slide or that do not overlap, and its seconds."""
    window, stride = window_and_stride(config.evaluation, sliding=sliding)
    begin = time.perf_counter()
    result = score_on_ranks(
        scorer,
        ids,
        ranks,
        window=window,
        stride=stride,
        batch_ids=config.evaluation.batch_bytes,
        on_progress=stage_count(on_progress, f"seed {config.training.seed}, {what}", len(ids) - 1),
    )
    return result, time.perf_counter() - begin


def log_of(result: SeedResult, *, code_bytes: int, num_documents: int) -> str:
    """Return a seed's log in the challenge's form: settings, steps as recorded, sizes, scores."""
    config, run = result.run.config, result.run
    lines = [
        f"written by bytejepa submission from the metrics of the run {run.folder.name}",
        *log_lines.settings_lines(config),
        f"world_size: {run.machine.get('world_size', 1)}",
        f"device: {run.machine.get('device', 'unknown')}",
        log_lines.parameters_line(result.num_parameters),
    ]
    for metrics in RunFolder(run.folder).read_metrics():
        step, elapsed_s = int(metrics["step"]), metrics["elapsed_s"]
        if "train_loss_nats" in metrics:
            loss = metrics["train_loss_nats"]
            lines.append(log_lines.train_line(config, step=step, loss_nats=loss, elapsed_s=elapsed_s))
        if "val_bpb" in metrics:
            average = metrics["val_bpb_average"]
            lines.append(f"step:{step} validation of the run val_bpb:{metrics['val_bpb']:.4f} averaged:{average:.4f}")
    lines += [
        log_lines.end_line(config, step=run.steps, elapsed_s=run.train_s),
        log_lines.average_line(result.average),
        *log_lines.size_lines(config, weights_bytes=result.weights_bytes, code_bytes=code_bytes),
        log_lines.final_line(config, result.roundtrip, kind="roundtrip", evaluation_s=result.roundtrip_s),
        log_lines.final_line(config, result.sliding, kind="sliding_window", evaluation_s=result.sliding_s),
        log_lines.counts_line(result.sliding, num_documents),
    ]
    return "\n".join(lines) + "\n"


def documents_in(ids: npt.NDArray[np.uint16]) -> int:
    """Return how many documents begin in `ids`."""
    return int((ids == BOS).sum())
