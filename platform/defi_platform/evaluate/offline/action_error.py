"""Errors of predicted actions by horizon step and dimension, with intervals over episodes.

An episode's steps resemble each other, so the interval is a bootstrap over whole episodes: what is drawn again and again,
with replacement, are episodes, and the 2.5th and 97.5th percentile of the mean error are its ends.

Shapes: N observations, H steps of the horizon, A dimensions of an action, E episodes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 2000
_SEED = 0
"""Of the bootstrap: the same episodes give the same interval."""


@dataclass(frozen=True)
class Predictions:
    """Actions of one episode: predicted, and those recorded at the same steps."""

    predicted: NDArray[np.float32]
    """(N, H, A)"""
    recorded: NDArray[np.float32]
    """(N, H, A); NaN past the end of the episode."""


@dataclass(frozen=True)
class Scale:
    """Mean and standard deviation of recorded actions, (A,) each."""

    mean: NDArray[np.float64]
    std: NDArray[np.float64]
    """0 where an entry never changes; such an entry has no normalised error."""


def scale_of(actions: Sequence[NDArray[np.floating]]) -> Scale:
    """The scale of some episodes' actions.

    Args:
        actions: (n, A) per episode.
    """
    every = np.concatenate(actions).astype(np.float64)
    return Scale(every.mean(axis=0), every.std(axis=0))


def mean_errors(episodes: Sequence[Predictions], scale: Scale) -> dict[str, Any]:
    """Mean absolute errors, raw and in standard deviations of the recorded actions.

    Args:
        episodes: of at least one observation each.
        scale: of the recorded actions.

    Returns:
        raw and normalised, each with by_horizon_and_dimension (H lists of A values), by_dimension, by_horizon and
        (normalised alone, since raw units differ between dimensions) overall: mappings of mean, low, high, and None
        where nothing was recorded or the entry never changes; observations and episodes as counts.
    """
    error = [np.abs(one.predicted - one.recorded).astype(np.float64) for one in episodes]
    sums = np.stack([np.nansum(one, axis=0) for one in error])  # (E, H, A)
    counts = np.stack([np.isfinite(one).sum(axis=0) for one in error]).astype(np.float64)
    draws = np.random.default_rng(_SEED).multinomial(
        len(episodes), np.full(len(episodes), 1 / len(episodes)), size=RESAMPLES
    )
    moves = scale.std > 0
    per_std = np.where(moves, 1 / np.where(moves, scale.std, 1.0), np.nan)
    raw = _Means(sums, counts, draws)
    normalised = _Means(sums * per_std, np.where(moves, counts, 0.0), draws)
    return {
        "raw": {
            "by_dimension": raw.over((1,)),
            "by_horizon_and_dimension": raw.over(()),
        },
        "normalised": {
            "overall": normalised.over((1, 2)),
            "by_horizon": normalised.over((2,)),
            "by_dimension": normalised.over((1,)),
            "by_horizon_and_dimension": normalised.over(()),
        },
        "episodes": len(episodes),
        "observations": sum(len(one.predicted) for one in episodes),
    }


class _Means:
    """Means of sums and counts (E, H, A), with intervals of the same draws (B, E) of episodes."""

    def __init__(
        self, sums: NDArray[np.float64], counts: NDArray[np.float64], draws: NDArray[np.int64]
    ) -> None:
        self._sums, self._counts, self._draws = np.nan_to_num(sums), counts, draws.astype(np.float64)

    def over(self, axes: tuple[int, ...]) -> Any:
        """Means over `axes` of (E, H, A), as nested lists of {mean, low, high} or None."""
        sums, counts = self._sums.sum(axis=axes), self._counts.sum(axis=axes)  # (E, ...)
        with np.errstate(invalid="ignore", divide="ignore"):
            means = sums.sum(axis=0) / counts.sum(axis=0)
            drawn = np.tensordot(self._draws, sums, 1) / np.tensordot(self._draws, counts, 1)
        # A draw may hold no episode that is long enough for the last steps of the horizon.
        drawn = np.where(np.isfinite(drawn), drawn, means)
        low, high = np.percentile(drawn, [2.5, 97.5], axis=0)
        return _as_lists(means, low, high)


def _as_lists(mean: Any, low: Any, high: Any) -> Any:
    if np.ndim(mean):
        return [_as_lists(*each) for each in zip(mean, low, high, strict=True)]
    if not np.isfinite(mean):
        return None
    return {"mean": float(mean), "low": float(low), "high": float(high)}
