"""The GPU scripts are walked through on a CPU: a GPU's minutes must not be spent on their mistakes."""

import argparse
import importlib
import json
import os
import runpy
import statistics
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
import torch

from bytejepa.config import replace
from bytejepa.model.initialization import initialize
from bytejepa.presets import preset
from bytejepa.training import muon, trainer

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu_training.py"


@pytest.mark.integration
def test_every_section_runs_and_reports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "report.json"
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), str(out), "--rehearse"])
    monkeypatch.syspath_prepend(SCRIPT.parent)
    script = importlib.import_module(SCRIPT.stem)
    monkeypatch.setattr(script, "preset", lambda name: replace(preset(name), training={"validation_bytes": 1000}))
    script.main()
    report = json.loads(out.read_text())
    failed = {name: value for name, value in report.items() if str(value).startswith(("failed", "not reached"))}
    assert not failed, failed
    assert report["attention"]["flash"]["relative_error"] < 1e-5
    assert report["attention"]["blocked"]["relative_error"] < 1e-5
    speeds = [value for name, value in report.items() if name.startswith("speed: ")]
    assert len(speeds) == 19
    assert report["targets"]["step_ms"].startswith(("met: ", "missed: "))
    assert report["targets"]["utilization"].startswith(("met: ", "missed: "))
    assert all(speed["bytes_per_s"] > 0 and speed["utilization"] > 0 for speed in speeds)
    assert report["speed: ours"]["parts_ms"].keys() >= {"data", "forward", "backward", "optimizer", "attention"}
    assert report["kernels"]["all_ms"] > 0
    assert len(report["agreement"]["cpu"]["last_losses_nats"]) >= 1


def test_agreement_is_judged_by_bfloat16s_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(SCRIPT.parent)
    compared = runpy.run_path(str(SCRIPT))["compared"]
    assert compared(2.0, 1.995) == {"relative_difference": pytest.approx(0.0025), "target": "met: at most 2^-8"}
    assert compared(2.0, 2.01)["target"].startswith("missed")


def test_rounding_on_a_cpu_is_a_gpus_and_ends_with_its_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(SCRIPT.parent)
    script = importlib.import_module("gpu_rounding_on_cpu")
    training = importlib.import_module("gpu_training")
    config, device = training.rehearsal()[0], torch.device("cpu")
    matrices = torch.randn(2, 8, 8, generator=torch.Generator().manual_seed(0))
    exact = muon.orthogonalize(matrices)
    with script.rounded_as_on_a_gpu():
        model = trainer.on_device(initialize(trainer.ByteLM(config), 0), device)
        assert model.hidden(torch.zeros(1, 8, dtype=torch.int64))[0].dtype == torch.bfloat16
        rounded = muon.orthogonalize(matrices, (muon.QUINTIC,) * 5)
    assert rounded.dtype == torch.bfloat16
    torch.testing.assert_close(rounded.float(), exact, rtol=0.05, atol=0.05)
    assert trainer.on_device(model, device).compute_dtype == torch.float32
    assert torch.equal(muon.orthogonalize(matrices), exact)


def test_the_interval_of_one_more_run_is_students(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(SCRIPT.parent)
    found = importlib.import_module("gpu_rounding_on_cpu").summary([-1.0, 0.0, 1.0])
    reach = 4.302653 * (4 / 3) ** 0.5  # of two degrees of freedom
    assert found == {"mean": 0, "standard_deviation": 1, "one_more_run": pytest.approx([-reach, reach], rel=1e-5)}


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
    arms, seeds = ("pr832", "golf-chunks"), (1, 2)
    options = ("--seconds", 0.5, "--rehearse", "--score-bytes", 1000, "--arms", *arms, "--seeds", *seeds)
    run_script("gpu_comparison.py", embedded_shards, tmp_path, *options, "--also", f"others={embedded_shards}")
    report = json.loads((tmp_path / "comparison.json").read_text())
    rows = report["runs"]
    assert [(row["arm"], row["seed"]) for row in rows] == [(arm, seed) for arm in arms for seed in seeds]
    for row in rows:
        assert row["train_s"] >= 0.5
        assert row["artifact_bpb"]["books"] == pytest.approx(row["average_bpb"]["books"], abs=0.05)
        assert row["artifact_bpb"]["others"] == row["artifact_bpb"]["books"]
        assert row["artifact_bytes"] == (tmp_path / f"{row['arm']}-{row['seed']}.bjm").stat().st_size
    assert rows[0]["average_bpb"] != rows[1]["average_bpb"]
    difference = report["differences"][0]
    assert (difference["arm"], difference["minus"], difference["score"]) == ("golf-chunks", "pr832", "raw_bpb")
    expected = statistics.mean(rows[2 + seed]["raw_bpb"]["books"] - rows[seed]["raw_bpb"]["books"] for seed in (0, 1))
    assert difference["mean"] == pytest.approx(expected)
    assert len(report["differences"]) == 3 * 2


@pytest.mark.slow
def test_a_comparison_begins_no_seed_that_it_could_not_finish_and_scores_the_others(
    embedded_shards: Path, tmp_path: Path
) -> None:
    options = ("--seconds", 30, "--rehearse", "--score-bytes", 1000, "--arms", "pr832", "golf", "--seeds", 1, 2)
    run_script("gpu_comparison.py", embedded_shards, tmp_path, *options, "--minutes", 2.3)
    report = json.loads((tmp_path / "comparison.json").read_text())
    assert [(row["arm"], row["seed"]) for row in report["runs"]] == [("pr832", 1), ("golf", 1)]
    assert all("artifact_bpb" in row for row in report["runs"])


@pytest.mark.slow
def test_turns_begin_when_they_are_opened_and_one_at_a_time(tmp_path: Path) -> None:
    turn = tmp_path / "turn"
    program = (
        "import time\nfrom turns import alone\nwith alone():\n b = time.time(); time.sleep(0.3); print(b, time.time())"
    )
    environment = os.environ | {"BYTEJEPA_TURN_FILE": str(turn), "PYTHONPATH": str(SCRIPT.parent)}
    command = [sys.executable, "-c", program]
    started = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    while len(list(tmp_path.glob("turn.*.ready"))) < 2:
        time.sleep(0.05)
    opened = time.time()
    (tmp_path / "turn.open").touch()
    first, second = sorted([float(word) for word in process.communicate()[0].split()] for process in started)
    assert opened <= first[0] < first[1] <= second[0]


@pytest.mark.slow
def test_the_codec_script_checks_both_ways_and_measures(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_bytes(b"The gentleman from Indiana has the floor. " * 60)
    options = ("--device", "cpu", "--eager-only", "--bytes", 100, "--window", 32, "--lanes", 2, "--models", "shipped")
    run_script("gpu_codec.py", tmp_path / "codec.json", text, *options)
    report = json.loads((tmp_path / "codec.json").read_text())
    assert all(report["restored"].values())
    assert min(report["shipped"].values()) > 0


def gpu_checks(monkeypatch: pytest.MonkeyPatch, stages: list[tuple[str, float, dict[str, str]]]) -> ModuleType:
    """Return the script with `stages` of its own: a name, the usual seconds, programs."""
    monkeypatch.syspath_prepend(SCRIPT.parent)
    monkeypatch.setenv("PYTHONPATH", str(SCRIPT.parent))
    checks = importlib.import_module("gpu_checks")
    made = [checks.Stage(name, s, {p: ["-c", code] for p, code in programs.items()}) for name, s, programs in stages]
    monkeypatch.setattr(checks, "stages", lambda *_: made)
    return checks


@pytest.mark.integration
def test_stages_run_in_turn_as_long_as_there_is_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    marked = (
        "import time; time.sleep({1}); from turns import alone\nwith alone(): open({0!r}, 'w').write(str(time.time()))"
    )
    files = [tmp_path / name for name in ("quick", "slow", "next")]
    quick, slow, after = (marked.format(str(file), wait) for file, wait in zip(files, (0, 1.5, 0), strict=True))
    stages = [
        ("first", 1.0, {"quick": quick, "slow": slow, "broken": "1/0"}),
        ("second", 1.0, {"after": after}),
        ("long", 3600.0, {"never": "raise SystemExit"}),
        ("late", 1.0, {"endless": "import time; time.sleep(600)"}),
    ]
    checks = gpu_checks(monkeypatch, stages)
    monkeypatch.setattr(sys, "argv", ["gpu_checks.py", "data", str(tmp_path / "out"), "text", "--minutes", "0.25"])
    begin = time.time()
    checks.main()
    assert 15 <= time.time() - begin < 25
    times = [float(file.read_text()) for file in files]
    assert begin + 1.5 < min(times[:2])  # nobody is timed while another compiles
    assert max(times[:2]) < times[2]
    said = [line.split("s  ", 1)[1] for line in capsys.readouterr().out.splitlines()]
    assert said == [
        "quick: ended with 0", "slow: ended with 0", "broken: ended with 1", "after: ended with 0",
        "long: left out, too little time is left", "endless: stopped, it took too long",
    ]  # fmt: skip


def test_every_command_of_the_checks_is_one_that_its_script_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(SCRIPT.parent)
    checks = importlib.import_module("gpu_checks")
    sections = runpy.run_path(str(SCRIPT))
    known = {"kernels", "agreement", *(f"speed: {name}" for name in sections["speeds"](None, *sections["rehearsal"]()))}
    options = argparse.Namespace(
        data=tmp_path, out=tmp_path, text=tmp_path, seeds=[1], seconds=1.0, arms=["pr832", "golf"], also=[]
    )
    found = [words for stage in checks.stages(options, 600.0) for words in stage.programs.values()]
    assert len(found) == 10
    for words in found:
        if words[0] == str(SCRIPT):
            only = words[words.index("--only") + 1 :]
            named = only[: only.index("--attention")] if "--attention" in only else only
            assert set(named) <= known, named
        else:
            assert words[0] == "-m" or Path(words[0]).is_file()


def test_a_stage_that_is_not_there_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:  # type: ignore[no-untyped-def]
    checks = gpu_checks(monkeypatch, [("first", 1.0, {"quick": ""})])
    words = ["data", str(tmp_path / "out"), "text", "--only", "frist"]
    monkeypatch.setattr(sys, "argv", ["gpu_checks.py", *words])
    with pytest.raises(SystemExit):
        checks.main()
    assert "no stage frist; there are first" in capsys.readouterr().err
