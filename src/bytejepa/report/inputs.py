"""From the paths on the command line to runs, grouped by configuration, and the study they belong to."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bytejepa.config import RunConfig
from bytejepa.config_json import to_dict
from bytejepa.errors import CheckpointError, ConfigError
from bytejepa.study.results import FILE_NAME as STUDY_FILE_NAME
from bytejepa.study.results import PLAN_NAME, StudyResult, read_study
from bytejepa.training.clock import read_log, steps_and_seconds
from bytejepa.training.runlog import RunFolder


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class LoggedRun:
    """A run as its folder tells it."""

    path: Path
    config: RunConfig
    manifest: dict[str, Any]
    metrics: list[dict[str, float]]
    """The lines of metrics.jsonl; at least one."""
    step_starts_s: list[float]
    """Seconds of training at the start of each step, the last of them where training ended; empty without clock.log."""

    @property
    def name(self) -> str:
        """Name of the folder."""
        return self.path.name

    @property
    def seed(self) -> int:
        """Seed of initialisation and data order."""
        return self.config.training.seed

    @property
    def steps(self) -> int:
        """Steps taken: the log's last line may be of an earlier one, the clock is read at every one."""
        return steps_and_seconds(self.metrics, self.step_starts_s)[0]

    @property
    def num_bytes(self) -> int:
        """Ids read."""
        return self.steps * self.config.data.batch_bytes

    @property
    def train_s(self) -> float | None:
        """Seconds of training by the clock, the last step's too; without one the last that were logged, if any."""
        return steps_and_seconds(self.metrics, self.step_starts_s)[1]

    def last(self, key: str) -> float | None:
        """Return the last logged value of `key`, None if it was never logged."""
        return next((line[key] for line in reversed(self.metrics) if key in line), None)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Configuration:
    """Runs that differ in nothing but the seed: of one configuration, on the same data, from the same beginning."""

    label: str
    runs: tuple[LoggedRun, ...]

    @property
    def config(self) -> RunConfig:
        """The configuration, with the first run's seed."""
        return self.runs[0].config

    @property
    def seeds(self) -> str:
        """How many runs and which seeds, in words."""
        if len(self.runs) == 1:
            return f"1 run, seed {self.runs[0].seed}"
        return f"{len(self.runs)} runs, seeds {', '.join(str(run.seed) for run in self.runs)}"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ReportInputs:
    """What a report is about."""

    configurations: tuple[Configuration, ...]
    """In the order given; of a study, in its plan's order."""
    study: StudyResult | None
    study_path: Path | None


def read_inputs(paths: Sequence[Path]) -> ReportInputs:
    """Return the runs in `paths`: run folders, or one study's folder.

    Raises: CheckpointError for a folder that is neither, or a run without a line in its log; ConfigError for a mixture.
    """
    if not paths:
        raise ConfigError("report needs a run or a study", hint="name one or more run folders, or one study's folder")
    studies = [path for path in paths if (path / STUDY_FILE_NAME).is_file()]
    for path in paths:
        if path not in studies and (path / PLAN_NAME).is_file() and (path / "runs").is_dir():
            raise CheckpointError(f"{path}: no run of the study has finished yet", hint="go on with `bytejepa ablate`")
    if studies and len(paths) > 1:
        raise ConfigError("expected run folders or one study's folder, got both or several", hint=f"leave {studies[0]}")
    if not studies:
        distinct = list({path.resolve(): path for path in paths}.values())
        return ReportInputs(configurations=_grouped([read_run(p) for p in distinct]), study=None, study_path=None)
    study = read_study(studies[0])
    if not study.runs:
        raise CheckpointError(
            f"{studies[0]}: no run of the study has finished yet", hint="go on with `bytejepa ablate`"
        )
    configurations = tuple(
        Configuration(label=variant.name, runs=tuple(read_run(studies[0] / result.run) for result in results))
        for variant in study.plan.variants
        if (results := [result for result in study.runs if result.variant == variant.name])
    )
    return ReportInputs(configurations=configurations, study=study, study_path=studies[0])


def read_run(path: Path) -> LoggedRun:
    """Return the run in `path`. Raises: CheckpointError if it is none or its log is empty or damaged."""
    if not path.is_dir():
        raise CheckpointError(f"{path} is no folder", hint="name a run's or a study's folder")
    folder = RunFolder(path)
    config = folder.read_config()
    metrics, starts = folder.read_metrics(), read_log(folder.clock_path)
    if not metrics:
        raise CheckpointError(f"{path} has logged nothing yet", hint="wait for its first steps")
    return LoggedRun(path=path, config=config, manifest=folder.read_manifest(), metrics=metrics, step_starts_s=starts)


def _grouped(runs: list[LoggedRun]) -> tuple[Configuration, ...]:
    groups: dict[str, list[LoggedRun]] = {}
    for run in runs:
        values = to_dict(run.config)
        del values["training"]["seed"]
        # a mean over runs of other data, or that went on from other weights, would be of nothing
        data = run.manifest.get("data", {}).get("sha256_of_ends")
        begun_with = run.manifest.get("started_from", {}).get("weights_sha256")
        groups.setdefault(json.dumps([values, data, begun_with], sort_keys=True), []).append(run)
    names = [run.name for run in runs]
    return tuple(
        Configuration(
            label=str(group[0].path) if names.count(group[0].name) > 1 else group[0].name + _and_more(group),
            runs=tuple(group),
        )
        for group in groups.values()
    )


def _and_more(group: list[LoggedRun]) -> str:
    return f" and {len(group) - 1} more" if len(group) > 1 else ""
