"""Tests and intervals for two policies that met the same initial states."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from defi_platform.evaluate.statistics.intervals import wilson


@dataclass(frozen=True)
class PairedCounts:
    """Outcomes of episodes that both policies ran from the same initial state."""

    both: int
    only_first: int
    only_second: int
    neither: int

    @property
    def pairs(self) -> int:
        """Number of pairs."""
        return self.both + self.only_first + self.only_second + self.neither

    @property
    def discordant(self) -> int:
        """Pairs that one policy solved and the other did not: all that a paired test learns from."""
        return self.only_first + self.only_second

    @property
    def difference(self) -> float:
        """Rate of the second minus that of the first, in [-1, 1]."""
        return (self.only_second - self.only_first) / self.pairs


def count_pairs(first: Sequence[bool], second: Sequence[bool]) -> PairedCounts:
    """Counts the outcomes of pairs; entry i of both is of the same initial state."""
    pairs = list(zip(first, second, strict=True))
    return PairedCounts(
        both=sum(a and b for a, b in pairs),
        only_first=sum(a and not b for a, b in pairs),
        only_second=sum(b and not a for a, b in pairs),
        neither=sum(not a and not b for a, b in pairs),
    )


def mcnemar(counts: PairedCounts) -> float:
    """Two-sided p value of McNemar's exact test: that both policies solve as much.

    A binomial test of the discordant pairs; 1 where there are none.
    """
    if not counts.discordant:
        return 1.0
    from scipy.stats import binomtest

    return float(binomtest(counts.only_first, counts.discordant, 0.5).pvalue)


def mcnemar_of_tasks(tasks: Sequence[PairedCounts], draws: int = 99_999) -> float:
    """Two-sided p value of the test that the mean over tasks of the rates' differences is zero.

    As McNemar's test it tosses a coin for each discordant pair, but a pair weighs 1 / (pairs of its task), as it does in that mean;
    with as many pairs in every task it is McNemar's exact test. Over all tosses where those are few, else over draws with one seed.

    Args:
        tasks: counts of each task, at least one pair in each.
        draws: number of them.
    """
    discordant: dict[int, int] = {}
    for one in tasks:
        discordant[one.pairs] = discordant.get(one.pairs, 0) + one.discordant
    tossed = {pairs: count for pairs, count in discordant.items() if count}
    if len(tossed) <= 1:
        return mcnemar(
            PairedCounts(0, sum(t.only_first for t in tasks), sum(t.only_second for t in tasks), 0)
        )
    from scipy.stats import binom

    observed = abs(sum(one.difference for one in tasks)) - 1e-9  # as extreme, in spite of rounding
    if math.prod(count + 1 for count in tossed.values()) > 1_000_000:
        rng, total = np.random.default_rng(0), np.zeros(draws)
        for pairs, count in tossed.items():
            total += (2 * rng.binomial(count, 0.5, draws) - count) / pairs
        return float((1 + np.sum(np.abs(total) >= observed)) / (1 + draws))
    sums, chances = np.zeros(1), np.ones(1)
    for pairs, count in tossed.items():
        heads = np.arange(count + 1)
        sums = np.add.outer(sums, (2 * heads - count) / pairs).ravel()
        chances = np.multiply.outer(chances, binom.pmf(heads, count, 0.5)).ravel()
    return min(1.0, float(chances[np.abs(sums) >= observed].sum()))


def difference_interval(counts: PairedCounts, confidence: float = 0.95) -> tuple[float, float]:
    """Interval of the difference of two rates over the same pairs (second minus first).

    Made from the Wilson intervals of both rates and their correlation, so that it has a width where no pair is
    discordant, too.

    Args:
        counts: of at least one pair.
        confidence: level, in (0, 1).

    Source: Newcombe, Statistics in Medicine 17 (1998), 2635, method 10.
    """
    n = counts.pairs
    second = wilson(counts.both + counts.only_second, n, confidence)
    first = wilson(counts.both + counts.only_first, n, confidence)
    phi = _correlation(counts)
    down_second, up_second = second.rate - second.low, second.high - second.rate
    down_first, up_first = first.rate - first.low, first.high - first.rate
    below = down_second**2 - 2 * phi * down_second * up_first + up_first**2
    above = up_second**2 - 2 * phi * up_second * down_first + down_first**2
    return (
        counts.difference - math.sqrt(max(0.0, below)),
        counts.difference + math.sqrt(max(0.0, above)),
    )


def _correlation(counts: PairedCounts) -> float:
    a, b, c, d = counts.both, counts.only_first, counts.only_second, counts.neither
    margins = (a + b) * (c + d) * (a + c) * (b + d)
    if margins == 0:
        return 0.0
    product = float(a * d - b * c)
    if product > 0:  # the paper's correction for continuity, for a positive correlation alone
        product = max(product - counts.pairs / 2, 0.0)
    return product / math.sqrt(margins)


@dataclass(frozen=True)
class MeanDifference:
    """A mean of paired differences (second minus first) with its bootstrap interval and p value."""

    pairs: int
    mean: float
    low: float | None
    high: float | None
    """None where all pairs differ by as much, or there is one alone: nothing says how wide the interval is."""
    p: float


def mean_difference(
    first: Sequence[float], second: Sequence[float], confidence: float = 0.95, resamples: int = 9999
) -> MeanDifference:
    """Compares two lengths (of chains, of episodes) over pairs.

    The interval is the bias-corrected and accelerated bootstrap of the pairs; p is of the test that changes the
    signs of the differences, over all changes where those are few. Both draw with one seed: the same data give
    the same figures.

    Args:
        first: lengths of one policy, at least one.
        second: of the other, in the same order of initial states.
        confidence: level, in (0, 1).
        resamples: draws of the bootstrap and of the signs.
    """
    differences = np.asarray(second, np.float64) - np.asarray(first, np.float64)
    mean = float(differences.mean())
    if np.all(differences == differences[0]):  # nothing to draw from: the interval would be undefined
        p = 1.0 if mean == 0 else min(1.0, 2.0 ** (1 - len(differences)))
        return MeanDifference(len(differences), mean, None, None, p)
    from scipy.stats import bootstrap, permutation_test

    interval = bootstrap(
        (differences,), np.mean, confidence_level=confidence, n_resamples=resamples, method="BCa",
        rng=np.random.default_rng(0), batch=1000,
    ).confidence_interval  # fmt: skip
    test = permutation_test(
        (differences,), np.mean, permutation_type="samples", n_resamples=resamples, vectorized=True,
        rng=np.random.default_rng(0), batch=1000,
    )  # fmt: skip
    return MeanDifference(
        len(differences), mean, float(interval.low), float(interval.high), float(test.pvalue)
    )


def holm(p_values: Sequence[float]) -> list[float]:
    """P values corrected for the number of comparisons (Holm's step-down method), in the order given."""
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    corrected, so_far = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        so_far = max(so_far, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = so_far
    return corrected
