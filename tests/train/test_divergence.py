from __future__ import annotations

from math import inf, nan

import pytest

from defi_platform.train.worker.divergence_policy import MOST_SKIPPED, UpdateDecision, UpdateJudge


def test_an_update_that_was_left_out_is_skipped_and_a_row_of_them_stops_the_run() -> None:
    judge = UpdateJudge("bf16")
    verdicts = [judge.judge(False, nan, nan) for _ in range(MOST_SKIPPED["bf16"])]
    assert verdicts == [UpdateDecision.SKIP, UpdateDecision.SKIP, UpdateDecision.STOP]


def test_a_good_update_ends_the_row() -> None:
    judge = UpdateJudge("fp32")
    for _ in range(10):
        assert judge.judge(False, 0.5, inf) is UpdateDecision.SKIP
        assert judge.judge(True, 0.5, 1.0) is UpdateDecision.KEEP
    assert judge.in_a_row == 0


def test_fp16_may_search_for_its_loss_scale() -> None:
    judge = UpdateJudge("fp16")
    assert {judge.judge(False, 1.0, inf) for _ in range(30)} == {UpdateDecision.SKIP}


@pytest.mark.parametrize(("loss", "norm"), [(nan, 1.0), (inf, None), (0.1, nan)])
def test_an_update_that_has_reached_the_weights_stops_the_run_at_once(
    loss: float, norm: float | None
) -> None:
    assert UpdateJudge("fp32").judge(True, loss, norm) is UpdateDecision.STOP
