"""The static part of a review: what the source does, without running any of it. Torch-free."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bytejepa.review.choice_rules import choice_findings
from bytejepa.review.findings import Evidence, Finding, Status, Weight
from bytejepa.review.interpreter import interpret
from bytejepa.review.network_state import state_findings
from bytejepa.review.program import Program, read_program
from bytejepa.review.rules import Facts, calibration_findings, coverage_findings, training_findings
from bytejepa.review.surroundings import (
    compressor_findings,
    native_findings,
    network_findings,
    switch_findings,
    tail_findings,
)
from bytejepa.review.table_rules import table_findings


def scan_source(
    main: Path,
    root: Path,
    *,
    settings: dict[str, str] | None = None,
    logged: dict[str, Any] | None = None,
    compressor: str = "",
) -> tuple[list[Finding], Program | None]:
    """Return the findings about a training script, and its sources.

    `settings` are environment variables of the run command, `logged` hyperparameters that the logs state, by attribute
    name, `compressor` the one that the logs name. Conditions on them are decided; code that they switch off is not judged.
    """
    try:
        program = read_program(main, root)
    except (SyntaxError, ValueError, OSError) as problem:
        line = problem.lineno if isinstance(problem, SyntaxError) else None
        evidence = (Evidence(file=main.relative_to(root).as_posix(), line=line, text=str(problem)),)
        finding = Finding(
            check="source.syntax",
            status=Status.FAIL,
            weight=Weight.AUTHOR,
            summary="the script is not valid Python"
            if isinstance(problem, SyntaxError)
            else "the script cannot be read",
            evidence=evidence,
        )
        return [finding], None
    interpreter, incomplete = interpret(program, settings or {}, logged or {})
    facts = Facts(interpreter)
    findings = [
        Finding(
            check="source.syntax",
            status=Status.PASS,
            summary=f"{len(program.main.source.splitlines())} lines of Python",
        ),
        _visible(program, facts, incomplete),
        *training_findings(facts),
        *table_findings(facts),
        *calibration_findings(facts),
        *choice_findings(facts),
        *coverage_findings(facts),
        *network_findings(facts, {path.name for path in root.rglob("*") if path.is_file()}),
        *native_findings(facts),
        *state_findings(facts),
        *compressor_findings(facts, compressor),
        *switch_findings(facts),
        *tail_findings(facts),
    ]
    if findings[1].status is Status.UNKNOWN or not facts.scores:  # a pass means nothing about what was not seen
        findings = [
            f
            for f in findings
            if not (f.status is Status.PASS and f.check.startswith("source.")) or f.check == "source.syntax"
        ]
    return findings, program


def _visible(program: Program, facts: Facts, incomplete: str) -> Finding:
    layers = program.main.unpacked.layers
    closed = [*program.main.unpacked.closed, *(event.detail for event in facts.of("closed"))]
    if closed or incomplete:
        summary = f"the reviewer cannot see all of the code: {(closed or [incomplete])[0]}"
        evidence = facts.evidence(facts.of("closed")) or (Evidence(file=program.main.file),)
        return Finding(
            check="source.visible", status=Status.UNKNOWN, weight=Weight.RULING, summary=summary, evidence=evidence
        )
    how = f"unpacked {' > '.join(layers)} without running it" if layers else "plain source"
    return Finding(check="source.visible", status=Status.PASS, summary=how, figures={"layers": len(layers)})
