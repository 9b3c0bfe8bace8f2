"""A fixed rate: the begin of each control step, and how far off it was."""

from __future__ import annotations

import time
from typing import Any, Protocol

import numpy as np


class Clock(Protocol):
    """Time as the control loop sees it; the module `time` is one."""

    def monotonic(self) -> float:
        """Seconds since some moment."""
        ...

    def sleep(self, seconds: float) -> None:
        """Returns after so many seconds."""
        ...


class Pacer:
    """Waits for the next control step.

    A step that took too long delays those after it: two actions in one period would double the robot's speed.
    """

    def __init__(self, rate_hz: float, clock: Clock = time) -> None:
        """Begins with the first `wait`.

        Args:
            rate_hz: control steps per second.
            clock: measures and waits.

        Raises:
            ValueError: the rate is not positive.
        """
        if not rate_hz > 0:
            raise ValueError(f"rate_hz is {rate_hz}; it must be more than 0.")
        self.period_s = 1.0 / rate_hz
        self._clock = clock
        self._next: float | None = None
        self._late_s: list[float] = []
        self.overruns = 0
        """Steps whose work took longer than a period."""

    def wait(self) -> None:
        """Returns when the next step begins."""
        now = self._clock.monotonic()
        due = now if self._next is None else self._next
        if now < due:
            self._clock.sleep(due - now)
        begun = self._clock.monotonic()
        self._late_s.append(max(0.0, begun - due))
        self.overruns += now > due
        self._next = (now if now > due else due) + self.period_s

    def jitter_ms(self) -> dict[str, float]:
        """Delays of the steps: p50, p95, p99 and max in milliseconds; {} before the first."""
        if not self._late_s:
            return {}
        late: np.ndarray[Any, Any] = 1e3 * np.asarray(self._late_s)
        found = {f"p{q}": float(np.percentile(late, q)) for q in (50, 95, 99)}
        return {**found, "max": float(late.max())}
