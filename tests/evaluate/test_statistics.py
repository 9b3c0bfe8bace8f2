"""Intervals of success rates and quantiles of latencies."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from defi_platform.evaluate.confidence import latency_quantiles, wilson


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
