"""What changes over a run, as pure functions of progress, step and elapsed time (spec sections 3 and 4).

Time comes from outside (see `clock`), so a run under a wallclock cap can be repeated and resumed bit for bit.
"""

from __future__ import annotations

from bytejepa.config import OptimizerConfig, ScheduleConfig
from bytejepa.config_model import JepaConfig


def progress(schedule: ScheduleConfig, *, step: int, num_bytes: int, elapsed_s: float) -> float:
    """Return how much of the run is over, 0 to 1: the largest share used up of steps, bytes and wallclock."""
    shares = [0.0]
    if schedule.steps is not None:
        shares.append(step / schedule.steps)
    if schedule.max_bytes is not None:
        shares.append(num_bytes / schedule.max_bytes)
    if schedule.max_wallclock_s is not None:
        shares.append(elapsed_s / schedule.max_wallclock_s)
    return min(1.0, max(shares))


def learning_rate_scale(schedule: ScheduleConfig, *, progress: float, step: int, elapsed_s: float) -> float:
    """Return the factor on every learning rate for the step that begins now.

    `progress`: rises over warmup_fraction, is 1, and falls linearly over warmdown_fraction to warmdown_to at progress 1.
    `mean_step_time`: the reference's rule, see `mean_step_time_scale`.
    """
    if schedule.warmdown == "mean_step_time":
        return mean_step_time_scale(schedule, step=step, elapsed_s=elapsed_s)
    scale = 1.0
    if schedule.warmup_fraction and progress < schedule.warmup_fraction:
        # never zero: a step without an effect would still be counted
        scale = max(progress / schedule.warmup_fraction, 1e-3)
    if schedule.warmdown_fraction and progress > 1 - schedule.warmdown_fraction:
        share = (1 - progress) / schedule.warmdown_fraction
        scale = min(scale, schedule.warmdown_to + (1 - schedule.warmdown_to) * share)
    return scale


def mean_step_time_scale(schedule: ScheduleConfig, *, step: int, elapsed_s: float) -> float:
    """Return the reference's factor: 1 until the remaining wallclock is less than `warmdown_steps` mean step times, then
    linear in the remaining wallclock; without a wallclock cap, linear over the last `warmdown_steps` steps (spec section 4)."""
    assert schedule.steps is not None
    if schedule.max_wallclock_s is None:
        return min(1.0, max(0.0, (schedule.steps - step) / schedule.warmdown_steps))
    warmdown_s = schedule.warmdown_steps * elapsed_s / max(step, 1)
    remaining_s = max(schedule.max_wallclock_s - elapsed_s, 0.0)
    return remaining_s / max(warmdown_s, 1e-12) if remaining_s <= warmdown_s else 1.0


def muon_momentum(optimizer: OptimizerConfig, step: int) -> float:
    """Return Muon's momentum at `step`: linear from its start over the warm-up steps, then constant."""
    share = min(1.0, step / optimizer.muon_momentum_warmup_steps) if optimizer.muon_momentum_warmup_steps else 1.0
    return (1 - share) * optimizer.muon_momentum_start + share * optimizer.muon_momentum


def jepa_lambda(jepa: JepaConfig, progress: float) -> float:
    """Return the weight of the latent losses: zero, then a linear ramp to lambda_max, then zero or held (spec section 3)."""
    if not (jepa.enabled and jepa.losses):
        return 0.0
    if progress >= jepa.lambda_ramp_until:
        return jepa.lambda_max if jepa.lambda_after == "hold" else 0.0
    if progress < jepa.lambda_zero_until:
        return 0.0
    share = (progress - jepa.lambda_zero_until) / (jepa.lambda_ramp_until - jepa.lambda_zero_until)
    return jepa.lambda_max * share


def computes_latent_losses(jepa: JepaConfig, progress: float) -> bool:
    """Return whether the latent losses are computed: where their weight stays zero they are left out. The first step of
    a ramp has a weight of zero too, but is not worth a compiled graph of its own."""
    ended = progress >= jepa.lambda_ramp_until and jepa.lambda_after == "zero"
    return jepa.enabled and jepa.losses and jepa.lambda_max > 0 and not ended and progress >= jepa.lambda_zero_until
