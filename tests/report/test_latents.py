"""JEPA in the report: the plot shows every value that was logged, and gradients are of the losses at their largest weight."""

from pathlib import Path
from typing import Literal

import pytest

from bytejepa.config_model import JepaConfig
from bytejepa.presets import preset
from bytejepa.report.drawing import NARROW, WIDE
from bytejepa.report.inputs import Configuration, LoggedRun
from bytejepa.report.learning_plots import latents
from bytejepa.report.measure import largest_jepa_lambda


def configuration(name: str, explained: list[float]) -> Configuration:
    metrics = [
        {"step": float(step), "num_bytes": 1e6 * step, "jepa_explained_variance": value, "jepa_latent_std": 1.0}
        for step, value in enumerate(explained, start=1)
    ]
    run = LoggedRun(path=Path(name), config=preset("tiny"), manifest={}, metrics=metrics, step_starts_s=[])
    return Configuration(label=name, runs=(run,))


@pytest.mark.parametrize("layout", [WIDE, NARROW])
@pytest.mark.parametrize("explained", [[-101.0, -40.0, -1.2], [-60.0, -3.0, 0.4], [-0.5, 0.1, 0.7], [-12.0], [0.3]])
def test_every_value_lies_within_the_frame(layout, explained: list[float]) -> None:
    plot = latents([configuration("a", explained), configuration("b", [0.2, 0.5])])
    assert plot is not None
    panel = plot.draw(layout).axes[0]
    low, high = panel.get_ylim()
    for line in panel.get_lines():
        assert all(low <= value <= high for value in line.get_ydata())
        if len(line.get_ydata()) == 1:
            assert line.get_marker() not in (None, "None", "")
    assert high >= 1, "the largest possible value shows how far there is to go"


@pytest.mark.parametrize(
    ("ramp", "after", "expected"),
    [((0.3, 0.8), "zero", 0.01), ((0.5, 0.501), "zero", 0.01), ((0.2, 0.2), "hold", 0.01),
     ((0.0, 1.0), "hold", 0.01)],
)  # fmt: skip
def test_the_largest_weight_of_latent_losses_is_found_however_short_their_ramp(
    ramp: tuple[float, float], after: Literal["zero", "hold"], expected: float
) -> None:
    jepa = JepaConfig(lambda_max=0.01, lambda_zero_until=ramp[0], lambda_ramp_until=ramp[1], lambda_after=after)
    assert largest_jepa_lambda(jepa) == pytest.approx(expected)
