"""What happens to a job when its own process is interrupted or killed."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
from in_process import train_here
from tiny_job import held, marker

pytestmark = pytest.mark.slow
STEPS = 10


def start(run: Path, hold: int) -> subprocess.Popen[str]:
    script = Path(__file__).with_name("tiny_job.py")
    command = [sys.executable, str(script), str(run), str(STEPS), str(hold)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def wait_until_held(job: subprocess.Popen[str], run: Path, step: int) -> None:
    """Until the job waits in `step`, which is after the log of the step before and its checkpoint."""
    deadline = time.monotonic() + 300
    while not marker(run, step).exists():
        assert job.poll() is None and time.monotonic() < deadline, job.communicate()[0]
        time.sleep(0.1)


def test_ctrl_c_stops_at_a_checkpoint_and_sigkill_loses_no_more_than_the_steps_since_one(
    process_group: None, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    interrupted = start(run, hold=2)
    wait_until_held(interrupted, run, 2)
    interrupted.send_signal(signal.SIGINT)
    printed = interrupted.communicate(timeout=300)[0]
    assert interrupted.returncode == 130, printed
    assert "stopping at a checkpoint" in printed and "run the same command again" in printed
    assert max(tiny.losses(run)) == 3, "it stops at the end of the first step that begins after the request"
    assert not (run / "summary.json").exists()

    killed = start(run, hold=8)
    wait_until_held(killed, run, 8)
    killed.kill()
    killed.communicate()
    before = tiny.losses(run)

    # The job's command again is in test_demo; this takes the same run to its end without another Ray.
    summary = train_here(held(str(run), STEPS, hold=0))
    assert "held: goes on from step" in capfd.readouterr().out
    after = tiny.losses(run)
    assert sorted(after) == list(range(1, STEPS + 1))
    assert {step: after[step] for step in before} == before
    assert summary.values["resumed_from"] in (3, 6)
