"""Switches of a script that its logs show to have been on although no run command sets them. Torch-free.

A README often shows one command, and the logs come from another: then the source was judged with a part of it switched
off that ran all the same. What gives it away is the name of an evaluation: `USE_REPLAY`, off by default, and a line
`use_replay val_loss:.. val_bpb:..`.
"""

from __future__ import annotations

import re
import statistics

from bytejepa.review.claims import claimed_bpb, tolerance_of
from bytejepa.review.findings import Evidence, Finding, Status, Weight
from bytejepa.review.log_parser import ScoreLine
from bytejepa.review.program import Program
from bytejepa.review.submission import Submission

_SWITCH = re.compile(
    r"(?:environ\.get|environ\.setdefault|getenv)\(\s*[\"']([A-Z][A-Z0-9_]{2,60})[\"']\s*,\s*[\"']?(?:0|False|false)?[\"']?\s*\)"
)
_ADAPTATION = {
    "source.pre_quant_training", "source.test_time_training", "source.slot", "source.ngram_target_key", "source.rescoring",
    "source.calibration", "source.shipped_targets",
}  # fmt: skip


def _stem(switch: str) -> str:
    """Return what the name of a switch is about: `replay` of USE_REPLAY, ENABLE_REPLAY and REPLAY_ENABLED."""
    return switch.lower().removesuffix("_enabled").removeprefix("enable_").removeprefix("use_")


def _finals(submission: Submission) -> list[tuple[str, ScoreLine]]:
    """Return the evaluations of packed models with the first word of their labels, in lower case."""
    found = []
    for log in submission.logs:
        for score in log.scores:
            words = score.label.lower().split()
            if score.is_final and words:
                found.append((words[0], score))
    return found


def logged_switches(submission: Submission, program: Program) -> dict[str, str]:
    """Return the environment variables that are off by default and by command, but name an evaluation of the logs."""
    evaluations = {word for word, _ in _finals(submission)}
    stated = {name for log in submission.logs for name in log.settings}
    switches: dict[str, str] = {}
    for module in (program.main, *program.helpers.values()):
        for name in _SWITCH.findall(module.source):
            stem = _stem(name)
            if name in submission.settings or name.lower() in stated:
                continue
            if any(re.search(rf"(?:^|_){re.escape(stem)}(?:_|$)", word) for word in evaluations):
                switches[name] = "1"
    return switches


def _is_claimed(submission: Submission, switches: dict[str, str]) -> bool:
    """Return whether the claimed figure may come from an evaluation that the switches turn on."""
    claimed = claimed_bpb(submission)
    if claimed is None:
        return True
    tolerance = tolerance_of(claimed)
    finals = _finals(submission)
    words = {word for word, score in finals if abs(score.bpb - claimed) <= tolerance} | {
        word for word, _ in finals
        if abs(statistics.fmean(score.bpb for other, score in finals if other == word) - claimed) <= tolerance
    }  # fmt: skip
    return not words or any(_stem(name) in word for name in switches for word in words)


def with_switches(
    submission: Submission, switches: dict[str, str], plain: list[Finding], switched: list[Finding]
) -> list[Finding]:
    """Return the source findings to report, given those without and with what the logs show to have been on.

    Where the claim may come from the switched evaluation, its findings are the submission's. Otherwise one finding says
    what was evaluated beside the claim.
    """
    if _is_claimed(submission, switches):
        return switched
    passed = {finding.check for finding in plain if finding.status is Status.PASS}
    worse = [f for f in switched if f.check in _ADAPTATION & passed and f.status is not Status.PASS]
    if not worse:
        return plain
    names = ", ".join(f"{name}=1" for name in sorted(switches))
    finding = Finding(
        check="source.other_evaluation",
        status=Status.UNKNOWN,
        weight=Weight.RULING,
        summary=f"the logs also report an evaluation with {names}, which the claim does not name: {worse[0].summary}",
        evidence=(Evidence(text=names), *(item for f in worse for item in f.evidence))[:6],
    )
    return [*plain, finding]
