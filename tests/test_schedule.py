"""Schedules: the reference's tables are in test_golden_model; here the project's own rules."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bytejepa.config import JepaConfig, OptimizerConfig, ScheduleConfig
from bytejepa.training.schedule import computes_latent_losses, jepa_lambda, learning_rate_scale, muon_momentum, progress


def test_progress_is_the_share_of_whatever_runs_out_first() -> None:
    schedule = ScheduleConfig(steps=100, max_bytes=1000, max_wallclock_s=10.0)
    assert progress(schedule, step=10, num_bytes=500, elapsed_s=2.0) == 0.5
    assert progress(schedule, step=10, num_bytes=0, elapsed_s=9.0) == 0.9
    assert progress(schedule, step=300, num_bytes=0, elapsed_s=0.0) == 1.0


@given(st.floats(0, 1), st.floats(0.01, 1))
def test_the_learning_rate_ends_at_zero_and_never_rises_in_the_warmdown(at: float, warmdown: float) -> None:
    schedule = ScheduleConfig(warmdown_fraction=warmdown)
    scale = learning_rate_scale(schedule, progress=at, step=0, elapsed_s=0.0)
    assert 0 <= scale <= 1
    assert scale == pytest.approx(min(1.0, (1 - at) / warmdown), abs=1e-12)
    assert learning_rate_scale(schedule, progress=1.0, step=0, elapsed_s=0.0) == 0


def test_halfway_down_the_learning_rate_is_halfway_to_where_it_ends() -> None:
    schedule = ScheduleConfig(warmdown_fraction=0.4, warmdown_to=0.2)
    scales = [learning_rate_scale(schedule, progress=at, step=0, elapsed_s=0.0) for at in (0.6, 0.7, 0.8, 1.0)]
    assert scales == pytest.approx([1.0, 0.8, 0.6, 0.2])


def test_warmup_rises_from_almost_nothing() -> None:
    schedule = ScheduleConfig(warmup_fraction=0.1)
    assert 0 < learning_rate_scale(schedule, progress=0.0, step=0, elapsed_s=0.0) < 0.01
    assert learning_rate_scale(schedule, progress=0.05, step=0, elapsed_s=0.0) == pytest.approx(0.5)


def test_the_reference_stops_at_a_sixth_of_its_rate_and_default_at_zero() -> None:
    reference = ScheduleConfig(steps=9000, max_wallclock_s=600.0, warmdown="mean_step_time")
    at_the_end = learning_rate_scale(reference, progress=1.0, step=9000, elapsed_s=9000 * 0.0631)
    assert at_the_end == pytest.approx(0.17, abs=0.01)  # spec section 7, item 4
    assert learning_rate_scale(ScheduleConfig(), progress=1.0, step=9000, elapsed_s=568.0) == 0


def test_lambda_shapes() -> None:
    pulse = JepaConfig(lambda_max=1.0, lambda_zero_until=0.3, lambda_ramp_until=0.8, lambda_after="zero")
    held = JepaConfig(lambda_max=1.0, lambda_zero_until=0.0, lambda_ramp_until=0.1, lambda_after="hold")
    assert [round(jepa_lambda(pulse, p), 6) for p in (0, 0.3, 0.55, 0.79, 0.8, 1)] == [0, 0, 0.5, 0.98, 0, 0]
    assert [jepa_lambda(held, p) for p in (0, 0.05, 0.1, 1)] == [0, 0.5, 1, 1]
    assert jepa_lambda(JepaConfig(losses=False, lambda_max=1.0), 0.5) == 0


def test_latent_losses_are_left_out_where_their_weight_stays_zero() -> None:
    pulse = JepaConfig(lambda_zero_until=0.3, lambda_ramp_until=0.8, lambda_after="zero")
    assert [computes_latent_losses(pulse, p) for p in (0, 0.29, 0.3, 0.79, 0.8, 1)] == [
        False, False, True, True, False, False,
    ]  # fmt: skip
    held = JepaConfig(lambda_zero_until=0.0, lambda_ramp_until=0.1, lambda_after="hold")
    assert all(computes_latent_losses(held, p) for p in (0, 0.1, 1))
    assert not computes_latent_losses(JepaConfig(losses=False), 0.5)
    assert not computes_latent_losses(JepaConfig(lambda_max=0.0), 0.5)


def test_momentum_without_warmup_is_constant() -> None:
    assert muon_momentum(OptimizerConfig(muon_momentum_warmup_steps=0), 0) == 0.99
    assert math.isclose(muon_momentum(OptimizerConfig(), 750), 0.955)
