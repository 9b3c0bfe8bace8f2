"""Chunks of actions as they are carried out: the newest alone, or all of them averaged (temporal ensembling).

Actions are numbered by how many were executed before them. A chunk begins at the number that its observation was
taken at, so that one which arrives late is entered where the robot is by then. K actions of a chunk; A numbers each.
"""

from __future__ import annotations

from typing import Any

import numpy as np


class Chunks:
    """The chunks that speak of the present action."""

    def __init__(self, ensemble: float | None = None) -> None:
        """Begins empty.

        Args:
            ensemble: m of the weights exp(-m i) of ACT (arXiv 2304.13705), i from the oldest chunk that speaks of an
                action; None: the newest chunk decides alone.

        Raises:
            ValueError: `ensemble` is negative or infinite.
        """
        if ensemble is not None and not 0 <= ensemble < np.inf:
            raise ValueError(f"ensemble is {ensemble}; it is 0 (a plain mean) or more, or None.")
        self._ensemble = ensemble
        self._chunks: list[tuple[int, np.ndarray[Any, Any]]] = []

    def add(self, start: int, actions: np.ndarray[Any, Any]) -> None:
        """Takes a chunk.

        Args:
            start: number of its first action.
            actions: (K, A).
        """
        if self._ensemble is None:
            self._chunks.clear()
        self._chunks.append((start, np.asarray(actions, np.float64)))

    def action(self, number: int) -> np.ndarray[Any, Any] | None:
        """The action (A,) of a number, or None where no chunk reaches so far."""
        self._chunks = [(start, actions) for start, actions in self._chunks if number < start + len(actions)]
        found = [actions[number - start] for start, actions in self._chunks]
        if not found:
            return None
        weights = np.exp(-(self._ensemble or 0.0) * np.arange(len(found)))
        mean: np.ndarray[Any, Any] = weights @ np.stack(found) / weights.sum()
        return mean

    @property
    def newest(self) -> int | None:
        """Number of the first action of the newest chunk; None without one."""
        return self._chunks[-1][0] if self._chunks else None

    def clear(self) -> None:
        """Drops everything."""
        self._chunks.clear()
