"""Ridge regression that is fitted and scored by episodes: R2 per dimension, with bootstrap intervals.

Rows of one episode resemble each other. So the penalty is chosen on episodes of their own, and an interval comes from
drawing whole held-out episodes again, with replacement. It says how much the result depends on which episodes were held
out; it does not say how much another training would change it. N rows, F features, D target dimensions, E episodes,
R resamples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

STRENGTHS = tuple(10.0**power for power in range(-2, 6))
"""Ridge penalties; the best on a fifth of the training episodes is taken."""
RESAMPLES = 1000
FEWEST_EPISODES = 5
"""Held-out episodes from which on an interval is given: fewer say nothing about their spread."""
_STILL = 1e-6
_ROUNDING = 1e-5
"""Deviation of a feature, as a share of its largest value, that float32 alone may make."""


@dataclass(frozen=True)
class Rows:
    """Features with their targets, and the episode of each row."""

    features: Tensor
    """(N, F)."""
    targets: Tensor
    """(N, D)."""
    episodes: np.ndarray
    """int (N,); equal for rows of one episode."""


class Score:
    """R2 on held-out rows: 1 - residual over total sum of squares, in units of the training targets' deviation.

    0 is as good as always answering the mean of the held-out rows, below 0 is worse.

    Args:
        errors: (N, D) prediction minus target, in these units.
        targets: (N, D) in these units.
        varying: bool (D,), the dimensions that vary in training; the others are not scored.
        episodes: int (N,).
    """

    def __init__(self, errors: Tensor, targets: Tensor, varying: Tensor, episodes: np.ndarray) -> None:
        _, place = np.unique(episodes, return_inverse=True)
        self.episodes = int(place.max()) + 1 if len(place) else 0
        self._varying = varying.numpy()
        of_episode = np.zeros((self.episodes, len(place)))
        of_episode[place, np.arange(len(place))] = 1.0
        y = targets.numpy()
        self._count = of_episode.sum(axis=1)
        self._sums, self._squares = of_episode @ y, of_episode @ np.square(y)
        self._residual = of_episode @ np.square(errors.numpy())

    def r2(self, draws: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """R2 of resamples.

        Args:
            draws: (R, E) how often each episode is in each resample; ones for the held-out rows themselves.

        Returns: over all dimensions together (R,), and by dimension (R, D). NaN where nothing varies.
        """
        count = (draws @ self._count)[:, None]
        total = draws @ self._squares - np.square(draws @ self._sums) / count
        residual = draws @ self._residual
        total, residual = np.where(self._varying, total, 0.0), np.where(self._varying, residual, 0.0)
        moves = total > _STILL * count
        by_dimension = np.where(moves, 1 - residual / np.where(moves, total, 1.0), np.nan)
        whole = total.sum(axis=1)
        together = np.where(whole > 0, 1 - residual.sum(axis=1) / np.where(whole > 0, whole, 1.0), np.nan)
        return together, by_dimension

    def r2_of_all(self) -> float | None:
        """R2 over all dimensions together; None where nothing varies."""
        together = float(self.r2(np.ones((1, self.episodes)))[0][0])
        return together if math.isfinite(together) else None

    def draws(self, seed: int) -> np.ndarray:
        """Number of times that each episode is in each of `RESAMPLES` resamples, (R, E); the same for equal `seed` and E."""
        random = np.random.default_rng(seed)
        return random.multinomial(self.episodes, np.full(self.episodes, 1 / self.episodes), RESAMPLES).astype(
            np.float64
        )

    def as_mapping(self, names: Sequence[str], seed: int) -> dict[str, Any]:
        """The score for a report.

        Args:
            names: one per dimension.
            seed: of the resamples.

        Returns: `r2` and `interval` over all dimensions, and the same by dimension in `dimensions`; None where a
            dimension does not vary, or where there are fewer than `FEWEST_EPISODES`.
        """
        together, by_dimension = self.r2(np.ones((1, self.episodes)))
        spread, spread_by_dimension = self.r2(self.draws(seed))
        return {
            **self._entry(together[0], spread),
            "dimensions": {
                name: self._entry(by_dimension[0, place], spread_by_dimension[:, place])
                for place, name in enumerate(names)
            },
        }

    def above(self, other: Score, seed: int) -> dict[str, Any]:
        """R2 of this score minus that of another one on the same rows, from the same resamples of both.

        Args:
            other: of the same held-out rows.
            seed: of the resamples.

        Returns: `difference` and its `interval`.
        """
        own, others = (score.r2(np.ones((1, self.episodes)))[0][0] for score in (self, other))
        draws = self.draws(seed)
        entry = self._entry(own - others, self.r2(draws)[0] - other.r2(draws)[0])
        return {"difference": entry["r2"], "interval": entry["interval"]}

    def _entry(self, value: float, spread: np.ndarray) -> dict[str, Any]:
        if not math.isfinite(value):
            return {"r2": None, "interval": None}
        known = spread[np.isfinite(spread)]
        given = self.episodes >= FEWEST_EPISODES and len(known)
        interval = [float(bound) for bound in np.percentile(known, [2.5, 97.5])] if given else None
        return {"r2": float(value), "interval": interval}


class Ridge:
    """A ridge regression from features to targets, both standardised by the training rows.

    Args:
        rows: to fit it on. Where they are of one episode, the penalty is chosen on a fifth of its rows.
    """

    def __init__(self, rows: Rows) -> None:
        x, y = rows.features.double(), rows.targets.double()
        self._centre, spread = x.mean(dim=0), _deviation(x)
        # A feature that only rounding moves in training says nothing; blown up, it would rule where it does move.
        self._spread = torch.where(spread > _ROUNDING * x.abs().amax(dim=0), spread, torch.inf)
        self._mean, deviation = y.mean(dim=0), _deviation(y)
        self._varying = deviation > _STILL
        self._deviation = torch.where(self._varying, deviation, 1.0)
        x, y = self._standard(rows.features), self._wanted(rows.targets)
        aside = torch.from_numpy(_fifth(rows.episodes))
        kept = ~aside
        self.strength = STRENGTHS[0]
        if kept.any():
            errors = [(_fit(x[kept], y[kept], one), one) for one in STRENGTHS]
            self.strength = min(
                errors, key=lambda tried: float((x[aside] @ tried[0] - y[aside]).square().sum())
            )[1]
        self._weights = _fit(x, y, self.strength)

    def score(self, rows: Rows) -> Score:
        """Score of its predictions for other rows."""
        y = self._wanted(rows.targets)
        return Score(self._standard(rows.features) @ self._weights - y, y, self._varying, rows.episodes)

    def _standard(self, features: Tensor) -> Tensor:
        return (features.double() - self._centre) / self._spread

    def _wanted(self, targets: Tensor) -> Tensor:
        return (targets.double() - self._mean) / self._deviation


def _deviation(values: Tensor) -> Tensor:
    return values.std(dim=0, unbiased=False)


def _fifth(episodes: np.ndarray) -> np.ndarray:
    """Rows of a fifth of the episodes, at least one; of a single episode, of its rows; bool (N,)."""
    names = np.unique(episodes)
    if len(names) > 1:
        return np.isin(episodes, names[:: max(2, min(5, len(names)))])
    return np.arange(len(episodes)) < len(episodes) // 5


def _fit(x: Tensor, y: Tensor, strength: float) -> Tensor:
    """(F, D): the minimum of |y - x w|^2 + strength |w|^2, in closed form."""
    weights: Tensor = torch.linalg.solve(x.T @ x + strength * torch.eye(x.shape[1], dtype=x.dtype), x.T @ y)
    return weights
