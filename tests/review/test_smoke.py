"""The smoke test: figures of a good script; time, memory, network and files are bounded; nothing runs without `run`."""

from __future__ import annotations

from pathlib import Path

import pytest

from bytejepa.review import Status, Word, review
from bytejepa.review.smoke import run_script
from review.folders import Folder
from review.scripts import script, wrap


def smoke(tmp_path: Path, source: str, **bounds: float) -> dict:
    path = tmp_path / "submission"
    path.mkdir()
    (path / "train_gpt.py").write_text(source)
    return run_script(path / "train_gpt.py", path, {}, **bounds)


def test_a_good_script_passes_with_its_figures(tmp_path) -> None:
    source = script(
        imports="from flash_attn_interface import flash_attn_func\nimport triton\n@triton.jit\ndef kernel(x): pass\n"
    )
    found = review(Folder(source=source).write(tmp_path / "submission"), run=True)
    finding = found.finding("smoke.cpu")
    assert finding.status is Status.PASS, finding
    figures = finding.figures
    assert (figures["width"], figures["layers"], figures["vocabulary"]) == (32, 2, 260)
    assert figures["parameters"] == 260 * 32 + 64 * 32 + 2 * (32 * 32 + 32)
    assert 3 < figures["forward_loss_nats"] < 60
    assert found.verdict.word is Word.CLEAN
    assert "SMOKE_TEST_PASS" in found.facts["smoke"]


def test_a_wrapped_script_is_tried_too(tmp_path) -> None:
    assert smoke(tmp_path, wrap(script()))["stage"] == "done"


def test_a_script_that_cannot_be_imported_needs_its_author(tmp_path) -> None:
    found = review(
        Folder(source="import a_module_that_nobody_has\n" + script()).write(tmp_path / "submission"), run=True
    )
    assert found.verdict.word is Word.AUTHOR
    assert "a_module_that_nobody_has" in found.verdict.reason


@pytest.mark.parametrize(
    "source",
    [
        "import socket\nsocket.create_connection(('127.0.0.1', 9))",
        "import urllib.request\nurllib.request.urlopen('http://127.0.0.1:9/')",
        "import subprocess\nsubprocess.run(['true'])",
        "data = bytearray(9 << 30)",
        "open('big', 'wb').write(bytes(65 << 20))",
        "while True: pass",
    ],
)
def test_the_bounds_hold(source: str, tmp_path) -> None:
    result = smoke(tmp_path, source, wall_s=3.0 if "while" in source else 60.0)
    assert result["stage"] == "prepared", result
    assert result["error"]
    assert "network namespace" in result["isolation"]


def test_the_folder_is_not_touched(tmp_path) -> None:
    smoke(tmp_path, "open('mark', 'w').write('x')\nimport pathlib\npathlib.Path(__file__).write_text('')")
    assert (tmp_path / "submission" / "train_gpt.py").read_text()
    assert not (tmp_path / "submission" / "mark").exists()
