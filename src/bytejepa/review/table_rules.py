"""Judges tables of counts: keyed by the target, filled before scoring, shipped with the artifact. Torch-free."""

from __future__ import annotations

from bytejepa.review.findings import Finding, Status, Weight
from bytejepa.review.rules import Facts, relation_in_table
from bytejepa.review.values import HASHED, TARGET, VALIDATION, Event


def table_findings(facts: Facts) -> list[Finding]:
    """Judge caches of counts: keyed by the target, filled before scoring; and taking the better of two losses."""
    filled = {e.other.origin for e in facts.of("fill") if e.other is not None}
    lookups = [e for e in facts.of("lookup") if e.other is not None and e.other.origin in filled]
    # whatever filled the table, training data included: looked up by a hash of the target it is no distribution
    keyed = [e for e in facts.of("lookup") if e.value.has(TARGET, HASHED)]
    ratios = [e for e in facts.of("ratio") if e.other is not None and e.other.sites < e.value.sites and e.other.sites]
    exact = [e for e in lookups if TARGET in e.value.labels and HASHED not in e.value.labels]
    findings = [_keyed(facts, keyed or (ratios if filled else []), exact)]
    early = [
        (fill, read)
        for fill in facts.of("fill")
        for read in lookups
        if fill.other is not None
        and read.other is not None
        and fill.other.origin == read.other.origin
        and relation_in_table(facts, fill, read) in ("before", "again", "ahead")
    ]
    minima = facts.of("minimum")
    masked = [
        e for e in facts.of("masked") if VALIDATION in e.value.labels | (e.other.labels if e.other else frozenset())
    ]
    findings.append(_shipped(facts, masked))
    if early or minima:
        summary = (
            "a cache is filled from validation data before that data is scored with it (two-pass rescoring)"
            if early
            else "the smaller of two losses is taken after the target is known"
        )
        evidence = facts.evidence([pair[0] for pair in early], "filled") + facts.evidence(
            [pair[1] for pair in early], "read"
        )
        findings.append(
            Finding(
                check="source.rescoring",
                status=Status.FAIL,
                summary=summary,
                evidence=evidence or facts.evidence(minima),
            )
        )
    else:
        findings.append(
            Finding(check="source.rescoring", status=Status.PASS, summary="no rescoring with what a first pass learned")
        )
    return findings


def _shipped(facts: Facts, masked: list[Event]) -> Finding:
    check = "source.shipped_targets"
    if masked:
        summary = "losses are struck out where tokens shipped in a file equal the target (paid prefix: validation data in the artifact)"
        return Finding(check=check, status=Status.FAIL, summary=summary, evidence=facts.evidence(masked))
    return Finding(check=check, status=Status.PASS, summary="no loss weighed by shipped tokens")


def _keyed(facts: Facts, hashed: list[Event], exact: list[Event]) -> Finding:
    check = "source.ngram_target_key"
    if hashed:
        summary = (
            "an n-gram cache is looked up by a hash that contains the target: not a normalised distribution (breaks C2)"
        )
        return Finding(check=check, status=Status.FAIL, summary=summary, evidence=facts.evidence(hashed))
    if exact:
        summary = "counts are looked up by the target itself; whether the mixture is normalised cannot be seen here"
        return Finding(
            check=check, status=Status.UNKNOWN, weight=Weight.RULING, summary=summary, evidence=facts.evidence(exact)
        )
    return Finding(check=check, status=Status.PASS, summary="no n-gram cache keyed by the target")
