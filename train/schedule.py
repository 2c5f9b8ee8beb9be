"""Learning rate and the weights of terms as functions of the step alone, so resuming needs no state."""

from __future__ import annotations

from tcsae.store.errors import ConfigError
from tcsae.train.config import ArmConfig


def check_schedule(arm: ArmConfig, steps: int) -> None:
    """Refuse a schedule that ``steps`` steps cannot complete.

    The run that this package grew out of ended after 48 steps of a 2,000-step warm-up, and nothing said so.

    >>> check_schedule(ArmConfig(name="tc16", warmup_steps=2000, decay_share=0.25), steps=48)
    Traceback (most recent call last):
        ...
    tcsae.store.errors.ConfigError: tc16: warm-up of 2000 and decay of 12 steps are longer than the run of \
48 steps; raise tokens or lower warmup_steps or decay_share
    """
    decay = _decay_steps(arm, steps)
    if arm.warmup_steps + decay > steps:
        raise ConfigError(
            f"{arm.name}: warm-up of {arm.warmup_steps} and decay of {decay} steps are longer than the run "
            f"of {steps} steps; raise tokens or lower warmup_steps or decay_share"
        )
    if arm.resample_every > steps // 2:
        raise ConfigError(
            f"{arm.name}: resample_every = {arm.resample_every}: features are not resampled in the last that many "
            f"steps of a run, and this one has {steps}; raise tokens or lower resample_every"
        )


def learning_rate(arm: ArmConfig, step: int, steps: int) -> float:
    """Rate of ``step`` (0-based): a linear rise, a plateau, a linear fall to 0 after the last step.

    >>> arm = ArmConfig(name="a", learning_rate=1.0, warmup_steps=2, decay_share=0.4)
    >>> [learning_rate(arm, step, 10) for step in range(10)]
    [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25]
    """
    rise = (step + 1) / arm.warmup_steps if arm.warmup_steps else 1.0
    decay = _decay_steps(arm, steps)
    fall = (steps - step) / decay if decay else 1.0
    return arm.learning_rate * min(1.0, rise, fall)


def contrast_weight(arm: ArmConfig, step: int, steps: int) -> float:
    """Alpha of ``step``: a linear rise over the ramp, then constant.

    >>> [contrast_weight(ArmConfig(name="a", alpha=0.1, ramp_share=0.5), step, 4) for step in range(4)]
    [0.05, 0.1, 0.1, 0.1]
    """
    return arm.alpha * _risen(arm.ramp_share, step, steps)


def sparsity_weight(arm: ArmConfig, step: int, steps: int) -> float:
    """Weight of the sparsity penalty at ``step``: a linear rise over its warm-up, then constant.

    >>> arm = ArmConfig(name="a", architecture="standard", sparsity_weight=0.04, sparsity_warmup_share=0.5)
    >>> [sparsity_weight(arm, step, 4) for step in range(4)]
    [0.02, 0.04, 0.04, 0.04]
    """
    return arm.sparsity_weight * _risen(arm.sparsity_warmup_share, step, steps)


def _risen(share: float, step: int, steps: int) -> float:
    """Share of its height that a linear rise over ``share`` of the run has reached after ``step``."""
    ramp = round(share * steps)
    return min(1.0, (step + 1) / ramp) if ramp else 1.0


def _decay_steps(arm: ArmConfig, steps: int) -> int:
    return round(arm.decay_share * steps)
