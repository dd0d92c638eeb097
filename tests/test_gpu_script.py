"""The GPU scripts are walked through on a CPU: a GPU's minutes must not be spent on their mistakes."""

import json
import runpy
import subprocess
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
    assert report["targets"]["step_ms"].startswith(("met: ", "missed: "))
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


def run_script(name: str, *words: object) -> None:
    subprocess.run([sys.executable, SCRIPT.with_name(name), *map(str, words)], check=True, capture_output=True)


@pytest.mark.slow
def test_arms_of_the_comparison_train_and_come_back_from_their_artifacts(embedded_shards: Path, tmp_path: Path) -> None:
    arms = ("pr832", "golf-chunks")
    options = ("--seconds", 0.5, "--rehearse", "--score-bytes", 1000, "--arms", *arms)
    run_script("gpu_comparison.py", embedded_shards, tmp_path, *options)
    rows = json.loads((tmp_path / "comparison.json").read_text())
    assert [row["arm"] for row in rows] == list(arms)
    for row in rows:
        assert row["train_s"] >= 0.5
        assert row["artifact_bpb"] == pytest.approx(row["average_bpb"], abs=0.05)
        assert row["artifact_bytes"] == (tmp_path / f"{row['arm']}.bjm").stat().st_size


@pytest.mark.slow
def test_the_codec_script_checks_both_ways_and_measures(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_bytes(b"The gentleman from Indiana has the floor. " * 60)
    options = ("--device", "cpu", "--eager-only", "--bytes", 100, "--window", 32, "--lanes", 2, "--models", "shipped")
    run_script("gpu_codec.py", tmp_path / "codec.json", text, *options)
    report = json.loads((tmp_path / "codec.json").read_text())
    assert all(report["restored"].values())
    assert min(report["shipped"].values()) > 0
