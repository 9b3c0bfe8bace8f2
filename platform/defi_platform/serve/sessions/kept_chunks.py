"""The chunks of one session whose actions have not all been carried out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray


class KeptChunks:
    """Actions by step of an episode: of the newest chunk, or averaged over all chunks that speak of the step."""

    def __init__(self, open_loop: int, ensemble: float | None) -> None:
        """Starts without a chunk.

        Args:
            open_loop: actions of a chunk that are given out before a new one is needed, at least 1.
            ensemble: how much faster newer chunks lose weight; None: only the newest counts.
        """
        self._open_loop = open_loop
        self._ensemble = ensemble
        self._chunks: list[tuple[int, NDArray[np.float32]]] = []
        self._step = 0

    def clear(self) -> None:
        """Forgets every chunk: the next action needs a new one."""
        self._chunks = []
        self._step = 0

    @property
    def open_loop_step(self) -> int:
        """Actions given out of the newest chunk."""
        return self._step - self._chunks[-1][0] if self._chunks else 0

    def add(self, chunk: NDArray[np.float32]) -> None:
        """Keeps a chunk, which begins at the present step.

        Args:
            chunk: (chunk, A) float32.
        """
        older = self._chunks if self._ensemble is not None else []
        kept = [(start, actions) for start, actions in older if start + len(actions) > self._step]
        self._chunks = [*kept, (self._step, chunk)]

    def next(self) -> NDArray[np.float32] | None:
        """The action of the present step, (A,) float32; the step after it comes next. None: a new chunk is needed."""
        if not self._chunks:
            return None
        start, newest = self._chunks[-1]
        if self._step - start >= min(self._open_loop, len(newest)):
            return None
        said: list[NDArray[np.float32]] = [
            actions[self._step - begun]
            for begun, actions in self._chunks
            if 0 <= self._step - begun < len(actions)
        ]
        self._step += 1
        if self._ensemble is None or len(said) == 1:
            return said[-1]
        weights = np.exp(-self._ensemble * np.arange(len(said)))
        mean: NDArray[np.float32] = (weights @ np.stack(said) / weights.sum()).astype(np.float32)
        return mean

    def state(self) -> dict[str, Any]:
        """Everything a successor needs to go on, as plain values."""
        return {
            "step": self._step,
            "chunks": [[start, list(chunk.shape), chunk.tobytes()] for start, chunk in self._chunks],
        }

    def resume(self, state: dict[str, Any]) -> None:
        """Goes on where another process stopped.

        Args:
            state: of `state()`.
        """
        chunks: Sequence[tuple[int, Sequence[int], bytes]] = state["chunks"]
        self._step = state["step"]
        self._chunks = [
            (start, np.frombuffer(data, np.float32).reshape(tuple(shape))) for start, shape, data in chunks
        ]
