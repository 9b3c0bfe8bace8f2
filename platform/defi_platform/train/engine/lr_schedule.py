"""Learning rate as a pure function of the step, so that resuming needs no scheduler state."""

from __future__ import annotations

import math
from typing import Final

SCHEDULES: Final = ("constant", "cosine", "as_written", "as_run")
RELEASED: Final = ("as_written", "as_run")
"""The released fine-tuning's two, which have no warm-up of the configuration's."""

_FIRST, _LAST = 0.1, 1e-6
"""Of `as_written`: the rate of its first and of its last step, in peaks."""


def learning_rate(schedule: str, peak: float, step: int, steps: int, warmup_steps: int = 0) -> float:
    """Rate of one update.

    `constant` and `cosine` rise linearly over `warmup_steps` first; cosine then falls to zero. The other two are of the
    policy's released fine-tuning and use no `warmup_steps`. `as_written` is the schedule of its code: 2 % of the steps
    rising linearly from a tenth of the peak, 8 % at the peak, then a cosine to a millionth of it. `as_run` is what its
    script does: it steps a scheduler whose optimiser trains nothing, so the rate that trains is the peak throughout.

    Args:
        schedule: one of SCHEDULES.
        peak: the highest rate.
        step: number of the update, from 0.
        steps: updates of the whole run.
        warmup_steps: updates of the linear rise.

    Raises: ValueError for an unknown schedule.
    """
    if schedule == "as_run":
        return peak
    if schedule == "as_written":
        rising, holding = max(1, round(0.02 * steps)), round(0.08 * steps)
        if step < rising:
            return peak * (_FIRST + (1 - _FIRST) * step / rising)
        if step < rising + holding:
            return peak
        progress = (step - rising - holding) / max(1, steps - rising - holding)
        return peak * (_LAST + (1 - _LAST) * _half_cosine(progress))
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if schedule == "constant":
        return peak
    if schedule == "cosine":
        return peak * _half_cosine((step - warmup_steps) / max(1, steps - warmup_steps))
    raise ValueError(f"unknown schedule '{schedule}'; there is: {', '.join(SCHEDULES)}")


def _half_cosine(progress: float) -> float:
    """From 1 at 0 to 0 at 1 and beyond."""
    return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
