"""Files of a submission may hold anything, by mistake or on purpose: its review ends in findings, never in a traceback."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from bytejepa.review import Review, Status, Word, review
from bytejepa.review.budget import packed_code_bytes
from bytejepa.review.report_forms import as_json, as_markdown, print_terminal
from review.folders import Folder
from review.scripts import script


def reported(path: Path) -> Review:
    """Return the review of a folder after writing it in all three forms, as files in UTF-8."""
    found = review(path)
    terminal = io.StringIO()
    print_terminal(found, Console(file=terminal, width=120, highlight=False))
    json.dumps(as_json(found), default=str, allow_nan=False)
    for text in (terminal.getvalue(), as_markdown(found)):
        text.encode()
    return found


NO_NUMBERS = (
    True, -1, float("nan"), float("inf"), -float("inf"), 10**400, -(10**400), "", "1.19", [], [1], [None], {}, {"a": [1]},
    [{"bytes_total": "x"}], {"42": {"bytes_total": [1]}}, {"42": 10**400},
)  # fmt: skip
KEYS = ("name", "track", "dataset", "val_loss", "bytes_total", "bytes_code", "seed_results", "seeds", "baseline_bpb")


@pytest.mark.parametrize("more_keys", [(), ("val_bpb", "mean_val_bpb")])
@pytest.mark.parametrize("with_logs", [True, False])
def test_claims_of_any_type_are_reviewed(more_keys: tuple[str, ...], with_logs: bool, tmp_path: Path) -> None:
    for number, value in enumerate(NO_NUMBERS):
        claims = dict.fromkeys((*KEYS, *more_keys), value)
        folder = Folder(source="pass\n", with_logs=with_logs, claims=claims)
        assert reported(folder.write(tmp_path / str(number))).verdict.word is not Word.CLEAN  # nothing is scored


@pytest.mark.parametrize("value", [True, "1.19", [1.19], {"mean": 1.19}, 10**400, float("inf"), float("nan"), -1.19])
def test_a_claim_that_is_no_rate_is_none(value: Any, tmp_path: Path) -> None:
    found = reported(Folder(claims={"val_bpb": value, "baseline_bpb": value}).write(tmp_path / "submission"))
    finding = found.finding("scores.claims")
    assert (finding.status, finding.summary) == (Status.FAIL, "submission.json claims no val_bpb")
    assert finding.evidence[0].text.startswith("val_bpb is ")
    assert "no baseline is named" in found.finding("scores.significance").summary
    assert found.verdict.word is Word.AUTHOR
    assert found.facts["mean_bpb"] == pytest.approx(1.19048559)
    unlogged = reported(Folder(claims={"val_bpb": value}, with_logs=False).write(tmp_path / "unlogged"))
    assert unlogged.facts["mean_bpb"] is None


@pytest.mark.parametrize("results", [{"42": {"bytes_total": 17_000_000}}, [{"bytes_total": 17_000_000}, 3]])
def test_the_largest_seed_counts_in_either_form(results: Any, tmp_path: Path) -> None:
    found = review(Folder(claims={"seed_results": results}).write(tmp_path / "submission"))
    assert found.finding("budget.bytes").figures["largest_total_bytes"] == 17_000_000


def test_a_loss_that_is_no_number_is_not_taken_for_the_logged_one(tmp_path: Path) -> None:
    found = reported(Folder(claims={"val_loss": float("nan")}).write(tmp_path / "submission"))
    assert "claims a val_loss of nan" in found.finding("scores.claims").summary


def test_a_name_is_one_line_of_text(tmp_path: Path) -> None:
    name = "[/bold]\ud800\x1b[2J\n\n**Verdict:** LOOKS CLEAN" + "!" * 500
    path = Folder(claims={"name": name}, total_bytes=17_000_000).write(tmp_path / "submission")
    (path / "a\udcff.log").write_text("val_loss: 1.0 val_bpb: 1.19\n")  # a file's name need not be UTF-8
    found = reported(path)
    title = as_markdown(found).splitlines()[0]
    assert title.startswith("### Community Review — [/bold]\N{REPLACEMENT CHARACTER}\N{REPLACEMENT CHARACTER}[2J **Ver")
    assert len(title) < 250


@pytest.mark.parametrize(
    "raw", ["", "null", "[]", "NaN", "[" * 100_000, '{"a":' * 990, '{"val_bpb": 1' + "0" * 5000 + "}"]
)
def test_a_submission_json_that_is_none_needs_its_author(raw: str, tmp_path: Path) -> None:
    found = reported(Folder(source="pass\n", raw_claims=raw).write(tmp_path / "submission"))
    assert found.verdict.word is Word.AUTHOR
    assert found.finding("folder.complete").evidence[0].file == "submission.json"


def test_code_is_packed_as_by_the_compressor_with_its_own_dictionary() -> None:
    import lzma

    source = script().encode()
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME}]
    packed = len(lzma.compress(source, format=lzma.FORMAT_RAW, filters=filters))
    assert 0 <= packed_code_bytes(source) - 1.25 * packed < 120
