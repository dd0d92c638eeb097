"""What a review says: findings with their evidence, and the verdict that follows from them.

The statuses and the words of the verdict are those of the challenge's community reviews. Torch-free.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Iterable
from typing import Any


class Status(enum.StrEnum):
    """Outcome of one check."""

    PASS = "pass"
    FAIL = "fail"
    UNKNOWN = "unknown"


class Word(enum.StrEnum):
    """The verdict, in the words of the community's reviews."""

    CLEAN = "LOOKS CLEAN"
    FLAG = "FLAG"
    HOLD = "HOLD"
    AUTHOR = "NEEDS AUTHOR ACTION"


class Weight(enum.StrEnum):
    """What a finding that is not a pass does to the verdict."""

    RULE = "rule"
    """A rule of the challenge is broken: FLAG."""
    RULING = "ruling"
    """Only people can decide, or the reviewer cannot see: HOLD."""
    AUTHOR = "author"
    """Something is missing or does not run: NEEDS AUTHOR ACTION."""
    NOTE = "note"
    """Worth knowing; the verdict stays what it is."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Evidence:
    """Where a finding can be checked by hand."""

    file: str = ""
    """Path inside the reviewed folder; `packed:NAME` is the source inside a wrapper."""
    line: int | None = None
    """1-based line of that file; None: the file as a whole."""
    text: str = ""
    """The line itself, or what was measured, with its unit."""

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}" if self.line else self.file
        return f"{place}: {self.text}" if place and self.text else place or self.text


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """The outcome of one check."""

    check: str
    """Identifier, `group.name`; `docs/review.md` says what each one means."""
    status: Status
    summary: str
    """One sentence."""
    weight: Weight = Weight.RULE
    """What it does to the verdict unless it passes."""
    evidence: tuple[Evidence, ...] = ()
    figures: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Numbers behind the sentence, with the unit in the name."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """The word and the reason."""

    word: Word
    reason: str


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Review:
    """Everything a review found out about one target."""

    target: str
    """Name of the reviewed folder or file."""
    kind: str
    """`submission`, `run` or `artifact`."""
    title: str
    verdict: Verdict
    findings: tuple[Finding, ...]
    facts: dict[str, Any]
    """Measured figures for the head of the report: bpb, seeds, bytes, seconds, smoke test."""

    @property
    def is_clean(self) -> bool:
        """Whether the verdict is LOOKS CLEAN."""
        return self.verdict.word is Word.CLEAN

    def finding(self, check: str) -> Finding | None:
        """Return the gravest finding of that check, None if the check did not run."""
        found = [finding for finding in self.findings if finding.check == check]
        return min(found, key=lambda f: ("fail", "unknown", "pass").index(f.status), default=None)


_ORDER = (
    (Weight.RULE, Status.FAIL, Word.FLAG),
    (Weight.AUTHOR, Status.FAIL, Word.AUTHOR),
    (Weight.AUTHOR, Status.UNKNOWN, Word.AUTHOR),
    (Weight.RULING, Status.FAIL, Word.HOLD),
    (Weight.RULING, Status.UNKNOWN, Word.HOLD),
    (Weight.RULE, Status.UNKNOWN, Word.HOLD),
)


def judge(findings: Iterable[Finding], clean_reason: str) -> Verdict:
    """Return the verdict: the gravest finding decides, in the order FLAG, NEEDS AUTHOR ACTION, HOLD.

    A note never changes it. `clean_reason` is the reason given where nothing stands against the target.
    """
    findings = list(findings)
    for weight, status, word in _ORDER:
        against = [finding for finding in findings if finding.weight is weight and finding.status is status]
        if against:
            more = f" (and {len(against) - 1} more)" if len(against) > 1 else ""
            return Verdict(word=word, reason=against[0].summary.rstrip(".") + more)
    notes = sum(finding.status is Status.FAIL for finding in findings)
    return Verdict(word=Word.CLEAN, reason=clean_reason + (f"; {notes} note{'s' * (notes > 1)} below" if notes else ""))
