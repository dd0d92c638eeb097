"""The GPU script is walked through on a CPU: a lent GPU must not be spent on its mistakes."""

import json
import runpy
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu_training.py"


def test_every_section_runs_and_reports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "report.json"
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), str(out), "--rehearse"])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    report = json.loads(out.read_text())
    failed = {name: value for name, value in report.items() if str(value).startswith(("failed", "not reached"))}
    assert not failed
    assert report["attention"]["flash"]["relative_error"] < 1e-5
    assert report["attention"]["blocked"]["relative_error"] < 1e-5
    speeds = [value for name, value in report.items() if name.startswith("speed: ")]
    assert len(speeds) == 15
    losses = {name: value["last_loss_nats"] for name, value in report.items() if name.startswith("speed: without ")}
    parts = [name for name in losses if "JEPA" not in name]
    assert len(parts) == 5
    for name in parts:  # what is taken away costs time, not arithmetic
        assert losses[name] == pytest.approx(report["speed: ours"]["last_loss_nats"], abs=0.3)
    assert report["targets"]["step_ms"].startswith("met: ")
    assert report["targets"]["utilization"].startswith(("met: ", "missed: "))
    assert all(speed["bytes_per_s"] > 0 and speed["utilization"] > 0 for speed in speeds)
    assert report["speed: ours"]["parts_ms"].keys() >= {"data", "forward", "backward", "optimizer", "attention"}
    assert len(report["agreement"]["cpu"]["last_losses_nats"]) >= 1
