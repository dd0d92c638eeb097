"""Reports on runs as the plans at equal time make them: packed compactly, validated at their end only."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib.collections import LineCollection

from bytejepa.artifact.container import read_container
from bytejepa.artifact.export import export
from bytejepa.artifact.quantize import order_hidden_units
from bytejepa.config import RunConfig, replace
from bytejepa.presets import tiny
from bytejepa.report.curves import seed_band
from bytejepa.report.drawing import WIDE
from bytejepa.report.learning_plots import compared_curves, learning_curves
from bytejepa.report.measure import in_trained_order, measure
from bytejepa.report.model_plots import artifact_parts
from bytejepa.training.runs import train
from small_models import small_model


@pytest.mark.parametrize("noise", [0.0, 0.05, 3.0])
def test_quantisation_errors_are_measured_between_the_same_hidden_units(noise: float) -> None:
    weights = {name: value.detach() for name, value in small_model().named_parameters() if value.ndim == 2}
    ordered, _ = order_hidden_units(weights, None, by_sensitivity=False)
    up = "blocks.1.mlp.up.weight"
    assert not torch.equal(ordered[up], weights[up])
    random = torch.Generator().manual_seed(0)
    stored = {
        name: value + noise * torch.randn(value.shape, generator=random) * value.std()
        for name, value in ordered.items()
    }
    restored = in_trained_order(stored, weights)
    for name in weights:
        assert sorted(restored[name].flatten().tolist()) == sorted(stored[name].flatten().tolist())
        if noise < 1:  # beyond recognition, units stay in some order
            torch.testing.assert_close(
                restored[name], weights[name], rtol=0, atol=max(1e-6, 6 * noise * float(weights[name].std()))
            )


def logged(seed: int, places: list[float], **curves: list[float]) -> SimpleNamespace:
    metrics = [
        {"step": n, "num_bytes": place * 1e6, **{key: values[n] for key, values in curves.items() if n < len(values)}}
        for n, place in enumerate(places)
    ]
    return SimpleNamespace(name=f"seed_{seed}", seed=seed, metrics=metrics, config=tiny())


def test_a_band_of_runs_that_ended_by_the_clock_is_at_their_mean_end() -> None:
    runs = [logged(1, [1.0], val_bpb=[2.0]), logged(2, [3.0], val_bpb=[2.2])]
    band = seed_band(runs, "val_bpb")
    assert (band.x.tolist(), band.low.tolist(), band.high.tolist()) == ([2.0], [2.0], [2.2])
    shared = seed_band([logged(1, [1.0, 2.0], a=[5.0, 4.0]), logged(2, [2.0, 3.0], a=[6.0, 5.0])], "a")
    assert (shared.x.tolist(), shared.mean.tolist()) == ([2.0], [5.0])
    assert len(seed_band([logged(1, [1.0], a=[1.0]), logged(2, [2.0], b=[1.0])], "a").x) == 0


def test_a_band_of_runs_that_were_validated_on_the_way_too_has_their_ends() -> None:
    runs = [logged(1, [1.0, 2.0, 3.0, 3.5], a=[5.0, 4.0, 3.0, 2.5]), logged(2, [1.0, 2.0, 2.5], a=[6.0, 5.0, 4.5])]
    band = seed_band(runs, "a")
    assert (band.x.tolist(), band.low.tolist(), band.high.tolist()) == (
        [1.0, 2.0, 3.0],
        [5.0, 4.0, 2.5],
        [6.0, 5.0, 4.5],
    )
    killed = seed_band([runs[0], logged(2, [1.0, 2.0], a=[6.0, 5.0])], "a")  # what went on alone is no mean
    assert killed.x.tolist() == [1.0, 2.0]


def test_the_spread_of_seeds_validated_at_their_end_is_seen() -> None:
    runs = tuple(logged(seed, [1.0], val_bpb=[bpb], val_bpb_average=[bpb]) for seed, bpb in ((1, 2.0), (2, 2.5)))
    plot = learning_curves(SimpleNamespace(label="a", seeds="2 runs", config=tiny(), runs=runs), "curves")  # type: ignore[arg-type]
    axes = plot.draw(WIDE).axes[0]
    bars = [line for lines in axes.collections if isinstance(lines, LineCollection) for line in lines.get_segments()]
    assert [bar.tolist() for bar in bars] == [[[1.0, 2.0], [1.0, 2.5]]] * 2
    low, high = axes.get_ylim()
    assert low <= 2.0 < 2.5 <= high


def test_configurations_validated_at_their_end_are_compared_by_their_training_loss() -> None:
    places = list(np.arange(1.0, 30.0))
    train = [4.0 - 0.1 * n for n in range(29)]
    at_the_end = SimpleNamespace(
        label="a", seeds="seed 1", config=tiny(), runs=[logged(1, places, train_bpb=train, val_bpb_average=[3.0])]
    )
    plot = compared_curves([at_the_end])
    assert {row[5] for row in plot.table.rows} == {"train_bpb"}
    assert "training batches" in plot.caption
    twice = logged(1, places, train_bpb=train, val_bpb_average=[3.0, 2.0])
    often = compared_curves([SimpleNamespace(label="a", seeds="seed 1", config=tiny(), runs=[twice])])
    assert {row[5] for row in often.table.rows} == {"val_bpb_average"}
    assert "validation text" in often.caption


def test_a_run_whose_packing_needs_shards_that_moved_is_measured_on_these(
    minimal_run: Path, embedded_shards: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(minimal_run, run)
    config, manifest = (json.loads((run / name).read_text()) for name in ("config.json", "manifest.json"))
    config["artifact"]["rounding"] = "gptq"
    manifest["data"]["path"] = str(tmp_path / "nowhere")
    (run / "config.json").write_text(json.dumps(config))
    (run / "manifest.json").write_text(json.dumps(manifest))
    assert measure(run, data=embedded_shards, score_bytes=500).scores["artifact"].num_bytes > 0


def test_codes_in_one_stream_are_a_part_of_their_own(
    minimal_config: RunConfig, embedded_shards: Path, tmp_path: Path
) -> None:
    packing = {"small_tensor_elements": 64, "codecs": ("rans", "zstd"), "clip": "standard_deviations"}
    run = train(replace(minimal_config, artifact=packing), embedded_shards, tmp_path / "run").run
    measured = measure(run, score_bytes=500)
    parts = artifact_parts(measured)
    assert sum(parts.values()) == measured.weights_bytes
    assert parts["codes of several matrices"] == measured.joint_bytes > 0
    export(run, tmp_path / "model.bjm", score=False)
    assert parts["header and checksum"] == read_container(tmp_path / "model.bjm").info.header_bytes
