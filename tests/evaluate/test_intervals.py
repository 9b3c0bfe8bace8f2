"""Intervals of success rates, of one task and of several, of chains, and quantiles of latencies."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom

from defi_platform.errors import ConfigError
from defi_platform.evaluate.statistics.chains import chain_table
from defi_platform.evaluate.statistics.intervals import Rate, latency_quantiles, wilson
from defi_platform.evaluate.statistics.pooling import Grouping, pooled


@settings(deadline=None)  # the first example imports SciPy
@given(st.integers(1, 300).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_the_interval_holds_the_proportions_that_a_score_test_does_not_reject(case: tuple[int, int]) -> None:
    successes, episodes = case
    found = wilson(successes, episodes)
    assert 0.0 <= found.low <= found.rate <= found.high <= 1.0
    for bound in (found.low, found.high):
        if 0.0 < bound < 1.0:
            score = abs(found.rate - bound) / math.sqrt(bound * (1 - bound) / episodes)
            assert score == pytest.approx(1.959964, abs=1e-5), (
                "the 97.5 % quantile of the normal distribution"
            )
        else:
            assert bound == found.rate


def test_no_success_and_only_successes_still_leave_doubt() -> None:
    assert wilson(0, 10).low == 0.0 and wilson(0, 10).high == pytest.approx(0.2775, abs=1e-4)
    assert wilson(10, 10).high == 1.0 and wilson(10, 10).low == pytest.approx(0.7225, abs=1e-4)


@pytest.mark.parametrize(("successes", "episodes"), [(0, 0), (3, 2), (-1, 5)])
def test_what_is_no_proportion_is_refused(successes: int, episodes: int) -> None:
    with pytest.raises(ValueError, match="no proportion"):
        wilson(successes, episodes)


def test_latencies_without_a_request_have_no_quantiles() -> None:
    assert latency_quantiles([]) == {"count": 0, "p50": None, "p95": None}
    assert latency_quantiles([1.0, 2.0, 3.0]) == {"count": 3, "p50": 2.0, "p95": pytest.approx(2.9)}


def test_the_interval_covers_the_true_rate_as_often_as_it_says() -> None:
    """Exactly, over all outcomes: near 95 % on average, and never far below."""
    episodes = 20
    found = [wilson(k, episodes) for k in range(episodes + 1)]
    low, high = np.array([[one.low, one.high] for one in found]).T
    rates = np.linspace(0.03, 0.97, 95)
    covered = (low <= rates[:, None]) & (rates[:, None] <= high)
    coverage = (binom.pmf(np.arange(episodes + 1), episodes, rates[:, None]) * covered).sum(axis=1)
    assert coverage.mean() == pytest.approx(0.95, abs=0.01)
    assert coverage.min() > 0.87


# --------------------------------------------------------------------------- rates over several tasks


def test_pooled_by_episodes_counts_all_episodes_alike_and_by_tasks_all_tasks() -> None:
    tasks = [wilson(10, 10), wilson(0, 40)]
    assert pooled(tasks, "episodes") == wilson(10, 50)
    by_task = pooled(tasks, "tasks")
    assert (by_task.successes, by_task.episodes, by_task.rate) == (10, 50, 0.5)
    # Half the distances of the parts, 0.2775 below 1 and 0.0876 above 0; the other two vanish.
    assert by_task.low == pytest.approx(0.5 - 0.2775 / 2, abs=1e-4)
    assert by_task.high == pytest.approx(0.5 + 0.0876 / 2, abs=1e-4)
    assert pooled([wilson(3, 7)], "tasks") == wilson(3, 7), "one task is itself by either rule"


def test_the_interval_over_tasks_covers_the_true_mean() -> None:
    rng, episodes = np.random.default_rng(0), 10
    of = [wilson(k, episodes) for k in range(episodes + 1)]
    rates = np.array([0.95, 0.9, 0.7, 0.5, 0.3, 0.05])
    draws = rng.binomial(episodes, rates, (1000, len(rates)))
    hits = 0
    for draw in draws:
        found = pooled([of[k] for k in draw], "tasks")
        hits += found.low <= rates.mean() <= found.high
    assert 0.94 <= hits / len(draws) <= 0.985


@pytest.mark.parametrize(("tasks", "rule"), [([], "tasks"), ([wilson(1, 2)], "mean")])
def test_nothing_is_pooled_of_no_tasks_or_by_an_unknown_rule(tasks: list[Rate], rule: str) -> None:
    with pytest.raises(ValueError, match="cannot be pooled"):
        pooled(tasks, rule)


def test_groups_of_tasks_stay_apart_and_hold_every_task() -> None:
    assert Grouping().of(["a", "b"]) == {"all tasks": ["a", "b"]}
    apart = Grouping("tasks", {"matching": ["a", "b"], "variants": ["c"], "others": ["d"]})
    assert apart.of(["b", "c", "a"]) == {"matching": ["b", "a"], "variants": ["c"]}
    with pytest.raises(ConfigError, match=r"x: in none of the groups .*matching, variants"):
        apart.of(["a", "x"])


# --------------------------------------------------------------------------- chains


def chain(solved: int) -> dict[str, Any]:
    """An episode of a chain of five that solves so many subtasks; the one that fails is its last entry."""
    names = ["open", "push", "lift", "open", "place"][: min(5, solved + 1)]
    subtasks = [
        {"name": name, "instruction": name, "success": index < solved, "steps": 9}
        for index, name in enumerate(names)
    ]
    return {"solved": solved, "subtasks": subtasks}


def test_chains_are_scored_by_how_many_are_solved_in_a_row() -> None:
    found = chain_table([chain(solved) for solved in (5, 3, 1, 0)], length=5)
    assert [found["in_a_row"][str(k)]["successes"] for k in range(1, 6)] == [3, 2, 2, 1, 1]
    assert (
        found["average_length"]["mean"] == 2.25 == sum(found["in_a_row"][str(k)]["rate"] for k in range(1, 6))
    ), "the mean length is the sum of the rates"
    # Of the 256 equally likely draws of four, 5 have a sum of 1 or less and 5 one of 18 or more: under 2.5 % each.
    assert found["average_length"]["low"] == 0.5 and found["average_length"]["high"] == 4.0
    opened = found["subtasks"]["open"]
    assert (opened["successes"], opened["episodes"]) == (4, 6), "once and again in a chain"
    assert found["subtasks"]["place"]["episodes"] == 1, "a subtask that was never reached is no try"


@pytest.mark.parametrize(("solved", "low", "high"), [(5, 2.19, 5.0), (0, 0.0, 2.81), (2, 0.88, 3.68)])
def test_a_few_chains_of_one_length_leave_the_average_open(solved: int, low: float, high: float) -> None:
    average = chain_table([chain(solved)] * 3, length=5)["average_length"]
    assert average["mean"] == solved
    assert (average["low"], average["high"]) == (pytest.approx(low, abs=0.01), pytest.approx(high, abs=0.01))
