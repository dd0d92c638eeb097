"""A review as a table for the terminal, and as Markdown in the form of the community's review comments."""

from __future__ import annotations

import re

from rich.console import Console
from rich.table import Table
from rich.text import Text

from bytejepa.review.findings import Finding, Review, Status, Word

_COLOURS = {Status.PASS: "green", Status.FAIL: "red", Status.UNKNOWN: "yellow"}
_RECOMMENDATION = {
    Word.CLEAN: "MERGE, pending the usual record checks (this is no approval of a record)",
    Word.FLAG: "CLOSE, unless the author shows otherwise",
    Word.HOLD: "HOLD until a ruling, or until the code can be seen",
    Word.AUTHOR: "HOLD until the author has acted",
}
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")
_ORDER = {Status.FAIL: 0, Status.UNKNOWN: 1, Status.PASS: 2}


def _printable(text: str) -> str:
    """Return what a terminal or a file can take: authors' names and files may hold control characters and surrogates."""
    return _UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", text)


def print_terminal(review: Review, console: Console | None = None) -> None:
    """Print verdict and findings, gravest first, for people."""
    console = console or Console(highlight=False)
    if not console.is_terminal:
        console.width = 120
    colour = "green" if review.is_clean else "red" if review.verdict.word is Word.FLAG else "yellow"
    reason = _printable(review.verdict.reason)
    console.print(Text.assemble((review.verdict.word.value, f"bold {colour}"), f"  {reason}"))
    title = Text(_printable(f"{review.title} ({review.kind})"), style="bold")
    table = Table(title=title, title_justify="left")
    for column in ("status", "check", "finding"):
        table.add_column(column, overflow="fold", no_wrap=column != "finding")
    for finding in _sorted(review):
        cell = Text(_printable(finding.summary))
        if finding.status is not Status.PASS:
            for evidence in finding.evidence:
                cell.append(_printable(f"\n  {evidence}"), style="dim")
        status = finding.status.value + (
            " (note)" if finding.weight == "note" and finding.status is not Status.PASS else ""
        )
        table.add_row(Text(status, style=_COLOURS[finding.status]), finding.check, cell)
    console.print(table)


def _sorted(review: Review) -> list[Finding]:
    return sorted(review.findings, key=lambda finding: (finding.weight == "note", _ORDER[finding.status]))


def as_markdown(review: Review) -> str:
    """Return the review as a comment in the community's usual form."""
    facts = review.facts
    lines = [f"### Community Review — {review.title}", "", _head(review), ""]
    lines += ["**What I found in the code and the files**", ""]
    for number, finding in enumerate((f for f in _sorted(review) if f.check.startswith("source.")), start=1):
        lines.append(f"{number}. `{finding.check}` — **{finding.status.value}**: {finding.summary}")
        lines += [
            f"   - `{evidence.file}{f':{evidence.line}' if evidence.line else ''}` {_code(evidence.text)}"
            for evidence in finding.evidence[:4]
        ]
    lines += ["", "**Figures, re-measured**", "", "| check | status | finding |", "|---|---|---|"]
    lines += [
        f"| {f.check} | {f.status.value} | {_cell(f.summary)} |"
        for f in _sorted(review)
        if not f.check.startswith("source.")
    ]
    if "smoke" in facts:
        lines += ["", f"**CPU smoke test:** {facts['smoke']}"]
    lines += [
        "",
        f"**Verdict:** {review.verdict.word.value} — {review.verdict.reason}.",
        "",
        f"**Recommendation to @cocohearts @valerio-oai @0hq @yuzhougu-oai @notapplica:** {_RECOMMENDATION[review.verdict.word]}.",
        "",
        "*A program wrote this from the files alone. Unknown means that it could not see, never that something is wrong; a pass of the "
        "static part means that none of the known patterns was found in the code that the settings leave switched on. "
        "Reviewed by `bytejepa review`.*",
        "",
    ]
    return _printable("\n".join(lines))


def _head(review: Review) -> str:
    facts = review.facts
    bpb = "n/a" if facts.get("mean_bpb") is None else f"{facts['mean_bpb']:.5f}"
    if facts.get("deviation_bpb") is not None:
        bpb += f" ({facts['num_seeds']}-seed mean, std {facts['deviation_bpb']:.5f})"
    seeds = ", ".join(str(seed) for seed in facts.get("seeds", []) if seed is not None) or "n/a"
    artifact = f"{facts['artifact_bytes']:,} B" if facts.get("artifact_bytes") else "n/a"
    compliance = f"{review.verdict.word.value} — {review.verdict.reason}"
    return f"**BPB:** {bpb} | **Seeds:** {seeds} | **Artifact:** {artifact} | **Compliance:** {compliance}"


def _code(text: str) -> str:
    return f"`{text.replace('`', chr(39))}`" if text else ""


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
