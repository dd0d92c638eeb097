"""The averages of the weights: exponential, with equal weights, and what a run too short for the latter exports."""

import pytest
import torch
from torch import Tensor, nn

from bytejepa.config import TrainingConfig
from bytejepa.training.averaging import WeightAverage, averaged_weights


@pytest.fixture
def model() -> nn.Linear:
    return nn.Linear(3, 2, bias=False)


def after_ten_steps(model: nn.Linear, average: WeightAverage) -> list[Tensor]:
    """The weights after each step, of which `average` has been told."""
    passed = []
    for step in range(1, 11):
        with torch.no_grad():
            model.weight += step
        average.update(step=step, progress=step / 10)
        passed.append(model.weight.detach().clone())
    return passed


def exponential(start: Tensor, passed: list[Tensor], decay: float) -> Tensor:
    for weight in passed:
        start = decay * start + (1 - decay) * weight
    return start


def test_ema_is_what_it_says(model: nn.Linear) -> None:
    average = WeightAverage(model, TrainingConfig(ema_decay=0.9, ema_warmup=False))
    start = model.weight.detach().clone()
    torch.testing.assert_close(average.average[0], exponential(start, after_ten_steps(model, average), 0.9))


def test_swa_is_what_it_says(model: nn.Linear) -> None:
    average = WeightAverage(model, TrainingConfig(ema_decay=0.9, ema_warmup=False, swa_start=0.5, swa_every_steps=2))
    passed = after_ten_steps(model, average)
    torch.testing.assert_close(average.average[0], torch.stack([passed[5], passed[7], passed[9]]).mean(0))


def test_a_run_too_short_for_a_sample_of_swa_keeps_its_ema(model: nn.Linear) -> None:
    average = WeightAverage(model, TrainingConfig(ema_decay=0.9, ema_warmup=False, swa_start=0.5, swa_every_steps=50))
    start = model.weight.detach().clone()
    torch.testing.assert_close(average.average[0], exponential(start, after_ten_steps(model, average), 0.9))


def test_averaged_weights_are_lent_and_given_back(model: nn.Linear) -> None:
    average = WeightAverage(model, TrainingConfig(ema_decay=0.9))
    after_ten_steps(model, average)
    before = model.weight.detach().clone()
    with averaged_weights(model, average.average):
        torch.testing.assert_close(model.weight.detach(), average.average[0])
    assert torch.equal(model.weight, before)
