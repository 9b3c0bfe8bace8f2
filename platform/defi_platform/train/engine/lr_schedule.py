"""Learning rate as a pure function of the step, so that resuming needs no scheduler state."""

from __future__ import annotations

import math

SCHEDULES = ("constant", "cosine", "tri_stage")


def learning_rate(schedule: str, peak: float, step: int, steps: int, warmup_steps: int = 0) -> float:
    """Rate of one update.

    `constant` and `cosine` rise linearly over `warmup_steps` first; cosine then falls to zero. `tri_stage` is
    the reference's policy schedule: 2 % of the steps rising from a hundredth of the peak, 8 % at the peak,
    90 % falling exponentially to a hundredth of it; `warmup_steps` is not used.

    Args:
        schedule: one of SCHEDULES.
        peak: the highest rate.
        step: number of the update, from 0.
        steps: updates of the whole run.
        warmup_steps: updates of the linear rise.

    Raises: ValueError for an unknown schedule.
    """
    if schedule == "tri_stage":
        rising, holding = max(1, round(0.02 * steps)), round(0.08 * steps)
        if step < rising:
            return peak * (0.01 + 0.99 * step / rising)
        if step < rising + holding:
            return peak
        falling = max(1, steps - rising - holding)
        decay: float = 0.01 ** (min(step - rising - holding, falling) / falling)
        return peak * decay
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if schedule == "constant":
        return peak
    if schedule == "cosine":
        progress = (step - warmup_steps) / max(1, steps - warmup_steps)
        return peak * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    raise ValueError(f"unknown schedule '{schedule}'; there is: {', '.join(SCHEDULES)}")
