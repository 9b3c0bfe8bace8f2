"""Progress displays as a log shows them."""

from __future__ import annotations

import pytest

from defi_platform.progress import Progress, StatusLines


def test_items_done_before_count_but_not_as_speed() -> None:
    progress = Progress("evaluate", "episodes", 10, initial=8)
    assert progress.line().startswith("evaluate 8 of 10 episodes, 0.0/s, ") and "left" not in progress.line()
    progress.step(note="fused 1/1")
    assert (
        progress.line().startswith("evaluate 9 of 10 episodes, ") and "s left, fused 1/1, " in progress.line()
    )


def test_a_log_shows_a_line_when_it_has_changed(capsys: pytest.CaptureFixture[str]) -> None:
    lines = StatusLines(interval_s=3600.0)
    assert lines.due()
    lines.show({"gfdm": "gfdm step 1", "gidm": "gidm starting"})
    assert not lines.due()
    lines.show({"gfdm": "gfdm step 2", "gidm": "gidm starting"})
    assert capsys.readouterr().out.splitlines() == ["gfdm step 1", "gidm starting", "gfdm step 2"]
