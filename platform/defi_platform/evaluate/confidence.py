"""How sure a success rate is."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from statistics import NormalDist
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
        return asdict(self)

    def __str__(self) -> str:
        return f"{100 * self.rate:.0f} % ({100 * self.low:.0f}-{100 * self.high:.0f})"


def wilson(successes: int, episodes: int, confidence: float = 0.95) -> Rate:
    """Wilson's score interval of a binomial proportion.

    It stays inside [0, 1] and keeps its width at 0 and at n successes, where the normal interval vanishes:
    the usual outcomes of a few episodes per task.
    Raises: ValueError for no episodes or more successes than episodes.
    Source: Wilson, E. B. (1927), Probable inference, the law of succession, and statistical inference.
    """
    if episodes < 1 or not 0 <= successes <= episodes:
        raise ValueError(f"{successes} successes of {episodes} episodes is no proportion")
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    p = successes / episodes
    centre = (p + z * z / (2 * episodes)) / (1 + z * z / episodes)
    margin = (
        z * math.sqrt(p * (1 - p) / episodes + z * z / (4 * episodes * episodes)) / (1 + z * z / episodes)
    )
    low = 0.0 if successes == 0 else centre - margin  # exactly, where rounding would leave 1e-17
    high = 1.0 if successes == episodes else centre + margin
    return Rate(successes, episodes, p, low, high)


def latency_quantiles(milliseconds: list[float]) -> dict[str, Any]:
    """count, p50 and p95 of request latencies; the quantiles are None where there was no request."""
    if not milliseconds:
        return {"count": 0, "p50": None, "p95": None}
    p50, p95 = np.quantile(milliseconds, [0.5, 0.95])
    return {"count": len(milliseconds), "p50": float(p50), "p95": float(p95)}
