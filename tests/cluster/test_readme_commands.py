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
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
from readme import the_one

sys.path.append(str(Path(__file__).parents[1] / "data"))
from corpora import write_lerobot

LOOPBACK = """
import fcntl, socket, struct, sys
with socket.socket() as any_socket:
    # SIOCSIFFLAGS, IFF_UP: in a new network it is down.
    fcntl.ioctl(any_socket, 0x8914, struct.pack("16sh", b"lo", 1))
print("up", flush=True)
sys.stdin.read()
"""


@dataclass(frozen=True)
class User:
    """A user's shell in the activated environment."""

    repository: Path
    environment: dict[str, str]
    network: list[str] = field(default_factory=list)
    """What enters the network of this user's own."""

    def types(self, command: str, timeout: float = 120, **changes: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*self.network, "bash", "-c", command],
            env=self.environment | changes,
            cwd=self.repository,
            capture_output=True,
            text=True,
            timeout=timeout,
            stdin=subprocess.DEVNULL,
        )


@pytest.fixture
def network() -> Iterator[list[str]]:
    """A network for one Ray alone, whose job agent has one fixed port that any other Ray here may hold. Only root can
    make one; others have to end their Ray first."""
    command = ["unshare", "--net", sys.executable, "-c", LOOPBACK]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as held:
        assert held.stdin and held.stdout
        if held.stdout.readline():
            yield ["nsenter", f"--net=/proc/{held.pid}/ns/net", "--"]
            held.stdin.close()
            return
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", 52365)) == 0:
            pytest.fail("another Ray on this machine holds port 52365: end it, or run these tests as root")
    yield []


@pytest.fixture
def user(repository: Path, tmp_path: Path, network: list[str]) -> Iterator[User]:
    """Has a corpus where the README's recording puts it, and a home of their own."""
    write_lerobot(tmp_path / "runs" / "demo" / "corpus" / "video", [12] * 12, actions=False)
    (tmp_path / "home").mkdir()
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "PYTHONPATH"))}
    # A short path, for sockets lie there. Ray's commands find a cluster by a file in it, which is not to be that of
    # another Ray on this machine.
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as scratch:
        environment = {
            **kept,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "HOME": str(tmp_path / "home"),
            "DEFI_HOME": str(tmp_path / "runs"),
            "RAY_TMPDIR": scratch,
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        yield User(repository, environment, network)


@pytest.fixture
def head(user: User) -> Iterator[None]:
    """`ray start --head` as the README has it; ended by pid, because `ray stop` would end every Ray here."""
    user.environment["RAY_AUTH_MODE"] = the_one("On a cluster", "export RAY_AUTH_MODE").split("=")[1]
    for start in ("ray get-auth-token", "ray start"):
        started = user.types(the_one("On a cluster", start))
        assert started.returncode == 0, started.stdout + started.stderr
    yield
    for process in psutil.process_iter():
        try:
            ours = process.environ().get("DEFI_HOME") == user.environment["DEFI_HOME"]
        except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            continue
        if ours and process.pid != os.getpid():
            process.send_signal(signal.SIGKILL)


def wait_for_checkpoint(run: Path, user: User) -> None:
    deadline, asked = time.monotonic() + 400, time.monotonic()
    while not list(run.glob("checkpoints/*/")):
        time.sleep(0.2)
        if time.monotonic() - asked < 30:
            continue  # asking takes seconds of the cores that train
        status, asked = user.types("ray job status first").stdout, time.monotonic()
        if "FAILED" in status or time.monotonic() > deadline:
            pytest.fail(f"{status}\n{user.types('ray job logs first').stdout[-5000:]}")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_ray_job_submit_as_written_trains_with_token_authentication_and_goes_on_after_a_stop(
    user: User, head: None
) -> None:
    refused = user.types("ray job list", RAY_AUTH_MODE="disabled", HOME=f"{user.environment['HOME']}/nobody")
    assert refused.returncode != 0, "a client without the token is refused"

    submit = the_one("On a cluster", "ray job submit")
    small = "train.global_batch=2 train.micro_batch=2 train.checkpoint_every=3 train.validation_batches=1"
    submit = f"{submit} {small} tracking.wandb=false"
    submitted = user.types(submit.replace("ray job submit", "ray job submit --no-wait --submission-id first"))
    assert submitted.returncode == 0, submitted.stdout + submitted.stderr
    run = Path(user.environment["DEFI_HOME"]) / "demo" / "gfdm"
    wait_for_checkpoint(run, user)
    stopped = user.types("ray job stop first")
    assert stopped.returncode == 0, stopped.stdout + stopped.stderr

    reached = max(
        json.loads(line)["step"]
        for line in (run / "metrics.jsonl").read_text().splitlines()
        if '"train"' in line
    )
    # The rest of the run would take minutes: a few steps past the checkpoint show that it goes on.
    again = user.types(f"{submit} train.steps={reached + 3}", timeout=400)
    assert again.returncode == 0, again.stdout[-5000:] + again.stderr[-2000:]
    assert re.search(r"goes on from step \d+", again.stdout)
    assert json.loads((run / "summary.json").read_text())["resumed_from"] >= 1
    assert (run / "model" / "config.json").exists()
