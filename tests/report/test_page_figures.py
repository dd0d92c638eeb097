"""The page's own figures: how far a run got, and which runs a mean is of."""

from __future__ import annotations

from pathlib import Path

import pytest

from bytejepa.artifact.load import starting_point
from bytejepa.config import RunConfig, replace
from bytejepa.report.inputs import ReportInputs, read_inputs
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
