"""What is dead in a run that began with an earlier model: what has not moved from where that run began."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bytejepa.artifact.load import read_run, starting_point
from bytejepa.config import RunConfig, replace
from bytejepa.report.measure import measure
from bytejepa.report.model_plots import gradient_plot
from bytejepa.training import checkpoint
from bytejepa.training.runlog import RunFolder
from bytejepa.training.runs import train

FROZEN = "blocks.0.attention.query.weight"


@pytest.fixture
def went_on(minimal_run: Path, minimal_config: RunConfig, embedded_shards: Path, tmp_path: Path) -> Path:
    """A run that began with a model which lies beside it."""
    shutil.copytree(minimal_run, tmp_path / "earlier")
    config = replace(minimal_config, training={"keep_checkpoints": 9, "seed": 5})
    train(config, embedded_shards, tmp_path / "run", start=starting_point(tmp_path / "earlier"))
    return tmp_path / "run"


def freeze(monkeypatch: pytest.MonkeyPatch, weights: Tensor) -> None:
    """Let a measured run look as if one matrix got no gradient and still were `weights`."""
    from bytejepa.report import measure as module

    gradients, read = module._gradients, module.read_run

    def without_one(*arguments: object) -> object:
        batch, by_name = gradients(*arguments)  # type: ignore[arg-type]
        return batch, by_name | {FROZEN: torch.zeros_like(weights)}

    def unmoved(run: Path) -> object:
        trained = read(run)
        trained.raw[FROZEN] = weights
        return trained

    monkeypatch.setattr(module, "_gradients", without_one)
    monkeypatch.setattr(module, "read_run", unmoved)


@pytest.mark.parametrize("kept", ["its first checkpoint", "the model", "neither", "another model"])
def test_what_is_dead_never_moved_from_where_the_run_began(
    kept: str, went_on: Path, minimal_config: RunConfig, embedded_shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    earlier = went_on.with_name("earlier")
    begun = read_run(earlier).average
    freeze(monkeypatch, begun[FROZEN])
    if kept != "its first checkpoint":
        checkpoint.remove(RunFolder(went_on).checkpoints_path, 0)
    if kept != "the model":
        shutil.rmtree(earlier)
    if kept == "another model":
        train(replace(minimal_config, training={"seed": 9}), embedded_shards, earlier)
    measured = measure(went_on, score_bytes=500)
    caption = gradient_plot(measured, name="gradients", about="").caption
    figures = {tensor.name: tensor for tensor in measured.tensors}
    if kept in ("its first checkpoint", "the model"):
        assert figures[FROZEN].flow == "dead"
        for name, figure in figures.items():
            assert figure.initial_rms == pytest.approx(float(begun[name].double().square().mean().sqrt()))
        assert f"Dead parameters in modules that are alive: {FROZEN}." in caption
    else:
        assert figures[FROZEN].flow == "no gradient"
        assert {figure.initial_rms for figure in figures.values()} == {None}
        assert "the weights that the run began with are not there any more" in caption
        assert "No module is dead" not in caption
