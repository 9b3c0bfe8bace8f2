"""The README's way to a cluster, run as it is written there."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
import venv
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
from readme import the_one

from defi_platform.data.ingest.probe_actors import FEW_FILES

sys.path.append(str(Path(__file__).parents[1] / "data"))
from corpora import write_lerobot, write_video

SECRETS = {
    "AWS_SECRET_ACCESS_KEY": "secret-of-the-store",
    "WANDB_API_KEY": "secret-of-wandb-0123456789012345678901234",
}
"""In the environment of the user and of the head, as a cluster has them from its secrets."""
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

    def types(
        self, command: str, timeout: float = 300, folder: Path | None = None, **changes: str
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*self.network, "bash", "-c", command],
            env=self.environment | changes,
            cwd=folder or self.repository,
            capture_output=True,
            text=True,
            timeout=timeout,
            stdin=subprocess.DEVNULL,
        )


@pytest.fixture(scope="module")
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


@pytest.fixture(scope="module")
def user(repository: Path, tmp_path_factory: pytest.TempPathFactory, network: list[str]) -> Iterator[User]:
    """Has a corpus where the README's recording puts it, and a home of their own."""
    tmp_path = tmp_path_factory.mktemp("user")
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
            **SECRETS,
        }
        yield User(repository, environment, network)


@pytest.fixture(scope="module")
def head(user: User) -> Iterator[None]:
    """`ray start --head` as the README has it, and a node for decoding; ended by pid, because `ray stop` would end every Ray here."""
    user.environment["RAY_AUTH_MODE"] = the_one("On a cluster", "export RAY_AUTH_MODE").split("=")[1]
    for start in ("ray get-auth-token", "ray start"):
        started = user.types(the_one("On a cluster", start))
        assert started.returncode == 0, started.stdout + started.stderr
    # A folder of its own, as another machine has: in a shared one it would unpack a job's code under the running job.
    folder = user.environment["RAY_TMPDIR"] + "/decode"
    decode = f"ray start --address 127.0.0.1:6379 --num-cpus 2 --labels defi.role=decode --temp-dir {folder}"
    joined = user.types(decode)
    assert joined.returncode == 0, joined.stdout + joined.stderr
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
    small = "train.global_batch=2 train.micro_batch=2 train.checkpoint_every=3 train.validation_samples=2"
    submit = f"{submit} {small} tracking.wandb=false"
    submitted = user.types(submit.replace("ray job submit", "ray job submit --no-wait --submission-id first"))
    assert submitted.returncode == 0, submitted.stdout + submitted.stderr
    run = Path(user.environment["DEFI_HOME"]) / "demo" / "gfdm"
    wait_for_checkpoint(run, user)
    stopped = user.types("ray job stop first")
    assert stopped.returncode == 0, stopped.stdout + stopped.stderr

    reached = max(int(folder.name.split("_")[1]) for folder in (run / "checkpoints").iterdir())
    # The rest of the run would take minutes: a few steps past the checkpoint show that it goes on.
    again = user.types(f"{submit} train.steps={reached + 3} train.extend=stretch", timeout=400)
    assert again.returncode == 0, again.stdout[-5000:] + again.stderr[-2000:]
    assert re.search(r"goes on from step \d+", again.stdout)
    assert json.loads((run / "summary.json").read_text())["resumed_from"] >= 1
    assert (run / "model" / "config.json").exists()


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of more videos than are opened without actors on Ray."""
    folder = tmp_path_factory.mktemp("videos")
    for number in range(FEW_FILES + 4):
        write_video(folder / f"{number}.mp4", range(number, number + 8))
    return folder


@pytest.fixture(scope="module")
def ingest(videos: Path) -> str:
    """A job's arguments, which are the same in all ways to run it, but for its folder of results."""
    return f"--config configs/datasets/videos/ingest_videos.yaml data.corpora.videos.path={videos} data.manifest="


def tables(manifest: Path) -> dict[str, str]:
    """Files of a manifest by name: those of its rows are named by what is in them."""
    found = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in manifest.rglob("*.parquet")}
    assert found
    return found


def installed(folder: Path, repository: Path) -> Path:
    """Python of a new virtual environment in which the platform is installed from a wheel; the other packages are those
    of this one."""
    source, environment = folder / "source", folder / "environment"
    for name in ("platform", "defi_models", "defi_client", "configs"):
        shutil.copytree(repository / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(repository / name, source)
    venv.create(environment, symlinks=True)
    python = environment / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    build = ["wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(source)]
    # By PYTHONPATH pip would find this checkout, and have nothing to install.
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run([*pip, *build], check=True, env=clean)
    (wheel,) = folder.glob("*.whl")
    subprocess.run([*pip, "--python", str(python), "install", "--no-deps", str(wheel)], check=True, env=clean)
    shutil.rmtree(source)
    (site,) = environment.glob("lib/python*/site-packages")
    # Read last, and without the installation of this checkout that is among them.
    (site / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_one_config_runs_unchanged_in_four_ways(
    user: User, head: None, ingest: str, repository: Path, tmp_path: Path
) -> None:
    ended = {}
    alone = user.environment["RAY_TMPDIR"] + "/alone"
    # 1: on nothing: the job starts its own Ray.
    ended["nothing"] = user.types(
        f"python jobs/ingest_videos.py {ingest}{tmp_path}/nothing", RAY_TMPDIR=alone
    )

    # 2: on a running cluster.
    ended["joined"] = user.types(
        f"python jobs/ingest_videos.py {ingest}{tmp_path}/joined", RAY_ADDRESS="127.0.0.1:6379"
    )

    # 3: submitted with its code, from a folder that also holds 1 GB of runs.
    for name in ("platform", "defi_models", "defi_client", "configs", "jobs", "cluster"):
        shutil.copytree(repository / name, tmp_path / "checkout" / name, symlinks=True)
    for name in ("runs/model/model.safetensors", "data/video.mp4"):
        (tmp_path / "checkout" / name).parent.mkdir(parents=True)
        (tmp_path / "checkout" / name).touch()
        os.truncate(tmp_path / "checkout" / name, 2**30)
    submit = re.sub("-- python.*", "", the_one("On a cluster", "ray job submit"))
    line = f"{submit} --submission-id way -- python jobs/ingest_videos.py {ingest}{tmp_path}/submitted"
    ended["submitted"] = user.types(line, folder=tmp_path / "checkout")
    assert "/#/jobs/way" in ended["submitted"].stdout

    # 4: from a wheel in a new virtual environment, in a folder that holds nothing.
    python = installed(tmp_path, repository)
    (tmp_path / "empty").mkdir()
    command = f"{python.with_name('defi')} ingest_videos {ingest}{tmp_path}/installed"
    ended["installed"] = user.types(command, folder=tmp_path / "empty", RAY_TMPDIR=f"{alone}-too")

    for way, job in ended.items():
        assert job.returncode == 0, f"{way}: {job.stdout}{job.stderr}"
    first = tables(tmp_path / "nothing")
    assert all(tables(tmp_path / way) == first for way in ended)

    listed = user.types("ray list actors --detail --format json --filter class_name=Prober")
    nodes = json.loads(user.types("ray list nodes --detail --format json").stdout)
    decode = {node["node_id"] for node in nodes if node["labels"].get("defi.role") == "decode"}
    probers = json.loads(listed.stdout)
    assert probers and {prober["node_id"] for prober in probers} == decode, "probing keeps to its nodes"


@pytest.mark.slow
@pytest.mark.parametrize("secret", [None, "0" * 64], ids=["no-token", "wrong-token"])
def test_without_the_token_every_entry_is_refused(
    user: User, head: None, ingest: str, tmp_path: Path, secret: str | None
) -> None:
    changes = {"HOME": str(tmp_path), "RAY_AUTH_MODE": "disabled"}
    header = ""
    if secret:
        changes |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secret}
        header = f"-H 'Authorization: Bearer {secret}'"
    for path in (
        "api/jobs/",
        "api/packages/gcs/x.zip",
        "nodes?view=summary",
        "api/v0/actors",
        "api/serve/applications/",
    ):
        answer = user.types(f"curl -s -o /dev/null -w '%{{http_code}}' {header} http://127.0.0.1:8265/{path}")
        assert answer.stdout in ("401", "403"), f"{path}: {answer.stdout}"
    for command in ("ray job list", "ray job submit --no-wait -- true"):
        refused = user.types(command, **changes)
        assert refused.returncode != 0, command + refused.stdout
    job = user.types(
        f"python jobs/ingest_videos.py {ingest}{tmp_path}/refused", RAY_ADDRESS="127.0.0.1:6379", **changes
    )
    assert job.returncode == 2, job.stdout + job.stderr
    assert re.search(r"^ClusterError: .*token", job.stderr, flags=re.MULTILINE), job.stderr


@pytest.mark.slow
def test_no_secret_is_in_a_run_a_log_or_a_command_line(user: User, head: None) -> None:
    """Of what the tests before this one have left."""
    token = (Path(user.environment["HOME"]) / ".ray" / "auth_token").read_text().strip()
    secrets = [value.encode() for value in (token, *SECRETS.values())]
    files = [
        path
        for folder in ("DEFI_HOME", "RAY_TMPDIR")
        for path in Path(user.environment[folder]).rglob("*")
        if path.is_file() and not path.is_symlink()
    ]
    assert any("job-driver" in path.name for path in files), "the logs of jobs are among them"
    assert [path for path in files if any(secret in path.read_bytes() for secret in secrets)] == []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            line = " ".join(process.cmdline()).encode()
            assert not any(secret in line for secret in secrets), process.name()
