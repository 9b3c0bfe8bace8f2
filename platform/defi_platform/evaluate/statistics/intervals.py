"""Confidence intervals of success rates and quantiles of latencies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Rate:
    """A success rate with its confidence interval, all in [0, 1]."""

    successes: int
    episodes: int
    rate: float
    low: float
    high: float

    def as_mapping(self) -> dict[str, Any]:
        """The fields as plain values, as results files hold them."""
        return asdict(self)

    def __str__(self) -> str:
        if not self.episodes:
            return "no episode"
        return f"{100 * self.rate:.0f} % ({100 * self.low:.0f}-{100 * self.high:.0f})"


def wilson(successes: int, episodes: int, confidence: float = 0.95) -> Rate:
    """Wilson's score interval of a binomial proportion.

    It stays inside [0, 1] and keeps its width at 0 and at n successes, where the normal interval vanishes:
    the usual outcomes of a few episodes per task.

    Args:
        successes: 0 to `episodes`.
        episodes: 1 or more.
        confidence: level of the interval, in (0, 1).

    Raises:
        ValueError: there is no episode, or there are more successes than episodes.
    """
    if episodes < 1 or not 0 <= successes <= episodes:
        raise ValueError(f"{successes} successes of {episodes} episodes is no proportion")
    # Imported here: it takes a second, which a job that only serves or records need not wait for.
    from scipy.stats import binomtest

    interval = binomtest(successes, episodes).proportion_ci(confidence, method="wilson")
    return Rate(successes, episodes, successes / episodes, low=float(interval.low), high=float(interval.high))


def latency_quantiles(milliseconds: Sequence[float]) -> dict[str, Any]:
    """`count`, `p50` and `p95` of request latencies; the quantiles are None where there was no request."""
    if not milliseconds:
        return {"count": 0, "p50": None, "p95": None}
    p50, p95 = np.quantile(milliseconds, [0.5, 0.95])
    return {"count": len(milliseconds), "p50": float(p50), "p95": float(p95)}
