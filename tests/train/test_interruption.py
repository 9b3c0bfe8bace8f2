"""What happens to a job when its own process is interrupted or killed."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny

pytestmark = pytest.mark.slow
STEPS = 10


def start(run: Path, hold: int = 0) -> subprocess.Popen[str]:
    script = Path(__file__).with_name("tiny_job.py")
    command = [sys.executable, str(script), str(run), str(STEPS), str(hold)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def wait_for_step(job: subprocess.Popen[str], run: Path, step: int) -> None:
    """Until the run has logged `step`, which is after the checkpoint of the step before."""
    deadline = time.monotonic() + 300
    while not ((run / "metrics.jsonl").exists() and step in tiny.losses(run)):
        assert job.poll() is None and time.monotonic() < deadline, job.communicate()[0]
        time.sleep(0.1)


def test_ctrl_c_stops_at_a_checkpoint_and_sigkill_loses_no_more_than_the_steps_since_one(
    tmp_path: Path,
) -> None:
    run = tmp_path / "run"
    interrupted = start(run, hold=2)
    wait_for_step(interrupted, run, 1)
    interrupted.send_signal(signal.SIGINT)
    told = interrupted.communicate(timeout=300)[0]
    assert interrupted.returncode == 130, told
    assert "stopping at a checkpoint" in told and "run the same command again" in told
    assert max(tiny.losses(run)) == 3, "it stops at the end of the first step that begins after the request"
    assert not (run / "summary.json").exists()

    killed = start(run, hold=8)
    wait_for_step(killed, run, 7)
    killed.kill()
    killed.communicate()
    before = tiny.losses(run)

    finished = start(run)
    told = finished.communicate(timeout=300)[0]
    assert finished.returncode == 0, told
    assert "held: goes on from step" in told
    after = tiny.losses(run)
    assert sorted(after) == list(range(1, STEPS + 1))
    assert {step: after[step] for step in before} == before
    assert json.loads((run / "summary.json").read_text())["resumed_from"] in (3, 6)
