"""CALVIN's real simulator, where it is installed: recorded episodes replayed, and the same episode in two processes."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest


@pytest.fixture(scope="module")
def calvins_python() -> str:
    """Interpreter of the environment that jobs/install_benchmark.py makes."""
    named = os.environ.get("DEFI_ENVIRONMENTS")
    python = Path(named or "") / "calvin" / "bin" / "python"
    if named is None or not python.exists():
        pytest.skip(
            "needs CALVIN's simulator: python jobs/install_benchmark.py calvin, then DEFI_ENVIRONMENTS=its folder"
        )
    return str(python)


def test_recorded_actions_solve_the_recorded_tasks_by_calvins_oracle(
    calvins_python: str, shared_data: Path, repository: Path
) -> None:
    recorded = shared_data / "calvin" / "validation"
    found = np.load(recorded / "lang_annotations" / "auto_lang_ann.npy", allow_pickle=True).item()
    segments = [
        [*map(int, span), task]
        for span, task in zip(found["info"]["indx"], found["language"]["task"], strict=True)
    ]
    script = Path(__file__).parent / "calvin_replay.py"
    said = subprocess.run(
        [calvins_python, script, recorded, json.dumps(segments)],
        env=os.environ | {"PYTHONPATH": f"{repository / 'platform'}{os.pathsep}{repository}"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    ).stdout
    answers = json.loads(next(line for line in said.splitlines() if line.startswith("[{")))
    assert len(answers) == len(segments) == 3
    for answer, (first, last, task) in zip(answers, segments, strict=True):
        assert answer["solved_at"] is not None, f"{task} in {first}-{last}"
        assert answer["other_task"] is False
        assert answer["hand_drift"] < 0.001  # metres, after all of the recorded actions
        assert min(answer["decibels"].values()) > 45  # they were recorded with the same renderer
