"""Recordings of episodes for Rerun's viewer, read back with its own reader."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_evaluations import episode, evaluated

from defi_client.recording.h264 import encode_h264
from defi_platform.errors import exit_code
from defi_platform.jobs.export_evaluation import main


def recorded(path: Path) -> dict[str, dict[str, list[Any]]]:
    """Entity -> its columns."""
    from rerun.chunk import RrdReader

    found: dict[str, dict[str, list[Any]]] = {}
    for chunk in RrdReader(str(path)).stream():
        found.setdefault(str(chunk.entity_path), {}).update(chunk.to_record_batch().to_pydict())
    return found


def test_a_recording_has_video_actions_and_success_on_the_time_line_of_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("rerun", reason="rerun-sdk (170 MB) is not installed: pip install '.[rerun]'")
    (tmp_path / "film.mp4").write_bytes(
        encode_h264([np.full((64, 64, 3), n, np.uint8) for n in (0, 90, 200)], 5)
    )
    solved = episode("cube", 0, True)
    failed = episode("cube", 1, False, video="film.mp4", steps=4)
    evaluated(tmp_path, [solved, failed], more={"video_every": 2})
    arguments = [f"evaluation={tmp_path}", f"output={tmp_path}/rrd", "layout=rerun", "episodes=1"]
    monkeypatch.setattr(sys, "argv", ["export_evaluation.py", *arguments])
    assert exit_code(main) == 0
    (file,) = (tmp_path / "rrd").iterdir()
    assert file.name == "policy-cube1.rrd", "the failed one comes first"
    found = recorded(file)
    assert found["/action"]["Scalars:scalars"] == [[0.5, 2.0]] * 4 and found["/action"]["step"] == [
        0,
        1,
        2,
        3,
    ]
    assert found["/executed"]["Scalars:scalars"][0] == [0.5, 1.0]
    assert found["/success"]["Scalars:scalars"] == [[0.0]] * 4
    assert found["/latency_ms"]["step"] == [0, 2]
    assert found["/video"]["step"] == [0, 2, 4], "the last frame is the state after the last step"
    assert found["/instruction"]["TextLog:text"] == [["push the cube"]]


def test_without_rerun_the_fix_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    evaluated(tmp_path, [episode("cube", 0, True)])
    monkeypatch.setattr(
        sys, "argv", ["x.py", f"evaluation={tmp_path}", f"output={tmp_path}/r", "layout=rerun"]
    )
    assert exit_code(main) == 2
    assert "pip install 'defi-platform[rerun]'" in capsys.readouterr().err
