"""Judges settings that are chosen by their loss on validation data. Torch-free.

Tuning across runs is allowed by the challenge's rules. Within an evaluation a choice by the loss of the data that is then
scored makes each prediction depend on what comes after it (C1). What is packed because of such a choice has no ruling.
"""

from __future__ import annotations

from bytejepa.review.choices import TWO_EVALUATIONS
from bytejepa.review.findings import Finding, Status, Weight
from bytejepa.review.rules import Facts, relation
from bytejepa.review.values import CHOSEN, Event

_CHECK = "source.selection"
_EVALUATION = "a setting is chosen by its loss on the validation data that is then scored with it (breaks C1)"
_PACKED = (
    "what is packed is chosen by its loss on validation data within the run (tuned across runs it may be; no ruling)"
)
_BESIDE = (
    "several evaluations are compared by their loss on validation data, and the best is kept: which one is claimed?"
)


def choice_findings(facts: Facts) -> list[Finding]:
    """Judge choices among candidates by their loss on validation data."""
    verdicts = [(choice, *_judged(facts, choice)) for choice in facts.of("choice")]
    for summary in (_EVALUATION, _PACKED, _BESIDE):
        against = [(choice, scores) for choice, why, scores in verdicts if why == summary]
        if against:
            evidence = facts.evidence([choice for choice, _ in against], "chosen")
            evidence += facts.evidence([score for _, scores in against for score in scores], "score")
            breaks_rule = summary == _EVALUATION
            status, weight = (Status.FAIL, Weight.RULE) if breaks_rule else (Status.UNKNOWN, Weight.RULING)
            return [Finding(check=_CHECK, status=status, weight=weight, summary=summary, evidence=evidence[:6])]
    return [Finding(check=_CHECK, status=Status.PASS, summary="nothing is chosen by its loss on validation data")]


def _judged(facts: Facts, choice: Event) -> tuple[str, list[Event]]:
    """Return what stands against a choice, "" if nothing does, and the scores that show it."""
    tried = [score for score in facts.scores if score.node in choice.value.forwards]
    others = [score for score in facts.scores if score.node not in choice.value.forwards]
    restores = [e for e in facts.of("restore") if CHOSEN in e.value.labels and e.order > choice.order]
    used = [
        score for score in others
        if CHOSEN in score.value.labels
        or any(e.order < score.order and e.value.models & score.value.models for e in restores)
    ]  # fmt: skip
    reached = [score for score in used if relation(choice, score) in ("before", "again", "ahead")]
    if any(pack.order > choice.order for pack in facts.packs):
        later = [e for e in (*facts.packs, *facts.of("restore")) if e.order > choice.order]
        kept = [e for e in later if CHOSEN in e.value.labels or _is_inside(facts, e)]
        return (_PACKED, reached or tried) if kept or reached else ("", [])
    if reached:
        return _EVALUATION, reached
    if used or not tried:  # on data that was scored already, or not of a score at all
        return "", []
    fixed = choice.detail == TWO_EVALUATIONS or any(score.order > choice.order for score in others)
    return (_BESIDE if fixed else _EVALUATION), tried


def _is_inside(facts: Facts, event: Event) -> bool:
    """Return whether an event happens in a branch that a choice decides on."""
    return any(branch == 0 and place in facts.interpreter.decided for place, branch in event.branches)
