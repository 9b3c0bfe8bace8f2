from __future__ import annotations

import pytest

from defi_platform.train.engine.lr_schedule import SCHEDULES, learning_rate


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_rate_never_leaves_the_range_up_to_its_peak(schedule: str) -> None:
    rates = [learning_rate(schedule, 2e-4, step, 500, warmup_steps=20) for step in range(500)]
    assert max(rates) == pytest.approx(2e-4)
    assert min(rates) >= 0


def test_the_released_schedule_as_written_is_a_cosine_after_two_and_eight_percent() -> None:
    places = {0: 1e-5, 500: 5.5e-5, 1000: 1e-4, 4999: 1e-4, 5000: 1e-4, 27_500: 5e-5, 50_000: 1e-10}
    for step, rate in places.items():
        assert learning_rate("as_written", 1e-4, step, 50_000) == pytest.approx(rate, rel=1e-5), step


def test_the_released_schedule_as_run_is_the_peak_throughout() -> None:
    assert {learning_rate("as_run", 1e-4, step, 50_000) for step in (0, 1, 5000, 27_500, 49_999)} == {1e-4}


def test_cosine_ends_near_zero_after_a_linear_warmup() -> None:
    assert [learning_rate("cosine", 1.0, step, 100, warmup_steps=4) for step in range(4)] == [
        0.25,
        0.5,
        0.75,
        1.0,
    ]
    assert learning_rate("cosine", 1.0, 99, 100, warmup_steps=4) < 1e-3
