"""What a study found: `study.json` as dataclasses, written after every run and read by reports. Torch-free."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from bytejepa.errors import CheckpointError, ConfigError, file_errors_as
from bytejepa.files import write_atomically
from bytejepa.study.plan import Plan, plan_from_dict

FORMAT = "bytejepa-study"
FORMAT_VERSION = 1
FILE_NAME = "study.json"
PLAN_NAME = "plan.json"
"""In a study's folder: its plan, as `bytejepa ablate` reads it."""
EMBEDDED_DATA = "data"
"""In a study's folder: the embedded corpus, where no other data was named."""

Verdict = Literal["better", "worse", "tie", "undecided"]
"""`undecided`: fewer than two seeds, so that there is no measure of the noise."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Environment:
    """What all runs of a study must share; `attention` all runs of a variant."""

    processor: str
    device: str
    """`cpu`, or the name of the GPU."""
    world_size: int
    """Ranks."""
    num_threads: int
    """Of PyTorch, within an operation."""
    compiled: bool
    attention: str
    """Attention kernel."""
    python: str
    versions: dict[str, str]
    """Of `runlog.DECIDING_PACKAGES`."""
    code_sha256: str
    """Of the sources that decide a run: configuration, data, model, scoring, training, artifact."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RunResult:
    """One finished run, scored."""

    variant: str
    seed: int
    run: str
    """Its run folder, relative to the study's folder."""
    fingerprint: str
    """sha256 of configuration, data, scoring and versions: equal fingerprints, equal runs."""
    bpb: float
    """Bits per byte of the artifact: sliding windows, as the plan's evaluation says."""
    bpb_average: float
    """The same of the averaged weights before quantisation."""
    bpb_live: float
    """The same of the last weights, not averaged."""
    steps: int
    num_bytes: int
    """Ids read."""
    train_s: float
    """Seconds of training, pauses left out."""
    num_parameters: int
    artifact_bytes: int
    """The artifact's file: weights without code."""
    final_learning_rate_scale: float
    """Where training ended."""
    explained_variance: float | None
    """Share of the latents' variance that the predictor explains, mean over the lines that the log has of the last tenth of
    the run, at least its last one; None: no JEPA."""
    effective_rank: float | None
    """Of the latents' covariance, likewise."""
    latent_std: float | None
    """Root mean variance of the latents' dimensions, likewise: 1 for a standard normal, 0 collapsed."""
    environment: Environment

    @property
    def quantization_loss_bpb(self) -> float:
        """Bits per byte that the artifact costs more than the averaged weights."""
        return self.bpb - self.bpb_average


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class VariantSummary:
    """A variant over its finished seeds, and its paired differences to the baseline."""

    variant: str
    tests: str
    """What it tests, in a sentence."""
    num_seeds: int
    mean_bpb: float
    std_bpb: float | None
    """Sample standard deviation over seeds; None: fewer than two."""
    mean_train_s: float
    mean_bytes_per_s: float
    """Bytes read a second of training, of all its runs together."""
    mean_artifact_bytes: float
    mean_quantization_loss_bpb: float
    mean_explained_variance: float | None
    mean_effective_rank: float | None
    mean_latent_std: float | None
    difference_bpb: float | None
    """Mean over seeds of variant minus baseline: below zero is better; None: the baseline, or no common seed."""
    interval_low_bpb: float | None
    """Of the difference's 95 % confidence interval (Student's t, paired or with pooled noise, as the plan says); None: fewer than two
    common seeds."""
    interval_high_bpb: float | None
    p_value: float | None
    """Two-sided, of the same t-test."""
    p_corrected: float | None
    """After Holm's correction for the number of variants compared."""
    verdict: Verdict | None
    """None: the baseline itself."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class StudyResult:
    """All of study.json."""

    plan: Plan
    data_path: str
    """Folder of the shards, relative to the study's folder if it lies in it."""
    data_sha256: str
    environment: Environment | None
    """None: no run has finished."""
    runs: tuple[RunResult, ...]
    variants: tuple[VariantSummary, ...]
    """In the plan's order; those with a finished run."""
    notes: tuple[str, ...]
    """What a reader must know, a sentence each, for instance that one seed allows no interval."""

    @property
    def is_complete(self) -> bool:
        """Whether every run of the plan has finished."""
        return len(self.runs) == len(self.plan.variants) * len(self.plan.seeds)


def write_plan(folder: Path, plan: Plan) -> Path:
    """Write the plan as it was resolved into `folder`, as a plan file, and return its path. Raises: OSError."""
    path = folder / PLAN_NAME
    write_atomically(path, json.dumps(dataclasses.asdict(plan), indent=1).encode() + b"\n")
    return path


def write_study(folder: Path, study: StudyResult) -> Path:
    """Write study.json into `folder`, atomically, and return its path. Raises: CheckpointError."""
    path = folder / FILE_NAME
    content = study_record(study)
    with file_errors_as(CheckpointError, "write", path):
        write_atomically(path, json.dumps(content, indent=1).encode() + b"\n")
    return path


def study_record(study: StudyResult) -> dict[str, Any]:
    """Return what study.json holds."""
    head = {"format": FORMAT, "format_version": FORMAT_VERSION, "is_complete": study.is_complete}
    return {**head, **dataclasses.asdict(study)}


def read_study(path: Path) -> StudyResult:
    """Return what study.json at `path` (or in the folder `path`) says.

    Raises: CheckpointError if there is none, or it is damaged or of another version.
    """
    path = path / FILE_NAME if path.is_dir() else path
    with file_errors_as(CheckpointError, "read", path):
        content = path.read_bytes()
    try:
        values = json.loads(content)
        found = (values.pop("format", None), values.pop("format_version", None))
        if found != (FORMAT, FORMAT_VERSION):
            raise CheckpointError(f"{path}: expected {FORMAT} version {FORMAT_VERSION}, got {found[0]} {found[1]}")
        values.pop("is_complete", None)
        return _study_from_dict(values)
    except (ValueError, KeyError, TypeError, AttributeError, ConfigError) as problem:
        raise CheckpointError(f"{path}: damaged: {problem}") from None


def _study_from_dict(values: dict[str, Any]) -> StudyResult:
    environment = values["environment"]
    runs = tuple(run_from_dict(run) for run in values["runs"])
    return StudyResult(
        **{
            **values,
            "plan": plan_from_dict(values["plan"]),
            "environment": None if environment is None else Environment(**environment),
            "runs": runs,
            "variants": tuple(_summary_from_dict(variant, runs) for variant in values["variants"]),
            "notes": tuple(values["notes"]),
        }
    )


def _summary_from_dict(values: dict[str, Any], runs: Sequence[RunResult]) -> VariantSummary:
    # a study of an older version lacks the speed, not what it is made of
    speed = bytes_per_s([run for run in runs if run.variant == values["variant"]])
    return VariantSummary(**{"mean_bytes_per_s": speed, **values})


def bytes_per_s(runs: Sequence[RunResult]) -> float:
    """Return the bytes that `runs` read a second of training."""
    seconds = sum(run.train_s for run in runs)
    return sum(run.num_bytes for run in runs) / seconds if seconds else 0.0


def run_from_dict(values: dict[str, Any]) -> RunResult:
    """Return the run that `dataclasses.asdict` gave. Raises: TypeError, KeyError for another content."""
    return RunResult(**{**values, "environment": Environment(**values["environment"])})
