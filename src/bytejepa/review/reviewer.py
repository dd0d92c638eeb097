"""`review`: which checks a target gets, in which order, and the verdict. Torch-free until a model has to be built."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from bytejepa.errors import ConfigError, DataError, file_errors_as
from bytejepa.review.budget import data_findings, folder_findings, size_findings, time_findings
from bytejepa.review.claims import claimed_bpb, with_claimed_evaluation
from bytejepa.review.findings import Evidence, Finding, Review, Status, Weight, judge
from bytejepa.review.scores import score_findings
from bytejepa.review.source_scan import scan_source
from bytejepa.review.submission import Submission, read_submission
from bytejepa.review.switches import logged_switches, with_switches

ARTIFACT_SUFFIX = ".bjm"


def review(target: Path | str, *, run: bool = False) -> Review:
    """Return the review of a submission folder, one of our run folders, or an artifact.

    `run`: also execute the submission's script, in a subprocess without network and with bounds on time, memory and
    files (see `smoke`). Without it nothing of a submission is ever executed.

    Raises: DataError if the target is none of the three, ConfigError for `run` with another than a submission.
    """
    path = Path(target)
    is_artifact = path.is_file() and path.suffix == ARTIFACT_SUFFIX
    is_run = (path / "config.json").is_file() and (
        (path / "metrics.jsonl").is_file() or (path / "checkpoints").is_dir()
    )
    if run and (is_artifact or is_run):
        what = "an artifact" if is_artifact else "a run folder"
        raise ConfigError(f"{path} is {what}: only a submission folder has a script to run", hint="leave out --run")
    if is_artifact:
        from bytejepa.review.own_targets import review_artifact

        return review_artifact(path)
    if is_run:
        from bytejepa.review.own_targets import review_run

        return review_run(path)
    if not path.is_dir():
        what = "does not exist" if not path.exists() else "is neither an artifact (.bjm) nor a folder"
        raise DataError(f"{path} {what}", hint="name a submission folder, a run folder or an artifact")
    if not any(path.iterdir()):
        raise DataError(
            f"{path} is an empty folder", hint="a submission has README.md, submission.json, train_gpt.py and logs"
        )
    with file_errors_as(DataError, "read", path):
        return review_submission(path, run=run)


def review_submission(path: Path, *, run: bool = False) -> Review:
    """Return the review of anyone's submission folder."""
    submission = with_claimed_evaluation(read_submission(path))
    findings = [
        *folder_findings(submission),
        *size_findings(submission),
        *time_findings(submission),
        *score_findings(submission),
        *data_findings(submission),
    ]
    facts = _facts(submission, findings)
    if submission.script is not None:
        compressor = next((log.compressor for log in submission.logs if log.compressor), "")
        logged = dict(submission.logs[0].settings) if submission.logs else {}
        scanned, program = scan_source(
            submission.script, path, settings=submission.settings, logged=logged, compressor=compressor
        )
        switches = logged_switches(submission, program) if program is not None else {}
        if switches:
            again, _ = scan_source(
                submission.script, path, settings=submission.settings | switches, logged=logged, compressor=compressor
            )
            scanned = with_switches(submission, switches, scanned, again)
        findings.extend(scanned)
        if program is not None and program.broken:
            broken = tuple(Evidence(file=name, text=problem) for name, problem in program.broken.items())
            findings.append(
                Finding(
                    check="source.helpers",
                    status=Status.FAIL,
                    weight=Weight.NOTE,
                    summary="helper files are not valid Python",
                    evidence=broken,
                )
            )
        if run:
            from bytejepa.review.smoke import smoke_findings

            smoked, smoke_facts = smoke_findings(submission.script, path, submission.settings)
            findings.extend(smoked)
            facts |= smoke_facts
    verdict = judge(findings, _clean_reason(findings))
    return Review(
        target=path.resolve().name,
        kind="submission",
        title=submission.title,
        verdict=verdict,
        findings=tuple(findings),
        facts=facts,
    )


def _clean_reason(findings: list[Finding]) -> str:
    adaptive = any(finding.check == "source.score_first_training" for finding in findings)
    return (
        "Track B: legal score-first-per-chunk TTT (PR #1413 pattern)"
        if adaptive
        else "Track A: pure neural, fixed predictor"
    )


def _facts(submission: Submission, findings: list[Finding]) -> dict[str, Any]:
    """Return the figures of the report's head."""
    finals = [log.final.bpb for log in submission.logs if log.final is not None]
    size = next((f for f in findings if f.check == "budget.bytes"), None)
    return {
        "mean_bpb": statistics.fmean(finals) if finals else claimed_bpb(submission),
        "deviation_bpb": statistics.stdev(finals) if len(finals) > 1 else None,
        "num_seeds": len(finals),
        "seeds": [log.seed for log in submission.logs if log.final is not None],
        "steps": [log.steps for log in submission.logs],
        "train_s": [log.train_s for log in submission.logs],
        "parameters": next((log.parameters for log in submission.logs if log.parameters), None),
        "artifact_bytes": size.figures.get("largest_total_bytes") if size else None,
        "code_bytes": submission.script.stat().st_size if submission.script else None,
        "settings": dict(submission.logs[0].settings) if submission.logs else {},
    }
