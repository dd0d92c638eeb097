"""Files of a submission may hold anything, by mistake or on purpose: its review ends in findings, never in a traceback."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from bytejepa.cli.terminal import json_text
from bytejepa.config import RunConfig
from bytejepa.review import Review, Status, Word, review, wrappers
from bytejepa.review.budget import packed_code_bytes
from bytejepa.review.report_forms import as_markdown, print_terminal
from bytejepa.training.runlog import RunFolder, run_manifest
from review.folders import Folder
from review.scripts import script


def reported(path: Path) -> Review:
    """Return the review of a folder after writing it in all three forms, as files in UTF-8."""
    found = review(path)
    terminal = io.StringIO()
    print_terminal(found, Console(file=terminal, width=120, highlight=False))
    json_text(found)
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


@pytest.mark.parametrize(
    "line",
    [
        "Total submission size: ,,, bytes",
        "model_params:_",
        "val_bytes: ,",
        "val_tokens: 1" + "0" * 400,
        "Code size: 1" + "0" * 400 + " bytes",
        "final_exact val_loss:1e999 val_bpb:1e999",
        "final_exact val_loss:0.5 val_bpb:1e-320\nval_tokens: 62021846",
        "final_exact val_loss:1e-320 val_bpb:0.9\nval_tokens: 62021846",
        "step:1/1 train_loss:1 train_time:1e999ms step_avg:1e999ms",
        "learning_rate: 1e999",
    ],
)
def test_figures_of_any_size_in_a_log_are_reviewed(line: str, tmp_path: Path) -> None:
    folder = Folder(source="pass\n", claims={"val_bpb": None, "baseline_bpb": 1.2244})
    path = folder.write(tmp_path / "submission")
    log = path / "train_seed42.log"
    log.write_text(log.read_text() + line + "\n")
    assert len(reported(path).facts["seeds"]) == 3


def test_a_score_without_its_loss_says_nothing_about_coverage(tmp_path: Path) -> None:
    folder = Folder(source="pass\n", extra_log="val_tokens: 151130891", claims={"val_bpb": None})
    path = folder.write(tmp_path / "submission")
    assert review(path).finding("scores.coverage").status is Status.PASS
    for log in path.glob("*.log"):
        log.write_text(log.read_text() + "other_exact val_loss:0.5 val_bpb:0.00000000\n")
    assert review(path).finding("scores.coverage").status is Status.PASS


@pytest.mark.parametrize(
    "readme",
    [
        "```bash\nVOCAB_SIZE=² torchrun train_gpt.py\n```\n",
        "```bash\nVOCAB_SIZE=" + "1" * 5000 + " torchrun train_gpt.py\n```\n",
        "FineWeb, fineweb10B_sp" + "1" * 5000,
        "artifact 1" + ",000" * 2000 + " bytes",
    ],
)
def test_numbers_in_a_readme_may_be_of_any_length(readme: str, tmp_path: Path) -> None:
    folder = Folder(
        source="pass\n", readme=readme, settings=("num_layers:13",), claims={"bytes_total": 0}, total_bytes=1
    )
    path = folder.write(tmp_path / "submission")
    for log in path.glob("*.log"):  # so that the README's total is looked for
        lines = log.read_text().splitlines()
        log.write_text("\n".join(line for line in lines if "bytes" not in line) + "\n")
    assert reported(path).finding("budget.bytes").status is Status.UNKNOWN


NUMBER = "0x" + "f" * 8000


def visible(source: str, tmp_path: Path) -> str:
    """Return what the review says it cannot see of a script, or that it cannot read it."""
    found = reported(Folder(source=source).write(tmp_path / "submission"))
    finding = found.finding("source.visible") or found.finding("source.syntax")
    assert finding.status is not Status.PASS
    return " ".join((finding.summary, *(evidence.text for evidence in finding.evidence)))


@pytest.mark.parametrize(
    "source",
    [
        "a = b\nb = a\nexec(a('x'))\n",
        "x = x.y\nexec(x(b'a'))\n",
        "a = a(1)\nexec(a.b('x'))\n",
        "a = getattr(a, 'b')\nexec(a('x'))\n",
        "a = getattr(b, 'c')\nb = __import__(a)\nexec(a(b))\n",
    ],
)
def test_names_that_lead_back_to_themselves_stay_closed(source: str, tmp_path: Path) -> None:
    assert "cannot be followed without running it" in visible(source, tmp_path)


def test_names_still_lead_to_decoders_through_other_names(tmp_path: Path) -> None:
    from bytejepa.review.wrappers import unpack

    source = (
        "a = __import__('zlib')\nb = getattr(a, 'decompress')\nc = b\n"
        "import importlib as i\nd = i.import_module('base64').b64decode\n"
        "exec(c(d('eJwrKMrMK9HQBAALXQJ/')))\n"
    )
    assert unpack(source).layers
    assert not unpack(source).closed, unpack(source)


DEEP = {
    "attributes": "x = a" + ".a" * 900,
    "executed calls": "exec(a" + "(1)" * 900 + ")",
    "sums": "x = " + "+".join(["a"] * 1500),
    "minus signs": "x = " + "-" * 50_000 + "1",
    "branches": "if a: pass\n" + "elif b: pass\n" * 6000,
    "bases": "class A(a" + ".a" * 400 + "): pass",
    "handlers": "try: import zstandard\nexcept a" + ".a" * 400 + ": import zlib\nzstandard.x",
    "windows": "x = [a for a in range(0, n, s) if " + "+".join(["b"] * 400) + "]",
    "names": "a0 = 1\n" + "".join(f"a{i + 1} = a{i}.b\n" for i in range(3000)) + "exec(a3000('x'))",
}  # fmt: skip


@pytest.mark.parametrize("kind", DEEP)
def test_scripts_nested_too_deeply_cannot_be_read(kind: str, tmp_path: Path) -> None:
    text = visible(DEEP[kind] + "\n", tmp_path)
    assert "the script cannot be read" in text
    assert "nested" in text or "names lead too far" in text


@pytest.mark.parametrize(
    "source", [f"open({NUMBER})", f"x = -{NUMBER}", f"@no_grad({NUMBER})\ndef f(): pass", f"x = f'{{{NUMBER}}}'"]
)
def test_a_script_with_a_huge_number_cannot_be_read(source: str, tmp_path: Path) -> None:
    assert "a whole number of more than 4096 bits on line 1" in visible(source + "\n", tmp_path)


@pytest.mark.parametrize(
    "lines",
    [
        "x = (10 ** 1000) ** 60\nprint(f'{x}')\nprint({}[x])",
        f"x = int('{'f' * 8000}', 16)\nopen(f'{{x}}')",
        "for i in range(10 ** 30): pass",
        "x = 'ab'\n" + "x = x + x\n" * 60 + "open(x)",
        "x = 'ab'\n" + "x = x.replace('a', x)\n" * 60 + "open(x)",
        "x = (1, 2)\n" + "x = (x, x)\n" * 60 + "open(f'{x}')",
        "x = [a for a in range(0, n, s) if 9 ** 9 ** 9 ** 9]",
        "x = [a for a in range(0, n, s) if a << 10 ** 10]",
        "import " + "a" * 300,
    ],
)
def test_what_would_be_huge_is_not_computed(lines: str, tmp_path: Path) -> None:
    found = reported(Folder(source=lines + "\n" + script()).write(tmp_path / "submission"))
    assert found.finding("source.visible").status is Status.PASS
    assert found.finding("source.scoring") is not None


def test_a_wrapper_of_sums_of_sums_stays_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wrappers, "MAX_COMPUTED", 20_000)
    sums = "".join(f"a{i + 1} = a{i} + a{i}\n" for i in range(24))
    assert "too much to compute" in visible(f"a0 = 'x'\n{sums}exec(a24)\n", tmp_path)


def test_a_file_that_cannot_be_read_is_one_line(tmp_path: Path, refuses: Callable[..., str]) -> None:
    path = Folder().write(tmp_path / "submission")
    (path / "train_gpt.py").unlink()
    (path / "train_gpt.py").symlink_to("/proc/self/mem")  # opens, and gives an error when read
    assert f"cannot read {path}: Input/output error" in refuses(3, "review", path)


@pytest.fixture
def run_folder(minimal_config: RunConfig, tmp_path: Path) -> RunFolder:
    """A run folder without a checkpoint."""
    folder = RunFolder(tmp_path / "run")
    folder.create(minimal_config, run_manifest(minimal_config, {}, {}))
    folder.append_metrics({"step": 1, "elapsed_s": 1.0, "val_bpb_average": 2.5})
    return folder


@pytest.mark.parametrize("value", ["2.5", [2.5], {}, 10**400, float("nan")])
def test_a_score_of_a_run_that_is_no_rate_is_left_out(value: Any, run_folder: RunFolder) -> None:
    run_folder.append_metrics({"step": 2, "elapsed_s": 2.0, "val_bpb_average": value})
    assert reported(run_folder.path).facts["mean_bpb"] == 2.5


@pytest.mark.parametrize("name", ["config.json", "manifest.json", "metrics.jsonl"])
def test_records_of_a_run_that_nest_too_deeply_need_its_author(name: str, run_folder: RunFolder) -> None:
    (run_folder.path / name).write_text("[" * 100_000 + "\n")
    assert reported(run_folder.path).verdict.word is Word.AUTHOR
