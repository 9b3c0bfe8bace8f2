"""Retry of requests that may fail for a while: a policy decides, one loop carries it out."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar

Result = TypeVar("Result")


class Clock(Protocol):
    """Time as retries see it; the module `time` is one."""

    def monotonic(self) -> float:
        """Seconds since some moment."""
        ...

    def sleep(self, seconds: float, /) -> None:
        """Returns after so many seconds."""
        ...


@dataclass(frozen=True, kw_only=True)
class RetryPolicy:
    """Pauses between tries, doubling up to a longest one, until time or attempts run out."""

    timeout_s: float = math.inf
    """Since the first try began; an error that comes later is final."""
    max_attempts: float = math.inf
    first_pause_s: float = 0.2
    max_pause_s: float = 5.0
    jitter: bool = False
    """Scales each pause by a random factor of 0.5 to 1.5, so that many processes do not ask at the same moment."""

    def pause_s(self, failures: int, elapsed_s: float) -> float | None:
        """Seconds until the next try.

        Args:
            failures: tries that have failed, at least one.
            elapsed_s: seconds since the first try began.

        Returns: None when there is to be no other try.
        """
        if failures >= self.max_attempts or elapsed_s >= self.timeout_s:
            return None
        # The exponent is bounded because a float overflows at 2^1024.
        pause = min(self.max_pause_s, self.first_pause_s * 2.0 ** min(failures - 1, 64))
        return pause * (0.5 + random.random()) if self.jitter else pause


def retry(
    request: Callable[[], Result],
    policy: RetryPolicy,
    *,
    is_transient: Callable[[Exception], bool],
    before_retry: Callable[[Exception], None] | None = None,
    clock: Clock = time,
) -> Result:
    """Makes a request until it succeeds, its error is not transient, or the policy ends it.

    Args:
        request: the request.
        policy: how often and how long.
        is_transient: true for errors that may pass.
        before_retry: called with each error that another try follows, before its pause.
        clock: measures and waits; tests give one without wall time.

    Returns: the request's result.
    Raises: the request's last error.
    """
    began, failures = clock.monotonic(), 0
    while True:
        try:
            return request()
        except Exception as error:
            failures += 1
            pause = policy.pause_s(failures, clock.monotonic() - began)
            if pause is None or not is_transient(error):
                raise
            if before_retry:
                before_retry(error)
        clock.sleep(pause)
