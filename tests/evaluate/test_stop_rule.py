"""The sequential test of a success rate: its errors under early stopping, simulated, and what it looks at."""

from __future__ import annotations

import numpy as np
import pytest

from defi_platform.evaluate.fleet.stop_rule import StopRule, decide, interval

RULE = StopRule(p0=0.5, p1=0.7, alpha=0.05, beta=0.05)


def simulated(tasks: list[float], runs: int = 600, blocks: int = 60) -> tuple[dict[str | None, float], float]:
    """(answer -> share of the runs, share of the runs whose interval has the true rate)."""
    random = np.random.default_rng(0)
    found: dict[str | None, float] = {}
    covered = 0
    for _ in range(runs):
        outcomes = random.random((blocks, len(tasks))) < tasks
        decision = decide(RULE, outcomes.tolist())
        found[decision.found] = found.get(decision.found, 0) + 1 / runs
        low, high = interval(decision.successes, decision.episodes)
        covered += low <= float(np.mean(tasks)) <= high
    return found, covered / runs


@pytest.mark.parametrize(
    ("tasks", "wrong"),
    [
        ([0.5] * 10, "at least 0.7"),
        ([0.2, 0.4, 0.5, 0.6, 0.8], "at least 0.7"),  # tasks of different difficulty
        ([0.5], "at least 0.7"),
        ([0.7] * 10, "at most 0.5"),
        ([0.4, 1.0, 0.7], "at most 0.5"),
    ],
)
def test_errors_stay_below_what_is_stated_although_the_test_looks_after_every_block(
    tasks: list[float], wrong: str
) -> None:
    found, covered = simulated(tasks)
    assert found.get(wrong, 0.0) <= 0.05
    assert max(found, key=lambda answer: found[answer]) not in (wrong, None), "and it does find the answer"
    assert covered >= 0.95


def test_looking_at_episodes_as_they_finish_would_break_the_stated_error() -> None:
    """Why the order is fixed: successes end sooner, so the first to finish among many workers are mostly successes."""
    random = np.random.default_rng(1)
    runs, wrong_by_time, wrong_by_order = 300, 0, 0
    for _ in range(runs):
        success = random.random(200) < 0.5
        by_time = np.concatenate([success[success], success[~success]])
        wrong_by_time += decide(RULE, [[bool(s)] for s in by_time]).found == "at least 0.7"
        wrong_by_order += decide(RULE, [[bool(s)] for s in success]).found == "at least 0.7"
    assert wrong_by_time == runs and wrong_by_order <= 0.05 * runs


def test_the_answer_depends_on_the_finished_beginning_alone_and_stays() -> None:
    won, lost = [True] * 4, [False] * 4
    open_yet = decide(RULE, [won, won, None, won])
    assert open_yet.found is None and (open_yet.blocks, open_yet.episodes) == (2, 8)
    answered = decide(RULE, [won, won, won, None])
    assert answered.found == "at least 0.7" and answered.blocks == 3
    assert answered == decide(RULE, [won, won, won, lost, lost, lost])
    assert decide(RULE, [lost, lost, *[won] * 9]).found == "at most 0.5"
    assert decide(RULE, [[True, None, False]]).episodes == 2, "one that was left out does not count"


def test_the_interval_that_holds_at_all_times_is_wider_than_wilsons() -> None:
    from defi_platform.evaluate.statistics.intervals import wilson

    for successes, episodes in ((0, 20), (7, 20), (20, 20), (140, 200)):
        low, high = interval(successes, episodes)
        ordinary = wilson(successes, episodes)
        assert low <= ordinary.low and high >= ordinary.high
        assert low <= successes / episodes <= high
    assert interval(0, 0) == (0.0, 1.0)
