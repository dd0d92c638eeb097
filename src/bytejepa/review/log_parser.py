"""Facts from a training log: scores, seconds, steps, bytes, seed and settings. Torch-free.

The lines are those of the challenge's scripts (`step:N/M val_loss:.. val_bpb:.. train_time:..ms`, `Total submission size
int6+zstd: N bytes`, `final_..._exact val_loss:.. val_bpb:..`). Many logs begin with the whole source of the script; lines
count only where numbers stand in them, which source code does not have there.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from typing import Any

MAX_LOG_BYTES = 50_000_000
MAX_LINE_CHARACTERS = 2000
_ENDLESS = re.compile(r"\d[\d,_]{39}")
"""Forty digits: no figure of a training run."""
_DIVERGED = 1e6
"""A loss from here on, in nats or bits, is no score."""
_NUMBER = r"(\d+(?:\.\d+)?(?:[eE][+-]?\d+)?)"
_SCORE = re.compile(
    r"^(?P<label>[^=\n]*?)\s*(?:stride[:=]\d+\s+)?\bval_loss[:=]\s*" + _NUMBER + r",?\s+val_bpb[:=]\s*" + _NUMBER
)
_STEP = re.compile(r"(?:\bstep[:=]?\s*|^)(\d+)\s*/\s*(\d+)")
_STEP_ALONE = re.compile(r"(?:step|iter(?:ation)?)[:=]?\s*\d+\b")
_TRAIN_TIME = re.compile(r"\btrain_time[:=]\s*" + _NUMBER + r"\s*(ms|s|m)\b")
_EVAL_TIME = re.compile(r"\b(?:eval_time|elapsed)[:=]\s*" + _NUMBER + r"\s*(ms|s)\b")
_TOTAL_EVAL_TIME = re.compile(r"\btotal_eval_time[:=]\s*" + _NUMBER + r"\s*(ms|s)\b", re.IGNORECASE)
_STEP_AVERAGE = re.compile(r"\bstep_avg[:=]\s*" + _NUMBER + r"\s*ms")
_SIZE = re.compile(
    r"^(?P<what>Serialized model|Total submission size|Code size|Submission size)(?P<how>[^:]*):\s*(\d[\d,_]*)\s*bytes",
    re.IGNORECASE,
)
_SUM = re.compile(
    r"(?P<model>\d[\d,_]*)(?:\s*bytes)?(?P<between>\s*\+\s*|\s+code[:=]\s*)(?P<code>\d[\d,_]*)(?:\s*(?:bytes|of|code))*"
    r"(?:\s*=\s*|\s+total[:=]\s*)(?P<total>\d[\d,_]*)"
)
"""A size taken apart: `A bytes + B code = C total`, `model:A code:B total:C`."""
_OTHER_BPB = re.compile(r"\b(?P<name>[a-z_]+bpb)\s*[:=≈]\s*(?P<value>\d+\.\d+)", re.IGNORECASE)
_SEED = re.compile(r"(?:^|[\s,(])seed\s*[:=]\s*(\d+)")
_PARAMETERS = re.compile(r"\bmodel_params[:=]\s*(\d[\d,_]*)")
_PAIR = re.compile(r"^([a-z][a-z0-9_]*)[:=](-?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?|True|False|None)$")
_SETTING = re.compile(r"^\s*([a-z][a-z0-9_]*):\s+(-?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?|True|False)\s*$")
_COUNTS = {
    "bytes": re.compile(r"\b(?:val|scored|eval)_?bytes[:=]\s*(\d[\d,_]*)"),
    "documents": re.compile(r"\b(?:val_)?(?:docs|documents)[:=]\s*(\d[\d,_]*)"),
    "tokens": re.compile(r"\bval_loader:.*\btokens[:=]\s*(\d[\d,_]*)|\bval_tokens[:=]\s*(\d[\d,_]*)"),
}
_RUNTIME_KEYS = re.compile(
    r"seed|run_id|time|loss|bpb|^step$|rank|params|memory|pid|port|tokens_per|elapsed|^lr$|momentum_now|scale|^eta|bytes|_ms$|_s$|reserved|allocated"
)
_RAW = re.compile(r"\b(?:raw|fp32|float32|bf16|fp16|uncompressed|unpacked)\b")
_COMPRESSOR = re.compile(r"\b(zstd|zstandard|brotli|lzma|zlib|lrzip|bz2)\b")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ScoreLine:
    """One evaluation that a log reports."""

    label: str
    """What stands before the loss, e.g. `final_int6_sliding_window_exact`."""
    loss_nats: float
    """Mean loss per symbol."""
    bpb: float
    line: int
    text: str
    evaluation_s: float | None
    """Seconds it took, where the line says so."""
    digits: int
    """Decimals of the printed bpb."""

    @property
    def is_final(self) -> bool:
        """Whether it belongs to the packed model: not a validation during training and not a diagnostic before packing."""
        lowered = self.label.lower()
        return not (_STEP.search(lowered) or _STEP_ALONE.match(lowered)) and not any(
            word in lowered for word in ("pre-quant", "pre_quant", "prequant", "diagnostic", "ema")
        )


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TrainingLog:
    """Everything that was found in one log."""

    file: str
    seed: int | None
    scores: tuple[ScoreLine, ...]
    steps: int | None
    planned_steps: int | None
    train_s: float | None
    step_ms: float | None
    evaluation_s: float | None
    """Seconds of the whole evaluation, where the log sums them up."""
    code_bytes: int | None
    model_bytes: int | None
    total_bytes: int | None
    size_line: int | None
    compressor: str
    parameters: int | None
    settings: dict[str, Any]
    counts: dict[str, int]
    reported_label: str = ""
    """Label of the evaluation that the submission claims; "" where that is the last one."""
    other_bpbs: dict[str, float] = dataclasses.field(default_factory=dict)
    """Bits per byte printed without a loss, the last of every name: `mix_bpb`."""

    @property
    def final(self) -> ScoreLine | None:
        """The evaluation that the submission reports: the claimed or the last one, an exact line before a rounded one."""
        final = [score for score in self.scores if score.is_final]
        if not final:
            return None
        last = next((score for score in reversed(final) if score.label == self.reported_label), final[-1])
        twins = [s for s in final if abs(s.bpb - last.bpb) < 1e-4 and s.digits > last.digits]
        return twins[-1] if twins else last


def _integer(text: str) -> int:
    return int(text.replace(",", "").replace("_", ""))


def _seconds(value: str, unit: str) -> float:
    return float(value) * {"ms": 1e-3, "s": 1.0, "m": 60.0}[unit]


def _literal(text: str) -> Any:
    if text in ("True", "False", "None"):
        return {"True": True, "False": False, "None": None}[text]
    return int(text) if re.fullmatch(r"-?\d+", text) else float(text)


@dataclasses.dataclass(slots=True)
class _Sizes:
    """The bytes of code, model and both, as the lines of a log come in."""

    code: int | None = None
    model: int | None = None
    total: int | None = None
    line: int | None = None
    """Where the total stands."""
    is_packed: bool = False
    """Whether the model's size is that of the packed one."""
    model_by: str = ""
    """Compressor that the model's line names."""
    total_by: str = ""
    """Compressor that the total's line names."""

    def read(self, line: str, number: int) -> None:
        """Take over what a line says about sizes."""
        if match := _SIZE.match(line):
            self._named(match, number)
        elif "code" in line.lower() and (match := _SUM.search(line)):
            self._summed(match, line, number)

    def _named(self, match: re.Match[str], number: int) -> None:
        what, how, size = match["what"].lower(), match["how"].lower(), _integer(match[3])
        packed = _COMPRESSOR.search(how)
        compressor = packed[1] if packed else ""
        if what == "code size":
            self.code = size
        elif what == "serialized model":
            is_packed = bool(packed or (how.strip() and not _RAW.search(how)))
            if is_packed or self.model is None:  # the packed size comes after the raw one
                self.model = size
            self.is_packed = self.is_packed or is_packed
            self.model_by = compressor or self.model_by
        else:
            if packed or self.total is None or self.is_packed:  # nor is a total of the raw size the last word
                self.total, self.line = size, number
            # "int8+zlib" often stays in the text of the total when the packing has changed: the model's line comes first
            self.total_by = compressor or self.total_by

    def _summed(self, match: re.Match[str], line: str, number: int) -> None:
        """Take a total that a line adds up; the total of the weights as they were before packing gives way to it."""
        model, code, total = (_integer(match[name]) for name in ("model", "code", "total"))
        if model + code != total or "comparison" in line.lower():
            return
        packed = _COMPRESSOR.search(line.lower())
        self.model, self.code, self.total, self.line = model, code, total, number
        self.model_by = packed[1] if packed else self.model_by


@dataclasses.dataclass(slots=True)
class _Progress:
    """Seed, steps and seconds, as the lines of a log come in: the last of each counts, of seeds the first."""

    seed: int | None = None
    steps: int | None = None
    planned_steps: int | None = None
    train_s: float | None = None
    step_ms: float | None = None
    evaluation_s: float | None = None
    parameters: int | None = None

    def read(self, line: str) -> None:
        """Take over what a line says."""
        if (match := _STEP.search(line)) and ("train_time" in line or "val_loss" in line):
            self.steps, self.planned_steps = int(match[1]), int(match[2])
        if match := _TRAIN_TIME.search(line):
            self.train_s = _seconds(match[1], match[2])
        if match := _TOTAL_EVAL_TIME.search(line):
            self.evaluation_s = _seconds(match[1], match[2])
        if match := _STEP_AVERAGE.search(line):
            self.step_ms = float(match[1])
        if self.seed is None and not re.search(r"[(\[{]", line) and (match := _SEED.search(line)):
            self.seed = int(match[1])
        if match := _PARAMETERS.search(line):
            self.parameters = _integer(match[1])


def parse_log(text: str, file: str) -> TrainingLog:
    """Return the facts of a log; what it does not say is None or empty."""
    sizes, progress = _Sizes(), _Progress()
    others: dict[str, float] = {}
    scores: list[ScoreLine] = []
    settings: dict[str, Any] = {}
    counts: dict[str, int] = {}
    for number, raw in enumerate(text.splitlines(), start=1):
        line = raw.strip()[:MAX_LINE_CHARACTERS]
        if not line or line.startswith("#") or _ENDLESS.search(line):
            continue
        if score := _score(line, number):
            scores.append(score)
        elif "bpb" in line.lower():
            others |= {match["name"].lower(): float(match["value"]) for match in _OTHER_BPB.finditer(line)}
        progress.read(line)
        sizes.read(line, number)
        for name, count in _counts(line):
            counts[name] = max(count, counts.get(name, 0))  # parts are logged beside the whole
        if progress.steps is None:  # what is printed during training differs from seed to seed
            settings |= _settings(line)
    seed_in_name = re.search(r"seed[_-]?(\d+)|_s(\d+)\b", file)
    return TrainingLog(
        file=file, seed=int(seed_in_name[1] or seed_in_name[2]) if seed_in_name else progress.seed, scores=tuple(scores),
        steps=progress.steps, planned_steps=progress.planned_steps, train_s=progress.train_s, step_ms=progress.step_ms,
        evaluation_s=progress.evaluation_s, code_bytes=sizes.code, model_bytes=sizes.model, total_bytes=sizes.total,
        size_line=sizes.line, compressor=sizes.model_by or sizes.total_by, parameters=progress.parameters, settings=settings,
        counts=counts, other_bpbs=others,
    )  # fmt: skip


def _counts(line: str) -> Iterator[tuple[str, int]]:
    """Yield how much of what was scored, as far as a line says it."""
    for name, pattern in _COUNTS.items():
        if match := pattern.search(line):
            yield name, _integer(next(group for group in match.groups() if group))


def _score(line: str, number: int) -> ScoreLine | None:
    match = _SCORE.match(line)
    if match is None:
        return None
    seconds = _EVAL_TIME.search(line)
    loss, bpb = float(match[2]), float(match[3])
    if not (loss < _DIVERGED and bpb < _DIVERGED):
        return None
    return ScoreLine(
        label=match["label"].strip(" :"), loss_nats=loss, bpb=bpb, line=number, text=line[:160],
        evaluation_s=_seconds(seconds[1], seconds[2]) if seconds else None, digits=len(match[3].partition(".")[2]),
    )  # fmt: skip


def _settings(line: str) -> dict[str, Any]:
    """Return what a line says about the configuration: `key: value`, or nothing but `key:value` pairs."""
    if match := _SETTING.match(line):
        pairs = [(match[1], match[2])]
    else:
        words = line.split()
        matches = [_PAIR.match(word) for word in words]
        if not words or sum(match is not None for match in matches) < len(words) or "train_loss" in line:
            return {}
        pairs = [(match[1], match[2]) for match in matches if match is not None]
    return {key: _literal(value) for key, value in pairs if not _RUNTIME_KEYS.search(key)}
