"""What submission.json claims, against what the logs report. Torch-free."""

from __future__ import annotations

import dataclasses
import re
import reprlib
import statistics
from typing import Any

from bytejepa.review.findings import Evidence, Finding, Status, Weight
from bytejepa.review.log_parser import ScoreLine, TrainingLog
from bytejepa.review.submission import Submission

_MEAN_KEY = re.compile(r"(?:mean|average|avg)_(?:val_)?bpb|(?:val_)?bpb(?:_\d+_?seeds?)?_(?:mean|average|avg)")
"""Names under which the mean over the seeds is claimed: `mean_val_bpb`, `val_bpb_mean`, `val_bpb_3seed_mean`."""
LARGEST_BPB = 100.0
"""No text has a rate from here on: what is claimed to be one is a mistake, or no number."""
OTHER_SEEDS_BPB = 0.005
"""How far the mean over seeds may lie from the figure of one of them."""


def bpb_in(claims: dict[str, Any], key: str) -> float | None:
    """Return what a file states under `key` if it can be bits per byte; it may be of any type."""
    value = claims.get(key)
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    return float(value) if 0 < value < LARGEST_BPB else None


def _claiming_keys(submission: Submission) -> list[str]:
    return ["val_bpb", "bpb", *(key for key in submission.claims if _MEAN_KEY.fullmatch(key))]


def claimed_bpb(submission: Submission) -> float | None:
    """Return the claimed bits per byte, of one run or the mean over the seeds; None if none are claimed.

    null and 0 are no claims: they are what a template leaves.
    """
    values = (bpb_in(submission.claims, key) for key in _claiming_keys(submission))
    return next((value for value in values if value is not None), None)


def tolerance_of(claimed: float) -> float:
    """Return how far a logged figure may lie from a claim that was rounded to the digits it has."""
    return max(0.6 * 10.0 ** -len(str(claimed).partition(".")[2]), 6e-5)


def with_claimed_evaluation(submission: Submission) -> Submission:
    """Return a submission whose logs report the evaluation that is claimed, where they hold several.

    The last evaluation stays the reported one if it is the claimed one, or if no evaluation is: not every log ends with
    the figure that its author reports.
    """
    claimed = claimed_bpb(submission)
    finals = [final for log in submission.logs if (final := log.final) is not None]
    if claimed is None or not finals:
        return submission
    tolerance = tolerance_of(claimed)
    bpbs = [final.bpb for final in finals]
    if any(abs(bpb - claimed) <= tolerance for bpb in (*bpbs, statistics.fmean(bpbs))):
        return submission
    scores = [score for log in submission.logs for score in log.scores if score.is_final]
    for label in dict.fromkeys(score.label for score in reversed(scores)):
        values = [score.bpb for score in scores if score.label == label]
        if any(abs(bpb - claimed) <= tolerance for bpb in (*values, statistics.fmean(values))):
            logs = tuple(dataclasses.replace(log, reported_label=label) for log in submission.logs)
            return dataclasses.replace(submission, logs=logs)
    return submission


def unscored_claim_findings(submission: Submission) -> list[Finding]:
    """Judge the claim where no log reports the score of a packed model: there is nothing that it could be."""
    claimed = claimed_bpb(submission)
    if claimed is None:
        return [] if submission.claims_problem else [_no_claim(submission)]
    scores = [(log, score) for log in submission.logs for score in log.scores]
    if not scores or _stated_elsewhere(submission, claimed, tolerance_of(claimed)):
        return []
    evidence = [Evidence(file="submission.json", text=f"val_bpb {claimed}")]
    evidence += [Evidence(file=log.file, line=score.line, text=score.text) for log, score in scores[-3:]]
    if any(abs(score.bpb - claimed) <= tolerance_of(claimed) for _, score in scores):
        summary = f"the claimed {claimed} bpb is of the weights before packing: no log reports the packed model"
        return [
            Finding(
                check="scores.claims",
                status=Status.UNKNOWN,
                weight=Weight.NOTE,
                summary=summary,
                evidence=tuple(evidence),
            )
        ]
    summary = f"the claimed {claimed} bpb stands in no log, and no log reports the packed model"
    return [
        Finding(
            check="scores.claims", status=Status.FAIL, weight=Weight.AUTHOR, summary=summary, evidence=tuple(evidence)
        )
    ]


def _no_claim(submission: Submission) -> Finding:
    check, summary = "scores.claims", "submission.json claims no val_bpb"
    if submission.claims_problem:
        return Finding(check=check, status=Status.UNKNOWN, weight=Weight.NOTE, summary=summary)
    stated = {key: value for key in _claiming_keys(submission) if (value := submission.claims.get(key))}
    text = "; ".join(f"{key} is {reprlib.repr(value)}" for key, value in stated.items())
    evidence = (Evidence(file="submission.json", text=text),)
    return Finding(check=check, status=Status.FAIL, weight=Weight.AUTHOR, summary=summary, evidence=evidence)


def claim_finding(submission: Submission, reported: list[tuple[TrainingLog, ScoreLine]]) -> Finding:
    """Judge the claimed val_bpb and val_loss against the evaluations that the logs report."""
    check = "scores.claims"
    claimed = claimed_bpb(submission)
    if claimed is None:
        return _no_claim(submission)
    finals = [final.bpb for _, final in reported]
    everything = [score for log, _ in reported for score in log.scores]
    candidates = [*(score.bpb for score in everything if score.is_final), statistics.fmean(finals), *_means(reported)]
    nearest = min(candidates, key=lambda value: abs(value - claimed))
    tolerance = tolerance_of(claimed)
    if abs(nearest - claimed) > tolerance:
        summary = f"submission.json claims {claimed} bpb; the logs have {nearest:.6f}"
        # a mean over seeds cannot be checked against the log of one of them
        of_seeds = len(reported) < 3 and any("seed" in key for key in submission.claims)
        other_seeds = of_seeds and abs(nearest - claimed) < OTHER_SEEDS_BPB
        if name := _stated_elsewhere(
            submission, claimed, OTHER_SEEDS_BPB if of_seeds and not other_seeds else tolerance
        ):
            return Finding(
                check=check,
                status=Status.UNKNOWN,
                weight=Weight.RULING,
                summary=f"the claimed {claimed} bpb is the {name} of the logs, printed without a loss: it cannot be recomputed",
                evidence=(Evidence(file="submission.json", text=f"val_bpb {claimed}"),),
            )
        # worse than all that the logs report is out of date, not dishonest
        weight = Weight.NOTE if other_seeds else Weight.AUTHOR if claimed > max(candidates) else Weight.RULE
        return Finding(
            check=check,
            status=Status.FAIL,
            weight=weight,
            summary=summary,
            evidence=(
                Evidence(file="submission.json", text=f"val_bpb {claimed}"),
                *(Evidence(file=log.file, line=f.line, text=f.text) for log, f in reported),
            ),
        )
    return _claimed_loss(submission, reported, claimed) or Finding(
        check=check, status=Status.PASS, summary=f"the claimed {claimed} bpb stands in the logs"
    )


def _claimed_loss(
    submission: Submission, reported: list[tuple[TrainingLog, ScoreLine]], claimed: float
) -> Finding | None:
    """Return what is wrong with the claimed val_loss beside a right val_bpb of `claimed`, None if nothing is."""
    loss = submission.claims.get("val_loss")
    losses = [score.loss_nats for log, _ in reported for score in log.scores]
    losses.append(statistics.fmean(final.loss_nats for _, final in reported))
    if not isinstance(loss, float):
        return None
    tolerance = max(0.6 * 10.0 ** -len(str(loss).partition(".")[2]), 1.1e-4)
    if not min(abs(value - loss) for value in losses) <= tolerance:  # NaN is no loss either
        of_claim = min((f for _, f in reported), key=lambda score: abs(score.bpb - claimed))
        return Finding(
            check="scores.claims",
            status=Status.FAIL,
            weight=Weight.AUTHOR,
            summary=f"submission.json claims a val_loss of {loss}; the logs have {of_claim.loss_nats:.6f}",
            evidence=(Evidence(file="submission.json", text=f"val_loss {loss}"),),
        )
    return None


def _stated_elsewhere(submission: Submission, claimed: float, tolerance: float) -> str:
    """Return the name under which the logs print the claimed figure otherwise than as a loss with its bpb, or ""."""
    for name in sorted({name for log in submission.logs for name in log.other_bpbs}):
        values = [log.other_bpbs[name] for log in submission.logs if name in log.other_bpbs]
        if any(abs(value - claimed) <= tolerance for value in (*values, statistics.fmean(values))):
            return name
    return ""


def _means(reported: list[tuple[TrainingLog, ScoreLine]]) -> list[float]:
    """Return the mean over the seeds of every evaluation that all of them report."""
    labels = {score.label for log, _ in reported for score in log.scores if score.is_final}
    found = []
    for label in labels:
        last = [[s.bpb for s in log.scores if s.label == label][-1:] for log, _ in reported]
        if all(last):
            found.append(statistics.fmean(values[0] for values in last))
    return found
