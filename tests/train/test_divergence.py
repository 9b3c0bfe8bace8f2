from __future__ import annotations

from math import inf, nan

import pytest

from defi_platform.train.worker.divergence_policy import MAX_SKIPPED, DivergencePolicy, UpdateDecision


def test_an_update_that_was_left_out_is_skipped_and_a_row_of_them_stops_the_run() -> None:
    policy = DivergencePolicy("bf16")
    decisions = [policy.decide(False, nan, nan) for _ in range(MAX_SKIPPED["bf16"])]
    assert decisions == [UpdateDecision.SKIP, UpdateDecision.SKIP, UpdateDecision.STOP]


def test_a_good_update_ends_the_row() -> None:
    policy = DivergencePolicy("fp32")
    for _ in range(10):
        assert policy.decide(False, 0.5, inf) is UpdateDecision.SKIP
        assert policy.decide(True, 0.5, 1.0) is UpdateDecision.KEEP
    assert policy.consecutive_skips == 0


def test_fp16_may_search_for_its_loss_scale() -> None:
    policy = DivergencePolicy("fp16")
    assert {policy.decide(False, 1.0, inf) for _ in range(30)} == {UpdateDecision.SKIP}


@pytest.mark.parametrize(("loss", "norm"), [(nan, 1.0), (inf, None), (0.1, nan)])
def test_an_update_that_has_reached_the_weights_stops_the_run_at_once(
    loss: float, norm: float | None
) -> None:
    assert DivergencePolicy("fp32").decide(True, loss, norm) is UpdateDecision.STOP
