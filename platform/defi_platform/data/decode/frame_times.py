"""Times of a video's frames, and whether they lie on an even grid."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import numpy as np

OFF_GRID = 0.25
"""Share of a frame's mean duration by which a frame may be off an even grid before the rate counts as variable."""

ROUNDING_S = 1e-3
"""Matroska, FLV and ASF round times to milliseconds."""

RESTART_S, RESTART_STEPS = 1.0, 16
"""A clock that goes back further than so many seconds and so many frames has been started anew."""


def frame_times(
    shown: Sequence[int | None], listed: Sequence[int], unit: Fraction, rate: Fraction | None
) -> np.ndarray:
    """Seconds of each frame from the first on, float64 (T,), never falling.

    Args:
        shown: display times of the frames in their order, in `unit`; None where the container gives none: between
            two that are known they are spread evenly, before and after them by `rate`.
        listed: times of the packets, in any order; they stand in where no frame has one and both are as many.
        unit: seconds per tick.
        rate: frames per second that the container states.
    """
    step = 1 / float(rate or 1)
    known = np.array([i for i, time in enumerate(shown) if time is not None], np.int64)
    if len(known):
        ticks = np.array([time for time in shown if time is not None], np.int64)
    elif len(listed) == len(shown):
        known, ticks = np.arange(len(shown)), np.asarray(listed, np.int64)
    else:
        return np.arange(len(shown)) * step
    if len(known) < len(shown):
        # A time that stands for many pictures is given to the last of those before it as well.
        own = np.append((np.diff(ticks) != 0) | (np.diff(known) > 1), True)
        known, ticks = known[own], ticks[own]
    ticks = _one_clock(ticks, known, round(RESTART_S / unit))
    at = (ticks - ticks[0]) * float(unit)
    numbers = np.arange(len(shown))
    seconds = np.interp(numbers, known, at)
    seconds -= step * np.maximum(0, known[0] - numbers)
    seconds += step * np.maximum(0, numbers - known[-1])
    return np.asarray(seconds - seconds[0])


def _one_clock(ticks: np.ndarray, known: np.ndarray, far: int) -> np.ndarray:
    """Times in order: recordings put one behind the other begin anew, other errors are of neighbours.

    Args:
        ticks: times of some frames.
        known: numbers of these frames.
        far: ticks by which a clock that is started anew goes back at least.
    """
    steps, frames = np.diff(ticks), np.diff(known)
    step = float(np.median(np.abs(steps) / frames)) if len(steps) else 0.0
    for start in (np.flatnonzero(steps < -max(far, RESTART_STEPS * step)) + 1).tolist():
        ticks[start:] += ticks[:start].max() + round(step * frames[start - 1]) - ticks[start]
    return np.sort(ticks)


def mean_rate(seconds: np.ndarray) -> float:
    """Frames per second over the whole video; 0.0 where it has no length."""
    return (len(seconds) - 1) / float(seconds[-1]) if len(seconds) and seconds[-1] > 0 else 0.0


def is_variable(seconds: np.ndarray) -> bool:
    """Returns whether any frame is off an even grid from the first to the last."""
    if len(seconds) < 3:
        return False
    step = seconds[-1] / (len(seconds) - 1)
    off = np.abs(seconds - step * np.arange(len(seconds)))
    return bool(off.max() > OFF_GRID * step + ROUNDING_S)
