from __future__ import annotations

import pytest

from defi_platform.train.engine.lr_schedule import SCHEDULES, learning_rate


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_rate_never_leaves_the_range_up_to_its_peak(schedule: str) -> None:
    rates = [learning_rate(schedule, 2e-4, step, 500, warmup_steps=20) for step in range(500)]
    assert max(rates) == pytest.approx(2e-4)
    assert min(rates) >= 0


def test_tri_stage_rises_for_two_percent_holds_for_eight_and_falls_to_a_hundredth() -> None:
    rates = [learning_rate("tri_stage", 1.0, step, 50_000) for step in (0, 999, 1000, 4999, 5000, 49_999)]
    assert rates[0] == pytest.approx(0.01)
    assert rates[1] == pytest.approx(1.0, abs=2e-3)
    assert rates[2:5] == [1.0, 1.0, 1.0]
    assert rates[5] == pytest.approx(0.01, rel=1e-3)


def test_cosine_ends_near_zero_after_a_linear_warmup() -> None:
    assert [learning_rate("cosine", 1.0, step, 100, warmup_steps=4) for step in range(4)] == [
        0.25,
        0.5,
        0.75,
        1.0,
    ]
    assert learning_rate("cosine", 1.0, 99, 100, warmup_steps=4) < 1e-3
