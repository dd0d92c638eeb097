"""The budgets: bytes measured again from the files, seconds from the logs, against 16,000,000 decimal bytes and 600 s."""

from __future__ import annotations

import base64
import io
import lzma
import re
import tokenize
from pathlib import Path

from bytejepa.bits import ARTIFACT_LIMIT_BYTES
from bytejepa.review.findings import Evidence, Finding, Status, Weight
from bytejepa.review.log_parser import TrainingLog
from bytejepa.review.submission import Submission
from bytejepa.review.wrappers import unpack

TIME_LIMIT_S = 600.0
STEP_TOLERANCE_S = 1.0
"""A run stops at the first step past the cap; logs of accepted records end up to a second over it."""
MEBIBYTES_LIMIT = 16 * 1024 * 1024
_VALIDATION_AS_TRAINING = re.compile(
    r"\b(?:ln|cp|mv|rsync|install)\b[^|;&]*?[/_\s-]val(?:idation)?[^/\s]*\.bin\b[^|;&]*?\S*[/_\s-]train[^/\s]*(?:\.bin|/)"
    r"|\b(?:ln|cp|mv|rsync|install|rename)\b.*\bval(?:idation)?/train|\bs/_?val(?:idation)?_?/_?train"
    r"|\bTRAIN_(?:FILES?|DATA|PATH|PATTERN|GLOB|SHARDS?)=[\"']?(?:[^\s\"';&]*[/_])?val(?:idation)?[_*/]"
)
_MEBIBYTES = re.compile(
    r"16\s*\*\s*1024\s*\*\s*1024|16\s*\*\s*1024\s*\*\*\s*2|16\s*\*\s*2\s*\*\*\s*20|16\s*<<\s*20|16[_,]?777[_,]?216|\b16(?:\.0)? ?MiB\b"
)


_IMPORT = re.compile(r"^[ \t]*(?:from|import)[ \t]+([A-Za-z_][\w.]*)", re.MULTILINE)
_README_TOTAL = re.compile(
    r"\b(?:artifact|submission|total|bytes_total)\b[^\n.;]{0,60}?(?<![\d.,])(\d{1,3}(?:,\d{3}){2,6}|\d{7,9})(?:\s*(?:bytes|B)\b|\s*\||\W*$)",
    re.IGNORECASE | re.MULTILINE,
)
"""A total in words: `Artifact size | 13,361,078 bytes`."""
_TOTALS = (
    "bytes_total", "artifact_bytes", "total_bytes", "artifact_size_bytes", "submission_bytes", "total_submission_bytes",
)  # fmt: skip
_FOREIGN_SOURCES = (".c", ".cc", ".cpp", ".cu", ".h", ".cuh", ".metal")


def shipped_code(submission: Submission) -> list[Path]:
    """Return the script, the files of the folder that it imports, directly or not, and the foreign sources it names."""
    if submission.script is None:
        return []
    found, texts = [submission.script], []
    there = {path for path in submission.root.rglob("*.py") if path.is_file() and not path.is_symlink()}
    for path in found:  # grows while it is walked
        texts.append(path.read_text(encoding="utf-8", errors="replace"))
        for name in _IMPORT.findall(texts[-1]):
            relative = Path(*name.split("."))
            for helper in (submission.root / relative.with_suffix(".py"), submission.root / relative / "__init__.py"):
                if helper in there and helper not in found:
                    found.append(helper)
    foreign = (path for path in sorted(submission.root.rglob("*")) if path.suffix in _FOREIGN_SOURCES)
    return found + [path for path in foreign if path.is_file() and any(path.name in text for text in texts)]


def packed_code_bytes(source: bytes) -> int:
    """Return what a script weighs as the usual wrapper of lzma and base85: what its author could have counted."""
    # a dictionary of the source's length packs it no worse, and need not be 64 MiB of memory
    dictionary = max(len(source), 4096)
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": dictionary}]
    packed = base64.b85encode(lzma.compress(source, format=lzma.FORMAT_RAW, filters=filters))
    return len(packed) + 110  # the line that unpacks it


def size_findings(submission: Submission) -> list[Finding]:
    """Judge code and weights against the cap, for every seed that a log tells of and for the files that are there."""
    findings: list[Finding] = []
    files = shipped_code(submission)
    code = sum(path.stat().st_size for path in files) if files else None
    claimed = _claimed_total(submission)
    totals: list[tuple[int, Evidence]] = []
    for log in submission.logs:
        total = _total_of(log, code)
        if total is not None:
            totals.append((total, Evidence(file=log.file, line=log.size_line, text=f"{total:,} bytes")))
    for path in submission.weights:
        size = path.stat().st_size + (code or 0)
        where = path.relative_to(submission.root).as_posix()
        if path.suffix not in (".pt", ".pth", ".bin") or size <= MEBIBYTES_LIMIT:
            totals.append(
                (size, Evidence(file=where, text=f"{path.stat().st_size:,} bytes of weights + {code or 0:,} of code"))
            )
    if claimed is not None:
        totals.append((claimed, Evidence(file="submission.json", text=f"{claimed:,} bytes claimed")))
    findings.append(_cap(totals) if totals else _cap_of_readme(submission))
    findings.append(_code(submission, files))
    if match := _MEBIBYTES.search(_code_without_comments(submission) + submission.readme):
        worst = max((total for total, _ in totals), default=0)
        findings.append(
            Finding(
                check="budget.units",
                status=Status.FAIL,
                weight=Weight.RULE if worst > ARTIFACT_LIMIT_BYTES else Weight.NOTE,
                summary="the cap is taken as 16 MiB; it is 16,000,000 bytes",
                evidence=(Evidence(text=match[0]),),
            )
        )
    return findings


def _code_without_comments(submission: Submission) -> str:
    """Return the script's text as it runs: a comment may speak of 16 MiB of something else."""
    if submission.script is None:
        return ""
    source = submission.script.read_text(encoding="utf-8", errors="replace")
    try:
        source = unpack(source).source
        tokens = tokenize.generate_tokens(io.StringIO(source).readline)
        comments = [token for token in tokens if token.type == tokenize.COMMENT]
    except (SyntaxError, ValueError, RecursionError, tokenize.TokenError):
        return source
    lines = source.split("\n")
    for token in comments:
        row, column = token.start
        lines[row - 1] = lines[row - 1][:column]
    return "\n".join(lines)


def _total_of(log: TrainingLog, code: int | None) -> int | None:
    if log.total_bytes is not None:
        return log.total_bytes
    return None if log.model_bytes is None or code is None else log.model_bytes + code


def _claimed_total(submission: Submission) -> int | None:
    """Return the largest total that submission.json claims, of the whole or of any seed."""
    per_seed = submission.claims.get("seed_results")
    if isinstance(per_seed, dict):
        per_seed = list(per_seed.values())
    parts = [submission.claims, *(per_seed if isinstance(per_seed, list) else ())]
    found = [
        value
        for part in parts
        if isinstance(part, dict)
        for key in _TOTALS
        if isinstance(value := part.get(key), int) and not isinstance(value, bool) and value > 0
    ]
    return max(found, default=None)


def _cap_of_readme(submission: Submission) -> Finding:
    """Judge the totals that stand in the README alone; where only some are over the cap, it cannot be said whose they are."""
    lines = [(int(m[1].replace(",", "")), m[0].strip()) for m in _README_TOTAL.finditer(submission.readme)]
    totals = [(size, Evidence(file="README.md", text=text[:120])) for size, text in lines if size > 1_000_000]
    over = [size > ARTIFACT_LIMIT_BYTES for size, _ in totals]
    if any(over) and not all(over):
        return Finding(
            check="budget.bytes",
            status=Status.UNKNOWN,
            weight=Weight.AUTHOR,
            summary="totals stand in the README only, some over the cap of 16,000,000: which one is the artifact's?",
            evidence=tuple(evidence for _, evidence in totals),
        )
    return _cap(totals)


def _cap(totals: list[tuple[int, Evidence]]) -> Finding:
    check = "budget.bytes"
    if not totals:
        return Finding(
            check=check,
            status=Status.UNKNOWN,
            weight=Weight.AUTHOR,
            summary="no file and no log says how many bytes the artifact has",
        )
    over = [(total, evidence) for total, evidence in totals if total > ARTIFACT_LIMIT_BYTES]
    worst = max(totals, key=lambda item: item[0])[0]
    figures = {
        "largest_total_bytes": worst,
        "limit_bytes": ARTIFACT_LIMIT_BYTES,
        "margin_bytes": ARTIFACT_LIMIT_BYTES - worst,
    }
    if over:
        unit = " (under 16 MiB, but the cap is decimal)" if worst <= MEBIBYTES_LIMIT else ""
        summary = f"the artifact has {worst:,} bytes, {worst - ARTIFACT_LIMIT_BYTES:,} over the cap of 16,000,000{unit}"
        return Finding(
            check=check, status=Status.FAIL, summary=summary, evidence=tuple(e for _, e in over), figures=figures
        )
    summary = f"largest total {worst:,} bytes, {ARTIFACT_LIMIT_BYTES - worst:,} under the cap"
    return Finding(
        check=check, status=Status.PASS, summary=summary, evidence=tuple(e for _, e in totals), figures=figures
    )


def _code(submission: Submission, files: list[Path]) -> Finding:
    check = "budget.code_bytes"
    if submission.script is None or not files:
        return Finding(
            check=check, status=Status.FAIL, weight=Weight.AUTHOR, summary="there is no training script in the folder"
        )
    contents = [path.read_bytes() for path in files]
    code, packed = sum(map(len, contents)), packed_code_bytes(b"".join(contents))
    counted = {log.code_bytes for log in submission.logs if log.code_bytes is not None}
    claimed = submission.claims.get("bytes_code")
    counted |= {claimed} if isinstance(claimed, int) and not isinstance(claimed, bool) and claimed > 0 else set()
    figures = {"raw_bytes": code, "packed_bytes": min(packed, code)}
    name = submission.script.relative_to(submission.root).as_posix()
    off = [value for value in counted if value not in (code, packed) and abs(value - code) > 0.02 * code]
    of_files = f" in {len(files)} files" if len(files) > 1 else ""
    summary = f"{code:,} bytes of code as shipped{of_files}, {min(packed, code):,} packed"
    if off and min(off) < code:
        evidence = (Evidence(file=name, text=f"{code:,} bytes; the author counted {min(off):,}"),)
        return Finding(
            check=check,
            status=Status.FAIL,
            weight=Weight.NOTE,
            summary=f"{summary}; counted as {min(off):,}",
            evidence=evidence,
            figures=figures,
        )
    return Finding(
        check=check,
        status=Status.PASS,
        summary=summary,
        evidence=(Evidence(file=name, text=f"{code:,} bytes"),),
        figures=figures,
    )


def time_findings(submission: Submission) -> list[Finding]:
    """Judge training and evaluation seconds of every log against the caps; outside the 10-minute track they are notes."""
    weight = Weight.NOTE if submission.is_non_record else Weight.RULE
    findings = []
    train = [(log.train_s, log.file) for log in submission.logs if log.train_s is not None]
    if not train:
        findings.append(
            Finding(
                check="budget.train_seconds",
                status=Status.UNKNOWN,
                weight=Weight.NOTE if submission.is_non_record else Weight.AUTHOR,
                summary="no log says how long training took",
            )
        )
    else:
        worst = max(seconds for seconds, _ in train)
        over = tuple(
            Evidence(file=f, text=f"{s:.1f} s of training") for s, f in train if s > TIME_LIMIT_S + STEP_TOLERANCE_S
        )
        findings.append(
            Finding(
                check="budget.train_seconds",
                status=Status.FAIL if over else Status.PASS,
                weight=weight,
                evidence=over,
                summary=f"training took {'up to ' if len(train) > 1 else ''}{worst:.1f} s of 600 s",
                figures={"train_s": worst},
            )
        )
    seconds = [(_evaluation_seconds(log), log) for log in submission.logs if _evaluation_seconds(log) is not None]
    if seconds:
        worst = max(value for value, _ in seconds if value is not None)
        over = tuple(
            Evidence(file=log.file, line=log.final.line if log.final else None, text=f"{value:.1f} s of evaluation")
            for value, log in seconds
            if value is not None and value > TIME_LIMIT_S
        )
        findings.append(
            Finding(
                check="budget.evaluation_seconds",
                status=Status.FAIL if over else Status.PASS,
                weight=weight,
                evidence=over,
                summary=f"the reported evaluation took {worst:.1f} s of 600 s",
                figures={"evaluation_s": worst},
            )
        )
    else:
        findings.append(
            Finding(
                check="budget.evaluation_seconds",
                status=Status.UNKNOWN,
                weight=Weight.NOTE,
                summary="no log says how long the reported evaluation took",
            )
        )
    return findings


def _evaluation_seconds(log: TrainingLog) -> float | None:
    """Return the seconds of the reported evaluation: its own line's, those of the rounded line beside it, or the sum."""
    final = log.final
    if final is None or final.evaluation_s is not None:
        own = None if final is None else final.evaluation_s
    else:
        near = [
            s.evaluation_s
            for s in log.scores
            if s.is_final and abs(s.bpb - final.bpb) < 1e-4 and s.evaluation_s is not None
        ]
        own = near[-1] if near else None
    return max((seconds for seconds in (own, log.evaluation_s) if seconds is not None), default=None)


def data_findings(submission: Submission) -> list[Finding]:
    """Judge the commands that lay out the data: validation shards under the name of training shards."""
    check = "data.training_files"
    lines = [line for text in submission.commands for line in text.replace("\\\n", " ").splitlines()]
    passed_on = tuple(Evidence(text=line.strip()[:200]) for line in lines if _VALIDATION_AS_TRAINING.search(line))
    if passed_on:
        summary = "validation shards are passed off as training shards: the model is trained on what it is scored on"
        return [Finding(check=check, status=Status.FAIL, summary=summary, evidence=passed_on)]
    return [
        Finding(check=check, status=Status.PASS, summary="no command passes validation shards off as training shards")
    ]


def folder_findings(submission: Submission) -> list[Finding]:
    """Judge whether everything that a submission needs is there."""
    missing = [
        name
        for name, there in (
            ("README.md", bool(submission.readme)),
            ("submission.json", not submission.claims_problem.startswith("there is no")),
            ("train_gpt.py", submission.script is not None),
            ("a training log", bool(submission.logs)),
        )
        if not there
    ]
    if missing:
        return [
            Finding(
                check="folder.complete",
                status=Status.FAIL,
                weight=Weight.AUTHOR,
                summary=f"missing: {', '.join(missing)}",
            )
        ]
    if submission.claims_problem:
        return [
            Finding(
                check="folder.complete",
                status=Status.FAIL,
                weight=Weight.AUTHOR,
                summary=submission.claims_problem,
                evidence=(Evidence(file="submission.json"),),
            )
        ]
    empty = [log.file for log in submission.logs if not log.scores]
    if len(empty) == len(submission.logs):
        return [
            Finding(
                check="folder.complete",
                status=Status.FAIL,
                weight=Weight.AUTHOR,
                summary="no log reports a val_bpb",
                evidence=tuple(Evidence(file=file) for file in empty),
            )
        ]
    others = f"; {len(submission.other_logs)} logs of other runs are left out" if submission.other_logs else ""
    return [
        Finding(
            check="folder.complete",
            status=Status.PASS,
            summary=f"README, submission.json, script and {len(submission.logs)} logs{others}",
            evidence=tuple(Evidence(file=file, text="of another run") for file in submission.other_logs),
        )
    ]
