"""The smoke test: figures of a good script; time, memory, network and files are bounded; nothing runs without `run`."""

from __future__ import annotations

import math
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from bytejepa.review import Status, Word, review
from bytejepa.review import smoke as smoke_module
from bytejepa.review.smoke import run_script
from bytejepa.review.smoke_harness import REFUSAL
from review.folders import Folder
from review.scripts import script, wrap

pytestmark = pytest.mark.integration


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


def test_a_script_that_cannot_be_imported_needs_its_author(tmp_path) -> None:
    found = review(
        Folder(source="import a_module_that_nobody_has\n" + script()).write(tmp_path / "submission"), run=True
    )
    assert found.verdict.word is Word.AUTHOR
    assert "a_module_that_nobody_has" in found.verdict.reason


@pytest.mark.parametrize(
    "source",
    [
        "data = bytearray(9 << 30)",
        "open('big', 'wb').write(bytes(65 << 20))",
        "while True: pass",
    ],
)
def test_the_bounds_hold(source: str, tmp_path) -> None:
    result = smoke(tmp_path, source, wall_s=3.0 if "while" in source else 60.0)
    assert result["stage"] == "prepared", result
    assert result["error"]


def test_other_programs_are_refused(tmp_path: Path) -> None:
    result = smoke(tmp_path, "import subprocess\nsubprocess.run(['true'])")
    assert result["error"] == f"OSError: {REFUSAL}"


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    """A port of this machine that would answer."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        yield server


CONNECTIONS = {
    "socket": "import socket\nsocket.create_connection(('127.0.0.1', PORT))",
    "urllib": "import urllib.request\nurllib.request.urlopen('http://127.0.0.1:PORT/')",
    "under the block": "import _socket\n_socket.socket(_socket.AF_INET, _socket.SOCK_STREAM).connect(('127.0.0.1', PORT))",
}


@pytest.mark.parametrize("how", ["socket", "urllib"])
def test_blocked_sockets_alone_keep_the_network_away(
    listener: socket.socket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    monkeypatch.setattr(smoke_module, "isolation", list)
    result = smoke(tmp_path, CONNECTIONS[how].replace("PORT", str(listener.getsockname()[1])))
    assert REFUSAL in result["error"]
    assert result["isolation"].startswith("no network namespace available, blocked sockets")
    with pytest.raises(BlockingIOError):
        listener.accept()


def test_the_namespace_alone_keeps_the_network_away(listener: socket.socket, tmp_path: Path) -> None:
    if not smoke_module.isolation():
        pytest.skip("this system allows no network namespace")
    result = smoke(tmp_path, CONNECTIONS["under the block"].replace("PORT", str(listener.getsockname()[1])))
    assert result["error"].startswith("OSError")
    assert result["isolation"].startswith("own network namespace, blocked sockets")
    with pytest.raises(BlockingIOError):
        listener.accept()


def test_isolation_is_claimed_only_where_it_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    harness = tmp_path / "harness.py"
    harness.write_text(smoke_module._HARNESS.read_text().replace("    block_the_outside()\n", ""))
    monkeypatch.setattr(smoke_module, "_HARNESS", harness)
    monkeypatch.setattr(smoke_module, "isolation", list)
    expected = "no network namespace available, sockets not blocked, resource limits"
    assert smoke(tmp_path, "pass")["isolation"] == expected


def test_a_script_that_initialises_its_model_is_asked_to_and_may_be_wrapped(tmp_path: Path) -> None:
    own = "\ndef initialize(model, seed):\n    for p in model.parameters():\n        p.data.zero_()\n"
    result = smoke(tmp_path, wrap(script() + own))
    assert result["stage"] == "done"
    assert result["forward_loss_nats"] == pytest.approx(math.log(260), abs=1e-3)


def test_the_folder_is_not_touched(tmp_path) -> None:
    smoke(tmp_path, "open('mark', 'w').write('x')\nimport pathlib\npathlib.Path(__file__).write_text('')")
    assert (tmp_path / "submission" / "train_gpt.py").read_text()
    assert not (tmp_path / "submission" / "mark").exists()
