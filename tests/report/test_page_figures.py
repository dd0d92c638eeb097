"""The page's own figures: how far a run got, and which runs a mean is of."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from bytejepa.artifact.load import starting_point
from bytejepa.config import RunConfig, replace
from bytejepa.presets import preset
from bytejepa.report.curves import THROUGHPUT_POINTS
from bytejepa.report.drawing import WIDE
from bytejepa.report.inputs import Configuration, LoggedRun, ReportInputs, read_inputs
from bytejepa.report.learning_plots import compared_curves, latents, learning_curves, throughput_plot
from bytejepa.report.measurements import GradientBatch, PricedText, RunMeasurements, StageScore
from bytejepa.report.page import run_table, summary
from bytejepa.training.runs import train


def cells_of(inputs: ReportInputs) -> dict[str, str]:
    """Return the first line of the table of runs by its columns."""
    grid = run_table(inputs, {})
    return dict(zip(grid.columns, grid.rows[0], strict=True))


@pytest.mark.parametrize(
    "training",
    [
        pytest.param({"validate_every_steps": 3}, id="validated right after the last step"),
        pytest.param({"log_every_steps": 4, "validate_every_steps": None}, id="ended between two lines of the log"),
    ],
)
def test_steps_and_seconds_are_those_of_the_whole_run(
    training: dict[str, int | None], embedded_shards: Path, minimal_config: RunConfig, tmp_path: Path
) -> None:
    shards = embedded_shards
    if training["validate_every_steps"] is None:  # without a validation split there is no line at the end
        shards = tmp_path / "shards"
        shards.mkdir()
        (shards / "fineweb_train_000000.bin").symlink_to(embedded_shards / "fineweb_train_000000.bin")
    ended = train(replace(minimal_config, training=training), shards, tmp_path / "run")
    inputs = read_inputs([tmp_path / "run"])
    (run,) = inputs.configurations[0].runs
    assert (run.steps, run.num_bytes, run.train_s) == (ended.steps, ended.num_bytes, ended.elapsed_s)
    cells = cells_of(inputs)
    assert (cells["steps"], cells["seconds"]) == ("6", f"{ended.elapsed_s:,.1f}")
    figures = {figure.label: figure for figure in summary(inputs.configurations[0], {})}
    assert figures["steps"].value == "6"
    assert figures["seconds of training"].value == f"{ended.elapsed_s:,.0f}"
    assert figures["seconds of training"].detail == f"{ended.num_bytes / ended.elapsed_s / 1e3:,.1f} kB/s"


def test_runs_on_other_data_or_from_other_weights_are_no_seeds_of_one_another(
    minimal_run: Path, minimal_config: RunConfig, embedded_shards: Path, tiny_shards: Path, tmp_path: Path
) -> None:
    train(replace(minimal_config, training={"seed": 7}), embedded_shards, tmp_path / "another_seed")
    train(minimal_config, tiny_shards, tmp_path / "other_data")
    start = starting_point(minimal_run)
    train(minimal_config, embedded_shards, tmp_path / "went_on", start=start)
    runs = [minimal_run, *(tmp_path / name for name in ("another_seed", "other_data", "went_on"))]
    found = [[run.name for run in c.runs] for c in read_inputs(runs).configurations]
    assert found == [[minimal_run.name, "another_seed"], ["other_data"], ["went_on"]]


def logged_run(name: str, seed: int = 1, clock: list[float] | None = None, **overrides: dict[str, object]) -> LoggedRun:
    """A run of `tiny` that was validated twice."""
    config = replace(preset("tiny"), **overrides)
    config = replace(config, training={"seed": seed})
    metrics = [
        {
            "step": n,
            "num_bytes": 1e6 * n,
            "train_bpb": 4.0 - n,
            "val_bpb": 3.0,
            "val_bpb_average": 3.0,
            "jepa_latent_std": 1.0,
        }
        for n in (1, 2)
    ]
    return LoggedRun(path=Path(name), config=config, manifest={}, metrics=metrics, step_starts_s=clock or [])


def measurements(bpb: float = 2.0, *, num_bytes: int = 9, window: int = 4, step: int = 2) -> RunMeasurements:
    return RunMeasurements(
        step=step,
        scores={stage: StageScore(bpb=bpb, num_bytes=num_bytes) for stage in ("raw", "average", "artifact")},
        priced=PricedText(
            ids=np.full(num_bytes + 1, 101, dtype=np.uint16), bits=np.ones(num_bytes), window=window, is_whole_split=True
        ),
        tensors=(), gradient_batch=GradientBatch(num_sequences=1, sequence_bytes=4, jepa_lambda=0.0), weights_bytes=300,
        joint_bytes=0, code_bytes=100, limit_bytes=1000, device="cpu",
    )  # fmt: skip


def test_a_score_of_one_measured_seed_is_no_mean() -> None:
    configuration = Configuration(label="a", runs=(logged_run("a", 5), logged_run("b", 6)))
    details = {f.label: f.detail for f in summary(configuration, {"a": [measurements()]})}
    assert details["bpb, artifact"] == details["bpb, raw weights"] == "seed 5"
    assert "mean" not in details["bytes, weights and code"]
    both = {f.label: f.detail for f in summary(configuration, {"a": [measurements(), measurements(3.0)]})}
    assert both["bpb, artifact"] == "± 0.7071, 2 seeds"
    unmeasured = {f.label: (f.value, f.detail) for f in summary(configuration, {})}
    assert unmeasured["bpb, artifact"] == ("–", "not measured")


def test_without_an_average_the_live_score_is_shown_once() -> None:
    plain = Configuration(label="a", runs=(logged_run("a", training={"ema_decay": None}),))
    averaged = Configuration(label="b", runs=(logged_run("b", training={"ema_decay": None, "swa_start": 0.5}),))
    inputs = ReportInputs(configurations=(plain, averaged), study=None, study_path=None)
    measured = {"a": [measurements()], "b": [measurements()]}
    assert [f.label for f in summary(plain, measured)][:2] == ["bpb, artifact", "bpb, raw weights"]
    assert [f.label for f in summary(averaged, measured)][1] == "bpb, averaged weights"
    grid = run_table(inputs, measured)
    assert [row[2:5] for row in grid.rows] == [["2.0000", "–", "2.0000"], ["2.0000", "2.0000", "2.0000"]]
    assert "no average kept" in grid.caption
    curves = learning_curves(plain, "curves")
    assert {row[5] for row in curves.table.rows} == {"train_bpb", "val_bpb"}
    assert "running average" not in curves.caption
    assert len(learning_curves(averaged, "curves").draw(WIDE).axes[0].get_lines()) == 3
    assert len(curves.draw(WIDE).axes[0].get_lines()) == 2
    assert (
        "of the live weights (a); the averaged weights (b) on validation" in compared_curves([plain, averaged]).caption
    )


def test_the_captions_of_different_configurations_name_the_figures_of_each() -> None:
    a = Configuration(label="a", runs=(logged_run("a", jepa={"latent_dim": 16}),))
    b = Configuration(label="b", runs=(logged_run("b", jepa={"latent_dim": 32}),))
    plot = latents([a, b])
    assert plot is not None
    assert "There are 16 dimensions (a); 32 dimensions (b)." in plot.caption
    inputs = ReportInputs(configurations=(a, b), study=None, study_path=None)
    caption = run_table(inputs, {"a": [measurements()], "b": [measurements(num_bytes=7, window=2)]}).caption
    assert (
        "on the first 9 bytes of the validation split, non-overlapping windows of 4 ids (a); the first 7 bytes"
        in caption
    )
    assert "windows of 2 ids (b); a dash: not measured. " in caption


@pytest.mark.parametrize("steps", [1, 7, 60, 100, 6000])
def test_throughput_has_a_point_for_every_step_of_a_short_run(steps: int) -> None:
    plot = throughput_plot(
        [Configuration(label="a", runs=(logged_run("a", clock=list(map(float, range(steps + 1)))),))]
    )
    assert plot is not None
    assert len(plot.table.rows) == min(steps, THROUGHPUT_POINTS)
    assert "for each of 60 equal parts of the run's steps, or for every step where they are fewer" in plot.caption


def test_a_checkpoint_before_the_last_logged_step_is_named() -> None:
    configuration = Configuration(label="a", runs=(logged_run("killed"), logged_run("over", 2)))
    inputs = ReportInputs(configurations=(configuration,), study=None, study_path=None)
    caption = run_table(inputs, {"a": [measurements(step=1), measurements()]}).caption
    assert "before the last logged step: killed after 1 of 2 steps. " in caption
    assert "newest checkpoint" not in run_table(inputs, {"a": [measurements(), measurements()]}).caption


def test_the_speed_of_a_resumed_run_names_every_machine() -> None:
    run = logged_run("a", clock=[0.0, 1.0, 3.0])
    machines = [
        {"device": "cpu", "processor": "A", "world_size": 1},
        {"device": "cpu", "processor": "B", "world_size": 2},
    ]
    run.manifest.update({**machines[0], "resumed": [{"after_step": 1, **machine} for machine in machines]})
    plot = throughput_plot([Configuration(label="a", runs=(run,))])
    assert plot is not None
    assert plot.caption.endswith("Machine: A, 1 rank; B, 2 ranks.")
