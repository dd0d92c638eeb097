"""`bench --scaling`: every axis is there, ranks are real processes, and the plot is drawn."""

from pathlib import Path
from typing import Any

import pytest
import torch

from bytejepa.benchmark import scaling
from bytejepa.benchmark.speed import flop_per_byte
from bytejepa.config import RunConfig, replace

CPU = torch.device("cpu")


@pytest.mark.integration
def test_every_axis_is_measured_and_drawn(
    minimal_config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scaling, "FACTORS", (1, 2))
    monkeypatch.setattr(scaling, "rank_counts", lambda *_: [2])
    rows = scaling.bench_scaling(minimal_config, CPU, steps=1, compile=False)
    assert [(row["axis"], row["value"]) for row in rows] == [
        ("context", 64), ("batch", 256), ("width", 32), ("context", 128), ("batch", 512), ("width", 64), ("ranks", 2),
    ]  # fmt: skip
    assert all(row["step_ms"] > 0 and row["last_loss_nats"] > 0 for row in rows)
    one = flop_per_byte(minimal_config) * 256 / 1e9
    assert [row["gflop_per_step"] for row in rows if row["axis"] in ("batch", "ranks")] == pytest.approx(
        [one, 2 * one, one]
    )
    scaling.plot_scaling(rows, tmp_path / "scaling.png")
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("sections", "left_out"),
    [
        ({"data": {"micro_batch_bytes": 64}, "jepa": {"sigreg_group_sequences": None}}, {("context", 128)}),
        ({"data": {"order": "sequential", "num_streams": 4}}, {("context", 128), ("batch", 64), ("batch", 128)}),
        ({"model": {"attention_gate_dims": 32}}, {("width", 8), ("width", 16)}),
        ({"jepa": {"horizons": 7}}, {("context", 16), ("context", 32)}),
    ],
)
def test_points_that_the_settings_do_not_allow_are_left_out(
    sections: dict[str, Any], left_out: set[tuple[str, int]], minimal_config: RunConfig
) -> None:
    points = {(axis, value) for axis, value, _ in scaling._points(minimal_config)}
    assert left_out <= points
    possible = {(axis, value) for axis, value, _ in scaling._points(replace(minimal_config, **sections))}
    assert possible == points - left_out


def test_ranks_divide_the_batch_and_have_a_core_each(
    minimal_config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(6)))
    assert scaling.rank_counts(minimal_config, CPU) == [1, 2, 4]
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1, 2})
    assert scaling.rank_counts(minimal_config, CPU) == [1, 2]
