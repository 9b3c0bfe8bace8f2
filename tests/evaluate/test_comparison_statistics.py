"""Paired tests, corrections and power, against published and exact values."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from scipy.stats import binom

from defi_platform.evaluate.statistics.paired import (
    PairedCounts,
    count_pairs,
    difference_interval,
    holm,
    mcnemar,
    mcnemar_of_tasks,
    mean_difference,
)
from defi_platform.evaluate.statistics.power import power, smallest_visible

BENTUR = PairedCounts(both=1, only_first=1, only_second=7, neither=12)
"""Airway reactivity of 21 children, the example of Fagerland, Lydersen and Laake, Statistics in Medicine 33 (2014)."""


def test_pairs_are_counted_by_who_solved_them() -> None:
    counts = count_pairs([True, True, False, False, True], [True, False, True, False, True])
    assert counts == PairedCounts(both=2, only_first=1, only_second=1, neither=1)
    assert (counts.pairs, counts.discordant, counts.difference) == (5, 2, 0.0)
    with pytest.raises(ValueError):
        count_pairs([True], [True, False])


def test_mcnemars_exact_test_has_the_published_value() -> None:
    assert mcnemar(BENTUR) == pytest.approx(0.0703125, abs=1e-12)
    assert mcnemar(PairedCounts(50, 0, 5, 45)) == 2 * 0.5**5, "pairs that agree say nothing"
    assert mcnemar(PairedCounts(10, 0, 0, 10)) == 1.0


def test_pairs_weigh_as_in_the_mean_over_tasks() -> None:
    tasks = [PairedCounts(0, 0, 4, 6), PairedCounts(0, 2, 0, 0)]  # +0.4 and -1
    sums = [
        abs(sum(a) / 10 + sum(b) / 2) for a in product((1, -1), repeat=4) for b in product((1, -1), repeat=2)
    ]
    assert mcnemar_of_tasks(tasks) == pytest.approx(sum(one >= 0.6 - 1e-9 for one in sums) / 64)
    alike = [PairedCounts(3, 1, 5, 1), PairedCounts(6, 0, 3, 1)]
    assert mcnemar_of_tasks(alike) == mcnemar(PairedCounts(9, 1, 8, 2)), (
        "as many pairs in each: the same test"
    )
    assert mcnemar_of_tasks([PairedCounts(3, 0, 0, 1)]) == 1.0


def test_the_interval_of_a_difference_has_the_published_values() -> None:
    assert difference_interval(BENTUR) == pytest.approx((0.026, 0.507), abs=5e-4)
    # Newcombe (1998), table II: 36, 12, 2, 0; there the first minus the second.
    assert difference_interval(PairedCounts(36, 12, 2, 0)) == pytest.approx((-0.3404, -0.0569), abs=5e-5)


def test_the_interval_of_a_difference_has_a_width_where_no_pair_is_discordant() -> None:
    low, high = difference_interval(PairedCounts(both=10, only_first=0, only_second=0, neither=0))
    assert low < -0.2 and high > 0.2


def test_the_interval_of_a_difference_covers_the_true_one() -> None:
    rng, pairs, hits = np.random.default_rng(0), 40, 0
    shares = [0.4, 0.1, 0.2, 0.3]  # difference 0.1
    draws = rng.multinomial(pairs, shares, 600)
    for both, first, second, neither in draws.tolist():
        low, high = difference_interval(PairedCounts(both, first, second, neither))
        hits += low <= 0.1 <= high
    assert 0.93 <= hits / len(draws) <= 0.98


def test_holm_corrects_step_by_step_and_keeps_the_order() -> None:
    # By hand: 4 x 0.005, 3 x 0.01, 2 x 0.03, and 0.04, which may not fall below the one before.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.9]) == [1.0, 1.0] and holm([0.2]) == [0.2] and holm([]) == []


def test_mean_differences_come_with_an_exact_p_value_where_pairs_are_few() -> None:
    found = mean_difference([1, 2, 3, 4, 5, 6], [2, 4, 4, 6, 9, 7])
    assert (found.pairs, found.mean) == (6, pytest.approx(11 / 6))
    assert found.p == 2 / 2**6, "all six grew: 2 of the 64 changes of signs are as extreme"
    assert found.low == pytest.approx(7 / 6, abs=0.2) and found.high == pytest.approx(19 / 6, abs=0.4)
    assert found == mean_difference([1, 2, 3, 4, 5, 6], [2, 4, 4, 6, 9, 7]), "the same data, the same figures"


def test_mean_differences_that_do_not_vary_have_a_p_value_and_no_width() -> None:
    same = mean_difference([3, 4], [3, 4])
    assert (same.mean, same.low, same.high, same.p) == (0, None, None, 1.0)
    assert mean_difference([0] * 5, [2] * 5).p == 2 * 0.5**5


def test_the_bootstrap_covers_the_true_mean_difference() -> None:
    rng, hits = np.random.default_rng(0), 0
    for _ in range(150):
        first, second = rng.binomial(5, 0.5, 50), rng.binomial(5, 0.6, 50)
        found = mean_difference(first, second, resamples=400)
        hits += found.low <= 0.5 <= found.high
    assert hits >= 135


def test_power_agrees_with_the_test_itself() -> None:
    pairs, shares = 30, [0.5, 0.05, 0.3, 0.15]  # both, only the first, only the second, neither
    draws = np.random.default_rng(0).multinomial(pairs, shares, 2000)
    p_of = {(b, c): mcnemar(PairedCounts(0, b, c, 0)) for b, c in {(b, c) for _, b, c, _ in draws.tolist()}}
    found = np.mean([p_of[b, c] <= 0.05 for _, b, c, _ in draws.tolist()])
    assert power(pairs, difference=0.25, discordant=0.35) == pytest.approx(found, abs=0.03)
    assert power(pairs, 0.0, 0.35) < 0.05, "the exact test keeps its level"
    assert power(100, 0.0, 0.0) == 0.0


def test_the_smallest_visible_difference_is_the_first_that_is_found_often_enough() -> None:
    # Where one policy solves all that the other does, at least six discordant pairs reach 5 % (2 / 2^6 = 0.031).
    found = smallest_visible(50, discordant=0.0)
    assert found is not None
    assert binom.sf(5, 50, found) >= 0.8 > binom.sf(5, 50, found - 0.001)
    wide = smallest_visible(75, discordant=0.3)
    assert wide is not None and power(75, wide, 0.3) >= 0.8 > power(75, wide - 0.001, 0.3)
    assert smallest_visible(5, discordant=0.2) is None, (
        "2 / 2^5 is above 5 %: no outcome of five pairs shows it"
    )
    corrected = smallest_visible(75, 0.3, level=0.05 / 10)
    assert corrected is not None and corrected > wide
