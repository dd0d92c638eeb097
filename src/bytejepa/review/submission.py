"""A submission folder on disk: which file is what, what the run command sets, what submission.json claims. Torch-free."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

from bytejepa.errors import DataError
from bytejepa.review.log_parser import MAX_LOG_BYTES, TrainingLog, parse_log

MAX_TEXT_BYTES = 4_000_000
MAX_TITLE_CHARACTERS = 200
_ENVIRONMENT = re.compile(r"(?:^|[\s;&])(?:export\s+)?([A-Z][A-Z0-9_]{1,60})=(\"[^\"]*\"|'[^']*'|[^\s\\;&]*)")
_DEFAULT = re.compile(r"^\$\{[A-Z][A-Z0-9_]*:?[-=]([^{}$]*)\}$")
"""A value that a shell script falls back on: `${EVAL_STRIDE:-64}`."""
_WEIGHTS = (
    ".ptz",
    ".bjm",
    ".safetensors",
    ".pt",
    ".pth",
    ".bin",
    ".br",
    ".zst",
    ".xz",
    ".lzma",
    ".npz",
    ".npy",
    ".pkl",
)
_LOGGED_SCORE = re.compile(r"^.*\bval_bpb[:=]\s*\d", re.MULTILINE)
_FENCE = re.compile(r"```[a-z]*\n(.*?)```", re.DOTALL)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Submission:
    """What lies in the folder."""

    root: Path
    readme: str
    """"" if there is none."""
    claims: dict[str, Any]
    """Content of submission.json; empty if there is none or it is broken."""
    claims_problem: str
    """Why submission.json cannot be used; empty if it can."""
    script: Path | None
    logs: tuple[TrainingLog, ...]
    other_logs: tuple[str, ...]
    """Logs further down that are left out: of another configuration, or of a seed that has a log at the top."""
    weights: tuple[Path, ...]
    """Files that look like a packed model."""
    settings: dict[str, str]
    """Environment variables that the README's run command, or a shell script beside it, sets."""
    commands: tuple[str, ...]
    """Code blocks of the README and shell scripts."""

    @property
    def title(self) -> str:
        """The name claimed, in one line, or the folder's."""
        name = self.claims.get("name")
        words = name.split() if isinstance(name, str) else []
        return " ".join(words)[:MAX_TITLE_CHARACTERS] or self.root.resolve().name

    @property
    def is_non_record(self) -> bool:
        """Whether it says of itself that it does not compete under the 10-minute rules."""
        text = (
            f"{self.claims.get('track', '')} {self.title} {self.root.resolve().parent.name} {self.readme[:400]}".lower()
        )
        return "non-record" in text or "non_record" in text or "unlimited" in text


def read_submission(root: Path) -> Submission:
    """Return the content of a submission folder. Raises: DataError if it cannot be read."""
    try:
        files = sorted(path for path in root.rglob("*") if path.is_file() and not path.is_symlink())
    except OSError as problem:
        raise DataError(f"cannot read {root}: {problem.strerror}") from problem
    readme = next((path for path in files if path.name.lower() == "readme.md" and path.parent == root), None)
    text = _read(readme) if readme else ""
    claims, problem_text = _claims(root / "submission.json")
    logs, other_logs = _logs(root, files)
    script = _script(root, files)
    commands = (*_FENCE.findall(text), *(_read(path) for path in files if path.suffix == ".sh"))
    return Submission(
        root=root,
        readme=text,
        claims=claims,
        claims_problem=problem_text,
        script=script,
        logs=logs,
        other_logs=other_logs,
        weights=tuple(path for path in files if path.suffix in _WEIGHTS and "tokenizer" not in path.name),
        settings=_settings(commands),
        commands=commands,
    )


def _read(path: Path, limit: int = MAX_TEXT_BYTES) -> str:
    try:
        with path.open("rb") as file:
            return file.read(limit).decode("utf-8", errors="replace")
    except OSError:
        return ""


def _claims(path: Path) -> tuple[dict[str, Any], str]:
    if not path.is_file():
        return {}, "there is no submission.json"
    try:
        claims = json.loads(_read(path))
    except (ValueError, RecursionError) as problem:
        return {}, f"submission.json is not JSON: {problem}"
    return (claims, "") if isinstance(claims, dict) else ({}, "submission.json is not an object")


def _logs(root: Path, files: list[Path]) -> tuple[tuple[TrainingLog, ...], tuple[str, ...]]:
    """Return one log a seed, and the files of logs that are not the submission's own.

    A copy of another log (`train.log` beside `train_seed7.log`) is left out. Where logs lie at the top, one further down
    counts if it is of the same configuration and of another seed: it may as well be of an ablation.
    """
    logs: list[TrainingLog] = []
    others: list[str] = []
    seen: dict[str, str] = {}
    at_top = False
    for path in sorted(files, key=lambda path: path.parent != root):
        if path.suffix not in (".log", ".txt") or "requirements" in path.name:
            continue
        text = _read(path, MAX_LOG_BYTES)
        if path.suffix == ".txt" and not _LOGGED_SCORE.search(text):
            continue
        if text in seen.values():
            name = next(name for name, other in seen.items() if other == text)
            if "seed" in path.name and "seed" not in name:
                logs = [dataclasses.replace(log, file=path.name) if log.file == name else log for log in logs]
            continue
        seen[path.name] = text
        log = parse_log(text, path.name)
        if path.parent != root and at_top and not _belongs(log, logs):
            others.append(path.relative_to(root).as_posix())
            continue
        at_top = at_top or path.parent == root
        logs.append(log)
    return tuple(logs), tuple(others)


def _belongs(log: TrainingLog, logs: list[TrainingLog]) -> bool:
    """Return whether a log is of the configuration of `logs` and of a seed that none of them has."""
    first = logs[0]
    shared = first.settings.keys() & log.settings.keys()
    return (
        all(first.settings[key] == log.settings[key] for key in shared)
        and (None in (first.parameters, log.parameters) or first.parameters == log.parameters)
        and (log.seed is None or log.seed not in {other.seed for other in logs})
    )


def _script(root: Path, files: list[Path]) -> Path | None:
    if (root / "train_gpt.py").is_file():
        return root / "train_gpt.py"
    scripts = [path for path in files if path.suffix == ".py" and path.parent == root]
    named = [path for path in scripts if path.name.startswith(("train", "main", "run"))]
    return next(iter(named or scripts), None)


def _settings(commands: tuple[str, ...]) -> dict[str, str]:
    """Return the environment of the first command that runs the script; a later ablation command does not count."""
    settings: dict[str, str] = {}
    for text in commands:
        if re.search(r"torchrun|train_gpt|python3? ", text):
            values = {name: _DEFAULT.sub(r"\1", value.strip("\"'")) for name, value in _ENVIRONMENT.findall(text)}
            settings |= {name: value for name, value in values.items() if "$" not in value}
            if settings:
                break
    settings.pop("SEED", None)
    return settings
