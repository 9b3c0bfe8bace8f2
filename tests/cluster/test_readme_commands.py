"""The README's way to a cluster, run as it is written there."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from readme import the_one

sys.path.append(str(Path(__file__).parents[1] / "data"))
from corpora import write_lerobot


def shell(
    command: str, environment: dict[str, str], repository: Path, timeout: float
) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", "-c", command],
        env=environment,
        cwd=repository,
        capture_output=True,
        text=True,
        timeout=timeout,
        stdin=subprocess.DEVNULL,
    )


def user(folder: Path) -> dict[str, str]:
    """A user's shell in the activated environment, with data and token below `folder`."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "PYTHONPATH"))}
    bin_folder = str(Path(sys.executable).parent)
    (folder / "home").mkdir()
    return {
        **kept,
        "PATH": f"{bin_folder}:{os.environ['PATH']}",
        "HOME": str(folder / "home"),
        "DEFI_HOME": str(folder / "runs"),
        "RAY_USAGE_STATS_ENABLED": "0",
    }


@pytest.fixture
def environment(tmp_path: Path) -> Iterator[dict[str, str]]:
    """A user who has a corpus where the README's recording puts it."""
    write_lerobot(tmp_path / "runs" / "demo" / "corpus" / "video", [12] * 12, actions=False)
    # A short path, for sockets lie there. Ray's commands find a cluster by a file in it, which is not to be that of
    # another Ray on this machine.
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as scratch:
        yield user(tmp_path) | {"RAY_TMPDIR": scratch}


@pytest.fixture
def head(environment: dict[str, str], repository: Path) -> Iterator[None]:
    """`ray start --head` as the README has it; ended by pid, because `ray stop` would end every Ray here."""
    with socket.socket() as probe:
        # Ray's job agent has one fixed port; where it is taken, `ray job submit` finds "no available agent".
        if probe.connect_ex(("127.0.0.1", 52365)) == 0:
            pytest.fail("another Ray on this machine holds port 52365: end it, or run these tests first")
    environment["RAY_AUTH_MODE"] = the_one("On a cluster", "export RAY_AUTH_MODE").split("=")[1]
    for start in ("ray get-auth-token", "ray start"):
        started = shell(the_one("On a cluster", start), environment, repository, 120)
        assert started.returncode == 0, started.stdout + started.stderr
    yield
    for process in psutil.process_iter():
        try:
            ours = process.environ().get("DEFI_HOME") == environment["DEFI_HOME"]
        except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            continue
        if ours and process.pid != os.getpid():
            process.send_signal(signal.SIGKILL)


def wait_for_checkpoint(run: Path, environment: dict[str, str], repository: Path) -> None:
    deadline, asked = time.monotonic() + 400, time.monotonic()
    while not list(run.glob("checkpoints/*/")):
        time.sleep(0.2)
        if time.monotonic() - asked < 30:
            continue  # asking takes seconds of the cores that train
        status, asked = shell("ray job status first", environment, repository, 60).stdout, time.monotonic()
        if "FAILED" in status or time.monotonic() > deadline:
            logs = shell("ray job logs first", environment, repository, 60)
            pytest.fail(f"{status}\n{logs.stdout[-5000:]}")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_ray_job_submit_as_written_trains_with_token_authentication_and_goes_on_after_a_stop(
    environment: dict[str, str], repository: Path, head: None
) -> None:
    submit = the_one("On a cluster", "ray job submit")
    stranger = {**environment, "RAY_AUTH_MODE": "disabled", "HOME": f"{environment['HOME']}/nobody"}
    refused = shell("ray job list", stranger, repository, 120)
    assert refused.returncode != 0, "a client without the token is refused"

    submit = f"{submit} train.checkpoint_every=3 train.validation_batches=1"
    without_wait = submit.replace("ray job submit", "ray job submit --no-wait --submission-id first")
    submitted = shell(without_wait, environment, repository, 120)
    assert submitted.returncode == 0, submitted.stdout + submitted.stderr
    run = Path(environment["DEFI_HOME"]) / "demo" / "gfdm"
    wait_for_checkpoint(run, environment, repository)
    stopped = shell("ray job stop first", environment, repository, 120)
    assert stopped.returncode == 0, stopped.stdout + stopped.stderr

    reached = max(
        json.loads(line)["step"]
        for line in (run / "metrics.jsonl").read_text().splitlines()
        if '"train"' in line
    )
    # The rest of the run would take minutes: a few steps past the checkpoint show that it goes on.
    again = shell(f"{submit} train.steps={reached + 3}", environment, repository, 400)
    assert again.returncode == 0, again.stdout[-5000:] + again.stderr[-2000:]
    assert re.search(r"goes on from step \d+", again.stdout)
    assert json.loads((run / "summary.json").read_text())["resumed_from"] >= 1
    assert (run / "model" / "config.json").exists()
