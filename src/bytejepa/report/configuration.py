"""The configuration of a run against its preset, and the commands that repeat it."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bytejepa.config import RunConfig
from bytejepa.config_json import from_dict
from bytejepa.presets import PRESETS, preset
from bytejepa.report.inputs import LoggedRun
from bytejepa.study.plan import built_in_plans
from bytejepa.study.results import EMBEDDED_DATA, PLAN_NAME, StudyResult


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """One setting of a run beside its preset's."""

    name: str
    """section.setting"""
    value: Any
    preset_value: Any

    @property
    def differs(self) -> bool:
        """Whether the run has it otherwise than its preset."""
        return bool(self.value != self.preset_value)


def settings_against_preset(config: RunConfig) -> tuple[str, tuple[Setting, ...]]:
    """Return the preset that shares most settings with `config`, and every setting beside that preset's."""
    own = _flat(config)
    candidates = {name: _flat(preset(name)) for name in PRESETS}
    nearest = min(candidates, key=lambda name: sum(candidates[name][key] != value for key, value in own.items()))
    return nearest, _settings_against(preset(nearest), config)


def _settings_against(base: RunConfig, config: RunConfig) -> tuple[Setting, ...]:
    theirs = _flat(base)
    return tuple(Setting(name=key, value=value, preset_value=theirs[key]) for key, value in _flat(config).items())


def _flat(config: RunConfig) -> dict[str, Any]:
    return {
        f"{section.name}.{field.name}": getattr(getattr(config, section.name), field.name)
        for section in dataclasses.fields(config)
        for field in dataclasses.fields(getattr(config, section.name))
    }


def shown(value: Any) -> str:
    """Return a setting's value for people."""
    if value is None or value is False:
        return "off"
    if value is True:
        return "on"
    if isinstance(value, tuple):
        return ", ".join(shown(part) for part in value)
    return f"{value:,}" if isinstance(value, int) and abs(value) >= 10_000 else str(value)


def train_words(config: RunConfig, started_from: Mapping[str, Any] | None = None) -> list[str]:
    """Return the words after `bytejepa train` that give `config`: its nearest preset, or the model that the run began with
    (`started_from` of its manifest), and what differs."""
    if started_from is None:
        name, settings = settings_against_preset(config)
    else:
        name = str(started_from.get("path"))
        settings = _settings_against(
            from_dict(started_from.get("configuration", {}), where=f"manifest of {name}"), config
        )
    words = [name]
    for setting in settings:
        if setting.differs:
            words += _option(setting.name, setting.value)
    return words


def _option(name: str, value: Any) -> list[str]:
    section, _, setting = name.replace("_", "-").partition(".")
    if isinstance(value, bool):
        return [f"--{section}.{setting}" if value else f"--{section}.no-{setting}"]
    parts = value if isinstance(value, tuple) else (value,)
    flat = [part for pair in parts for part in (pair if isinstance(pair, tuple) else (pair,))]
    return [f"--{section}.{setting}", *map(str, flat)]


def commands(runs: Sequence[LoggedRun], scored_ids: int | None) -> list[str]:
    """Return the command lines that train, export and score `runs` again, ready for a shell.

    `scored_ids`: leading ids of the validation split that are scored; None: all.
    """
    lines = []
    for run in runs:
        data, out = str(run.manifest.get("data", {}).get("path", "SHARDS")), run.name
        ranks = int(run.manifest.get("world_size", 1))
        launcher = (
            ["bytejepa"] if ranks == 1 else ["torchrun", "--standalone", f"--nproc_per_node={ranks}", "-m", "bytejepa"]
        )
        settings = train_words(run.config, run.manifest.get("started_from"))
        lines.append(_command([*launcher, "train", *settings, "--data", data, "--out", out]))
    first = runs[0]
    data, artifact = str(first.manifest.get("data", {}).get("path", "SHARDS")), f"{Path(first.name).name}.bjm"
    lines.append(_command(["bytejepa", "export", first.name, "-o", artifact]))
    limit = [] if scored_ids is None else ["--max-bytes", str(scored_ids)]
    lines.append(_command(["bytejepa", "eval", artifact, "--data", data, *limit]))
    return lines


def _command(words: list[str]) -> str:
    """Return a command line for a shell; one of many options takes a line for each."""
    command = shlex.join(words)
    return command.replace(" --", " \\\n    --") if len(command) > 100 else command


def study_command(study: StudyResult | None, folder: Path | None) -> str:
    """Return the command line that runs a study again, or goes on with it; empty without one."""
    if study is None or folder is None:
        return ""
    out, plan = folder.resolve().name, study.plan
    words = [str(Path(out) / PLAN_NAME)]
    if not (folder / PLAN_NAME).is_file():  # of an older version
        words = [plan.name if plan.name in built_in_plans() else f"{plan.name}.toml", "--seeds", *map(str, plan.seeds)]
        words += ["--steps", str(plan.budget.steps)] if plan.budget.steps is not None else []
    data = [] if study.data_path == EMBEDDED_DATA else ["--data", study.data_path]
    return shlex.join(["bytejepa", "ablate", *words, "--out", out, *data])
