"""`bench`: what it refuses before it measures, and that nothing measured is lost afterwards."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bytejepa.benchmark import bench, scaling
from conftest import MINIMAL

Refuses = Callable[..., str]
CONFIG = 2
ROW = {
    "axis": "batch", "value": 256, "gflop_per_step": 0.1, "step_ms": 2.0, "fastest_ms": 1.5, "bytes_per_s": 1000.0,
    "tflop_per_s": 0.05, "utilization": 0.5, "peak_memory_bytes": 10**9,
}  # fmt: skip


@pytest.fixture(autouse=True)
def nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scaling returns at once; all else would fail the test."""

    def measured(*_: Any, **__: Any) -> None:
        pytest.fail("measured what had to be refused")

    for name in ("bench_train", "bench_eval", "bench_load", "bench_prepare"):
        monkeypatch.setattr(bench, name, measured)
    monkeypatch.setattr(scaling, "bench_scaling", lambda *_, **__: [ROW])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--steps", 0), "--steps: expected 1 or more, got 0"),
        (("--what", "load", "--steps", 0), "--steps: expected 1 or more, got 0"),
        (("--what", "prepare", "--megabytes", 0), "--megabytes: expected 1 or more, got 0"),
        (("--what", "prepare", "--workers", 0), "--workers: expected 1 or more, got 0"),
        (("--what", "eval", "--num-bytes", 1), "--num-bytes: expected 2 or more, got 1"),
        (("--what", "codec", "--threads", 0), "--threads: expected 1 to 1024, got 0"),
        (("--what", "generate", "--lanes", 4, 0), "--lanes: expected 1 or more, got 0"),
    ],
)
def test_numbers_out_of_range(refuses: Refuses, words: tuple[object, ...], said: str) -> None:
    assert said in refuses(CONFIG, "bench", *MINIMAL, *words)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--what", "eval", "--against", "plain"), "--against belongs to --what train, got --what eval"),
        (("--what", "eval", "--scaling"), "--scaling belongs to --what train, got --what eval"),
        (("--what", "load", "--lanes", 2), "--lanes belongs to --what generate or codec, got --what load"),
        (("--what", "prepare", "--steps", 3), "--steps belongs to"),
        (("--scaling", "--against", "plain"), "leave out --against and --parts, or --scaling"),
        (("--scaling", "--parts"), "leave out --against and --parts, or --scaling"),
        (("-o", "x.png"), "--output and --force are about the plot of --scaling"),
    ],
)
def test_options_that_would_be_ignored(refuses: Refuses, words: tuple[object, ...], said: str) -> None:
    assert said in refuses(CONFIG, "bench", *MINIMAL, *words)


def test_a_plot_that_could_not_be_written_is_refused_before_measuring(
    refuses: Refuses, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(scaling, "bench_scaling", bench.bench_train)
    kept = tmp_path / "kept.png"
    kept.write_bytes(b"mine")
    (tmp_path / "folder.png").mkdir()
    for name, said in {
        "kept.png": "kept.png exists (use --force to replace it)",
        "nowhere/x.png": "nowhere/x.png: No such file or directory (make its folder first)",
        "folder.png": "folder.png: Is a directory (name a file)",
        "x.txt": "ends in .png, .svg or .pdf",
    }.items():
        assert said in refuses(CONFIG, "bench", *MINIMAL, "--scaling", "-o", tmp_path / name)
    assert kept.read_bytes() == b"mine"


def test_force_replaces_a_plot(command: Callable[..., Any], tmp_path: Path) -> None:
    plot = tmp_path / "plot.svg"
    plot.write_bytes(b"mine")
    done = command("bench", *MINIMAL, "--scaling", "-o", plot, "--force", "--json")
    assert done.code == 0, done
    assert json.loads(done.out) == [ROW]
    assert b"<svg" in plot.read_bytes()


def test_a_disk_that_fills_up_costs_the_plot_but_not_the_table(
    command: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(scaling, "write_atomically", full)
    done = command("bench", *MINIMAL, "--scaling", "-o", tmp_path / "plot.png")
    assert done.code == CONFIG
    assert "batch" in done.out
    assert "50.0%" in done.out
    assert done.err.count("\n") == 1
    assert "cannot write the plot" in done.err
