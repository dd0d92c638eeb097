"""Judges what a script does to its model around scoring: training on what it is about to score. Torch-free.

The question is always the same: may this change (an optimiser step, a count put into a table) know a byte before the
byte is scored? `relation` answers it for one change and one score from their order and from the loops around them.
"""

from __future__ import annotations

import ast
import dataclasses
import re
import sys
from collections.abc import Iterable

from bytejepa.review.findings import Evidence, Finding, Status, Weight
from bytejepa.review.interpreter import Interpreter
from bytejepa.review.program import Module
from bytejepa.review.values import (
    AHEAD,
    BEHIND,
    FORWARD,
    FRESH,
    PREFIX,
    SAMPLED,
    SUBSET,
    SUFFIX,
    TRAINING,
    VALIDATION,
    Event,
    exclusive,
)

_CALIBRATION_NAME = re.compile(r"hessian|calib|gptq|awq|act_?stat|activation_stat", re.IGNORECASE)


class Facts:
    """The events of one walk, sorted for the rules."""

    def __init__(self, interpreter: Interpreter) -> None:
        self.interpreter = interpreter
        self.events = interpreter.events
        for number, event in enumerate(self.events):
            event.order = number  # loops were walked twice, and the first pass dropped
        forwards = {event.node: event for event in self.of("forward")}
        scored = interpreter.scored | interpreter.converted
        self.scores = [forwards[n] for n in sorted(scored) if n in forwards and VALIDATION in forwards[n].value.labels]
        self.steps = [e for e in self.of("step") if e.value.has(VALIDATION, FORWARD)]
        self.packs = self.of("pack")

    def of(self, kind: str) -> list[Event]:
        """Return the events of one kind, in order."""
        return [event for event in self.events if event.kind == kind]

    def evidence(self, events: Iterable[Event], remark: str = "") -> tuple[Evidence, ...]:
        """Return file, line and text of events, each place once."""
        seen: dict[tuple[str, int], Evidence] = {}
        for event in events:
            module = self.interpreter.program.module_of(event.file)
            text = module.line(event.line) if module else ""
            seen[event.file, event.line] = Evidence(
                file=event.file, line=event.line, text=text + (f"  <- {remark}" if remark else "")
            )
        return tuple(list(seen.values())[:6])


def relation(change: Event, score: Event) -> str:
    """Return how a change on validation data stands to a score.

    "legal": the change happens after the score of the data it learns from, in the same turn of a loop over the data.
    "before": it happens first. "again": a loop around both scores the same data once more. "ahead": it learns from the
    next chunk. "after": everything was scored already. "apart": both cannot happen in one run.
    """
    if exclusive(change, score):
        return "apart"
    common = 0
    for one, other in zip(change.loops, score.loops, strict=False):
        if one != other:
            break
        common += 1
    if not common:
        return "before" if change.order < score.order else "after"
    for loop in change.loops[:common]:
        if loop not in score.value.loops:
            return "again"
        if loop not in change.value.loops and -loop not in change.value.loops:
            return "ahead" if change.order > score.order else "before"
    innermost = change.loops[common - 1]
    if change.order > score.order:
        return "ahead" if AHEAD in change.value.labels and AHEAD not in score.value.labels else "legal"
    carried = -innermost in change.value.loops and innermost not in change.value.loops
    return "legal" if carried or BEHIND in change.value.labels else "before"


def relation_in_table(facts: Facts, fill: Event, read: Event, origin: int = 0) -> str:
    """Return how filling a table stands to reading it, without the loops in each turn of which it is made anew."""
    origin = origin or (fill.other.origin if fill.other is not None else 0)
    born = facts.interpreter.born.get(origin, ())
    if fill.loops[: len(born)] == born == read.loops[: len(born)]:
        fill, read = (dataclasses.replace(event, loops=event.loops[len(born) :]) for event in (fill, read))
    return relation(fill, read)


def _same_model(facts: Facts, step: Event, score: Event) -> bool:
    trained = step.other.models if step.other is not None else frozenset()
    if not trained or not score.value.models or trained & score.value.models:
        return True
    if _is_probe(facts, step) and not any(
        e.order > step.order and e.value.models & trained for e in facts.of("weights")
    ):
        return False  # nobody takes the weights of the probe out again
    # another model, but one that was filled later, or came out of what was packed later, may hold the trained weights
    between = [e for e in (*facts.of("restore"), *facts.packs) if step.order < e.order < score.order]
    return any(
        e.value.models & (score.value.models if e.kind == "restore" else trained)
        or (e.kind == "pack" and not e.value.models)
        for e in between
    )


def _is_probe(facts: Facts, step: Event) -> bool:
    trained = step.other.models if step.other is not None else frozenset()
    return bool(trained) and trained <= facts.interpreter.library_models


def _is_probe_of_rest(facts: Facts, step: Event, score: Event) -> bool:
    """Return whether a probe learns from the positions before a bound and is scored on those from the bound on."""
    bound = step.value.bound_text
    same = bool(bound) and bound == score.value.bound_text
    return same and step.value.has(PREFIX) and score.value.has(SUFFIX) and _is_probe(facts, step)


def training_findings(facts: Facts) -> list[Finding]:
    """Judge optimiser steps on validation data: before quantisation, before scoring, or legally after it."""
    illegal: list[tuple[Event, Event, str]] = []
    slots: list[tuple[Event, Event, str]] = []
    legal: list[Event] = []
    for step in facts.steps:
        fresh = step.other is not None and FRESH in step.other.labels and not step.other.models
        scores = [score for score in facts.scores if _same_model(facts, step, score)]
        if fresh:  # a delta acts on what is computed with it; one that a hook adds leaves no trace in the call
            scores = [score for score in scores if FRESH in score.value.labels] or scores
        verdicts = [(score, relation(step, score)) for score in scores if not _is_probe_of_rest(facts, step, score)]
        bad = [(step, score, how) for score, how in verdicts if how in ("before", "again", "ahead")]
        if bad:
            (slots if fresh else illegal).append(bad[-1])
        elif any(how == "legal" for _, how in verdicts):
            legal.append(step)
        elif not scores:
            illegal.append((step, step, "before"))
    for update, use, how in tensor_changes(facts):
        if how == "legal":
            legal.append(update)
        else:
            illegal.append((update, use, how))
    return [*_training(facts, illegal), *_slot(facts, slots), *_legal(facts, legal, bool(illegal))]


def tensor_changes(facts: Facts) -> list[tuple[Event, Event, str]]:
    """Return how changes of tensors that are no model's stand to the scored predictions that the tensors change.

    A tensor that is made anew for each piece of the data carries nothing from one to the next, and is left out.
    """
    scored = facts.interpreter.scored | facts.interpreter.converted
    uses = [use for use in facts.of("use") if -use.node in scored]
    cases: list[tuple[Event, Event, str]] = []
    for update in facts.of("update"):
        for use in uses:
            for origin in update.other.tables & use.other.tables if update.other and use.other else ():
                born = facts.interpreter.born.get(origin, ())
                how = relation_in_table(facts, update, use, origin)
                if how in ("legal", "before", "again", "ahead") and not set(born) & use.value.loops:
                    cases.append((update, use, how))
    return cases


_HOW = {
    "before": "before the same data is scored",
    "again": "in a loop that scores the same data again",
    "ahead": "on a chunk that is not scored yet",
}


def _training(facts: Facts, illegal: list[tuple[Event, Event, str]]) -> list[Finding]:
    before_packing = [
        case
        for case in illegal
        if case[2] == "before"
        and any(case[0].order < p.order and (p.order < case[1].order or case[0] is case[1]) for p in facts.packs)
    ]
    others = [case for case in illegal if case not in before_packing]
    findings = []
    for check, cases, what in (
        ("source.pre_quant_training", before_packing, "optimiser steps on validation data before quantisation"),
        ("source.test_time_training", others, "test-time training on validation data"),
    ):
        if not cases:
            findings.append(
                Finding(check=check, status=Status.PASS, summary=f"no {what} that a score could profit from")
            )
            continue
        step, _score, how = cases[0]
        how_made = f"{step.detail}, " if step.detail == "without a gradient" else ""
        summary = f"{what} {_HOW[how]} ({how_made}in {step.stack[-1]})"
        evidence = facts.evidence([case[0] for case in cases], "step") + facts.evidence(
            [case[1] for case in cases], "score"
        )
        findings.append(Finding(check=check, status=Status.FAIL, summary=summary, evidence=evidence))
    return findings


def _slot(facts: Facts, slots: list[tuple[Event, Event, str]]) -> list[Finding]:
    check = "source.slot"
    if not slots:
        return [
            Finding(check=check, status=Status.PASS, summary="no per-window delta optimised on what is scored (SLOT)")
        ]
    step, score, _ = slots[0]
    module = facts.interpreter.program.module_of(step.file)
    bound = step.value.bound_text
    if module is not None and bound and PREFIX in step.value.labels and _begins_at(module, bound):
        summary = "a per-window delta is optimised on the context before the scored positions (context-only SLOT, no ruling yet)"
        status, weight = Status.UNKNOWN, Weight.RULING
    else:
        summary = "a delta is optimised on the positions that are then scored with it (scored-region SLOT, breaks C1)"
        status, weight = Status.FAIL, Weight.RULE
    evidence = facts.evidence([step], "step") + facts.evidence([score], "score")
    return [Finding(check=check, status=status, weight=weight, summary=summary, evidence=evidence)]


def _begins_at(module: Module, bound: str) -> bool:
    """Return whether some slice begins where another ends: at `bound`, or at a name that is another name for it."""
    names = {bound}
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.value, ast.Name):
            pair = {ast.unparse(node.targets[0]), node.value.id}
            names |= pair if bound in pair else set()
    return any(re.search(r"[\[,]\s*" + re.escape(name) + r"\s*:", module.source) for name in names)


def _legal(facts: Facts, legal: list[Event], has_illegal: bool) -> list[Finding]:
    if not legal or has_illegal:
        return []
    guarded = any("last" in text.text for text in _around(facts, legal[0]))
    remark = (
        "with a guard for the last chunk" if guarded else "without a guard for the last chunk, whose step no score sees"
    )
    summary = f"legal score-first-per-chunk test-time training ({remark})"
    return [
        Finding(
            check="source.score_first_training", status=Status.PASS, summary=summary, evidence=facts.evidence(legal)
        )
    ]


def _around(facts: Facts, event: Event) -> list[Evidence]:
    module = facts.interpreter.program.module_of(event.file)
    if module is None:
        return []
    return [
        Evidence(file=event.file, line=n, text=module.line(n)) for n in range(max(1, event.line - 40), event.line + 1)
    ]


def calibration_findings(facts: Facts) -> list[Finding]:
    """Judge forward passes whose activations, not losses, are used before the weights are packed."""
    check = "source.calibration"
    scored = facts.interpreter.scored | facts.interpreter.converted
    last_pack = max((event.order for event in facts.packs), default=-1)
    suspects = [
        e
        for e in facts.of("forward")
        if e.value.has(VALIDATION)
        and e.node not in scored
        and e.order < last_pack
        and not (e.value.forwards & scored)
        and (e.hooked or any(_CALIBRATION_NAME.search(name) for name in e.stack))
    ]
    if suspects:
        return [
            Finding(
                check=check,
                status=Status.FAIL,
                summary=f"quantisation is calibrated on validation data (in {suspects[0].stack[-1]})",
                evidence=facts.evidence(suspects),
            )
        ]
    return [Finding(check=check, status=Status.PASS, summary="no calibration on validation data")]


def _elsewhere(facts: Facts) -> str:
    """Return where the scoring may be instead: modules that are neither in the folder nor of the standard library."""
    names = sorted(facts.interpreter.unseen_modules - sys.stdlib_module_names - {"torch", "numpy", "__future__"})
    return f" (imported, but not in the folder: {', '.join(names[:8])})" if names else ""


def coverage_findings(facts: Facts) -> list[Finding]:
    """Judge whether the script scores all of the validation split, and whether scoring was recognised at all."""
    if not facts.scores:
        return [
            Finding(
                check="source.scoring",
                status=Status.UNKNOWN,
                weight=Weight.RULING,
                summary=f"no scoring of validation data was recognised, so nothing can be said about its order{_elsewhere(facts)}",
            )
        ]
    findings = [
        Finding(
            check="source.scoring",
            status=Status.PASS,
            summary=f"{len(facts.scores)} scoring passes recognised",
            evidence=facts.evidence(facts.scores),
        )
    ]
    partial = [e for e in facts.scores if SUBSET in e.value.labels]
    partial += [e for e in facts.of("part") if e.value.has(VALIDATION)]
    sampled = [e for e in facts.scores if SAMPLED in e.value.labels]
    if not partial and len(sampled) == len(facts.scores):
        partial, what = sampled, "random places of the validation split are scored, not all of it"
    else:
        what = "only the first part of the validation split is scored"
    if partial:
        findings.append(
            Finding(check="source.coverage", status=Status.FAIL, summary=what, evidence=facts.evidence(partial))
        )
    else:
        findings.append(
            Finding(check="source.coverage", status=Status.PASS, summary="no cut of the validation split in the source")
        )
    late = [
        e
        for e in facts.of("forward")
        if e.value.has(TRAINING) and VALIDATION not in e.value.labels and _in_evaluation(facts, e)
    ]
    if late:
        findings.append(
            Finding(
                check="source.training_data_at_evaluation",
                status=Status.FAIL,
                summary="training data is used after the artifact was loaded",
                evidence=facts.evidence(late),
            )
        )
    return findings


def _in_evaluation(facts: Facts, event: Event) -> bool:
    """Return whether the artifact was loaded before, other than in a loop that goes on training afterwards."""
    packed = min((pack.order for pack in facts.packs), default=None)
    return packed is not None and any(
        packed < e.order < event.order and not set(e.loops) & set(event.loops) for e in facts.of("unpack")
    )
