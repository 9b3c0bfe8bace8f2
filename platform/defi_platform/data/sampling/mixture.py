"""Mixture of corpora: the one of each sample k, spread evenly so that weights hold in every short window."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

PERIOD = 10_000
"""Length of the schedule that repeats: decimal percentages are exact, and a weight is off by 1/20,000 at most."""


@dataclass(frozen=True)
class Mixture:
    """A periodic schedule of streams.

    In any window of n samples a stream appears n * weight times, give or take the number of streams.
    """

    order: np.ndarray
    """int16 (P,): stream of each position of the period."""
    rank: np.ndarray
    """int32 (P,): how many earlier positions of the period are of the same stream."""
    counts: np.ndarray
    """int64 (streams,): positions of each stream in a period."""

    @classmethod
    def of(cls, weights: np.ndarray) -> Mixture:
        """Builds the schedule of positive weights (they need not sum to one)."""
        shares = np.asarray(weights, np.float64) / np.max(weights)
        shares /= shares.sum()
        if len(shares) == 1:
            return cls(np.zeros(1, np.int16), np.zeros(1, np.int32), np.ones(1, np.int64))
        counts = np.maximum(1, np.floor(shares * PERIOD)).astype(np.int64)
        while counts.sum() != PERIOD:  # hand out what rounding left, to whoever is furthest from its share
            lack = shares * PERIOD - counts
            counts[np.argmax(lack) if counts.sum() < PERIOD else np.argmin(lack)] += (
                1 if counts.sum() < PERIOD else -1
            )
        # The j-th of n positions of a stream is due at (j + 1/2) / n; sorting the due times spreads every stream.
        due = np.concatenate([(np.arange(n) + 0.5) / n for n in counts])
        stream = np.repeat(np.arange(len(counts)), counts)
        order = stream[np.lexsort((stream, due))]
        rank = np.empty(PERIOD, np.int32)
        for number, count in enumerate(counts):
            rank[order == number] = np.arange(count)
        return cls(order.astype(np.int16), rank, counts)

    def positions(self, ks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns (stream, how many samples of that stream come before) for each k, both int64."""
        period, position = np.divmod(np.asarray(ks, np.int64), len(self.order))
        stream = self.order[position].astype(np.int64)
        return stream, period * self.counts[stream] + self.rank[position]
