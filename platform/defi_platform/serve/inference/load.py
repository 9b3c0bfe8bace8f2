"""The load of one replica in numbers: for the autoscaler, the live line of the job, and metrics."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

WINDOW_S = 10.0
"""Seconds that rates and percentiles look back."""
_MOST_SAMPLES = 4096
"""Answers that they look back, at most."""


@dataclass(frozen=True, kw_only=True)
class ServiceLoad:
    """One moment of a replica, as plain values that travel between processes (`dataclasses.asdict`)."""

    in_flight: int = 0
    """Observations that have come and are not answered, those of the running forward pass included."""
    queued: int = 0
    """Of these, those whose forward pass has not started."""
    oldest_wait_ms: float = 0.0
    """Milliseconds that the oldest queued observation has waited; 0 with an empty queue."""
    late_ms: float = 0.0
    """Milliseconds that the most urgent queued observation has waited for the device, beyond its slack; 0 while none runs."""
    largest_batch: int = 0
    """Observations of the largest forward pass that pays; 0: not known."""
    largest_batch_ms: float = 0.0
    """Predicted milliseconds of it."""
    each_ms: float = 0.0
    """Predicted milliseconds that each observation adds to a forward pass."""
    running_for_s: float = 0.0
    """Seconds that the running forward pass has taken so far; 0 when none runs."""
    answered: int = 0
    """Observations answered with actions since the start."""
    answers_per_s: float = 0.0
    """Of the last `WINDOW_S` seconds, like all that follow but the counts."""
    queue_ms: tuple[float, float] = (0.0, 0.0)
    """Median and 99th percentile of the wait for a forward pass."""
    infer_ms: tuple[float, float] = (0.0, 0.0)
    """The same of the forward passes that answers came from."""
    total_ms: tuple[float, float] = (0.0, 0.0)
    """The same from an observation's arrival at the service to its answer."""
    batch_size: float = 0.0
    """Mean observations per forward pass."""
    batch_sizes: dict[int, int] = field(default_factory=dict)
    """Answers by the number of observations in their forward pass, since the start."""
    refusals: dict[str, int] = field(default_factory=dict)
    """Refusals by reason, since the start."""


class LoadMeter:
    """Counts answers and refusals on the loop of the service; any thread may take a snapshot."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._started = clock()
        self._recent = np.full((_MOST_SAMPLES, 5), -np.inf)
        """A ring of the last answers: when, milliseconds in the queue, in the pass and together, observations in it.
        An array, since percentiles of a list would hold up the loop of the sockets for milliseconds."""
        self.answered = 0
        self.observer: Callable[[float, float, float, int], None] | None = None
        """Called with the arguments of each `answer`."""
        self.decode_observer: Callable[[float], None] | None = None
        """Called with the milliseconds that reading each observation took: its images decoded and resized."""
        self.batch_sizes: Counter[int] = Counter()
        self.refusals: Counter[str] = Counter()

    def answer(self, queue_ms: float, infer_ms: float, total_ms: float, batch_size: int) -> None:
        """Counts one answer.

        Args:
            queue_ms: its wait for the forward pass.
            infer_ms: of the forward pass.
            total_ms: from arrival to answer.
            batch_size: observations in the forward pass.
        """
        row = self.answered % _MOST_SAMPLES
        self._recent[row] = (self._clock(), queue_ms, infer_ms, total_ms, batch_size)
        self.answered += 1
        self.batch_sizes[batch_size] += 1
        if self.observer is not None:
            self.observer(queue_ms, infer_ms, total_ms, batch_size)

    def snapshot(
        self, *, in_flight: int, queued: int, oldest_wait_ms: float, running_for_s: float
    ) -> ServiceLoad:
        """The load now.

        Args:
            in_flight: see `ServiceLoad`.
            queued: see `ServiceLoad`.
            oldest_wait_ms: see `ServiceLoad`.
            running_for_s: see `ServiceLoad`.
        """
        now = self._clock()
        recent = self._recent[self._recent[:, 0] >= now - WINDOW_S]
        full = len(recent) == _MOST_SAMPLES
        span = now - (float(recent[:, 0].min()) if full else max(self._started, now - WINDOW_S))
        # Each answer of a batch of n is one of n samples of that forward pass.
        passes = float((1.0 / recent[:, 4]).sum())
        return ServiceLoad(
            in_flight=in_flight,
            queued=queued,
            oldest_wait_ms=oldest_wait_ms,
            running_for_s=running_for_s,
            answered=self.answered,
            answers_per_s=len(recent) / span if span > 0 else 0.0,
            queue_ms=_percentiles(recent[:, 1]),
            infer_ms=_percentiles(recent[:, 2]),
            total_ms=_percentiles(recent[:, 3]),
            batch_size=len(recent) / passes if passes else 0.0,
            batch_sizes=dict(self.batch_sizes),
            refusals=dict(self.refusals),
        )


def _percentiles(values: NDArray[np.float64]) -> tuple[float, float]:
    if not len(values):
        return 0.0, 0.0
    ordered = np.sort(values)
    return float(ordered[len(ordered) // 2]), float(ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))])
