"""The GPU script is walked through on a CPU: a lent GPU must not be spent on its mistakes."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu_training.py"


def test_every_section_runs_and_reports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "report.json"
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), str(out), "--rehearse"])
    monkeypatch.syspath_prepend(SCRIPT.parent)
    runpy.run_path(str(SCRIPT), run_name="__main__")
    report = json.loads(out.read_text())
    failed = {name: value for name, value in report.items() if str(value).startswith(("failed", "not reached"))}
    assert not failed
    assert report["attention"]["flash"]["relative_error"] < 1e-5
    assert report["attention"]["blocked"]["relative_error"] < 1e-5
    speeds = [value for name, value in report.items() if name.startswith("speed: ")]
    assert len(speeds) == 15
    assert report["targets"]["step_ms"].startswith("met: ")
    assert report["targets"]["utilization"].startswith(("met: ", "missed: "))
    assert all(speed["bytes_per_s"] > 0 and speed["utilization"] > 0 for speed in speeds)
    assert report["speed: ours"]["parts_ms"].keys() >= {"data", "forward", "backward", "optimizer", "attention"}
    assert len(report["agreement"]["cpu"]["last_losses_nats"]) >= 1


@pytest.mark.parametrize("name", ["batches made ahead", "foreach average", "fused AdamW", "batched Muon"])
def test_what_is_taken_away_costs_time_not_arithmetic_and_comes_back(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(SCRIPT.parent)
    script = runpy.run_path(str(SCRIPT))
    config, device = script["rehearsal"]()[0], torch.device("cpu")
    whole, reduced = (script["TrainingStep"](config, device, compile=False) for _ in range(2))
    undo = script["SWITCHES"][name](reduced)
    for _ in range(3):
        losses = [step().item() for step in (whole, reduced)]
    assert losses[0] == pytest.approx(losses[1], abs=0.2)  # other random bytes, where they are made at once
    undo()
    assert reduced().item() == pytest.approx(whole().item(), abs=0.2)
