"""The local cluster: its node types, what jobs read from its head, its report; and once for real, as the README has it,
with a head that is killed."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from ports import free_port
from readme import commands

sys.path.append(str(Path(__file__).resolve().parents[2] / "cluster"))
import local
from local import LocalCluster, LocalClusterError
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
from ray.autoscaler.v2.schema import (
    ClusterStatus,
    LaunchRequest,
    NodeInfo,
    NodeUsage,
    RayTaskActorDemand,
    ResourceDemandSummary,
    ResourceRequestByCount,
    ResourceUsage,
)

from defi_platform.cluster.local_nodes import LocalNodes

REPOSITORY = Path(__file__).resolve().parents[2]


def test_rays_autoscaler_takes_the_node_types() -> None:
    config = AutoscalingConfig(local.node_types(), skip_content_hash=True)
    types = config.get_node_type_configs()
    assert types is not None
    assert {name: one.labels.get("defi.role") for name, one in types.items()} == {
        local.HEAD_TYPE: None,
        "decode": "decode",
        "train": "train",
    }
    assert types[local.HEAD_TYPE].resources == {"CPU": 0} and types["train"].resources["accelerator"] == 1
    assert all(
        types[name].min_worker_nodes == 0 < types[name].max_worker_nodes for name in ("decode", "train")
    )
    assert config.disable_node_updaters()


def test_the_head_says_what_its_autoscaler_can_add() -> None:
    labels = dict(label.split("=") for label in local.head_labels().split(","))
    assert labels == {
        "defi.max.decode.CPU": "4",
        "defi.max.train.CPU": "4",
        "defi.max.train.accelerator": "2",
    }


def test_the_report_shows_nodes_by_type_and_what_waits() -> None:
    def node(node_type: str, used: float) -> NodeInfo:
        usage = NodeUsage([ResourceUsage("CPU", 2.0, used)], 0)
        return NodeInfo(node_type, node_type, "1", "127.0.0.1", resource_usage=usage)

    demand = RayTaskActorDemand([ResourceRequestByCount({"CPU": 1.0}, 3)])
    status = ClusterStatus(
        active_nodes=[node("decode", 1.5)],
        idle_nodes=[node("decode", 0.0)],
        pending_launches=[LaunchRequest("train", "train", 2, LaunchRequest.Status.PENDING, 0)],
        resource_demands=ResourceDemandSummary(ray_task_actor_demand=[demand]),
    )
    lines = local.report(
        status, [(0.0, "Adding 2 node(s) of type train.")], Path("/logs/monitor.log")
    ).splitlines()
    assert next(line for line in lines if line.startswith("decode")).split() == [
        "decode",
        "1",
        "1",
        "0",
        "2",
        "CPU",
        "1.5/4",
    ]
    assert next(line for line in lines if line.startswith("train")).split() == ["train", "0", "0", "2", "2"]
    assert "waits for a node: 3 x {'CPU': 1.0}" in lines
    assert lines[-2].endswith("Adding 2 node(s) of type train.")
    assert lines[-1] == "log of the autoscaler: /logs/monitor.log"


def test_an_event_that_is_repeated_at_each_round_is_shown_once(tmp_path: Path) -> None:
    cluster = LocalCluster(tmp_path)
    assert cluster.events() == []
    folder = cluster.logs / "events"
    folder.mkdir(parents=True)
    messages = ["waits", "waits", "Current cluster resources: {}", "Removing 1 nodes", "waits"]
    rows = [{"timestamp": str(number), "message": message} for number, message in enumerate(messages)]
    (folder / "event_AUTOSCALER.log").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [message for _, message in cluster.events()] == ["waits", "Removing 1 nodes", "waits"]


def test_a_taken_port_is_one_clear_error(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        cluster = LocalCluster(tmp_path / "c", port=taken.getsockname()[1])
        with pytest.raises(LocalClusterError, match=r"port \d+ of 127.0.0.1 is taken .*--port"):
            cluster.up()
    assert not (tmp_path / "c").exists()


def test_without_a_head_the_status_says_how_to_start_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "set by main")
    assert local.main(["status", "--folder", str(tmp_path), "--port", str(free_port())]) == 1
    assert "Start one with `python cluster/local.py up`" in capsys.readouterr().err


def test_an_ended_node_leaves_its_logs_and_no_copy_of_the_code(tmp_path: Path) -> None:
    for name in ("logs", "runtime_resources/working_dir_files"):
        (tmp_path / name).mkdir(parents=True)
    ended: list[dict[str, bool]] = []
    node = SimpleNamespace(
        kill_all_processes=lambda **how: ended.append(how), get_session_dir_path=lambda: str(tmp_path)
    )
    LocalNodes.__new__(LocalNodes)._terminate_node({"node": node})
    assert ended and [path.name for path in tmp_path.iterdir()] == ["logs"]


def test_a_token_file_that_is_not_there_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "absent"))
    assert local.main(["status", "--folder", str(tmp_path)]) == 1
    assert f"RAY_AUTH_TOKEN_PATH={tmp_path / 'absent'} is not there" in capsys.readouterr().err


def test_what_a_dead_head_has_left_is_found_and_ended_and_nothing_else(tmp_path: Path) -> None:
    sleep = [sys.executable, "-c", "import time; time.sleep(60)"]
    named = subprocess.Popen([*sleep, f"{tmp_path}/a/ray/session_1/logs"])
    marked = subprocess.Popen(sleep, env=os.environ | {local.FOLDER_VARIABLE: str(tmp_path / "a")})
    other = subprocess.Popen([*sleep, f"{tmp_path}/ab/ray/session_1/logs"])
    reader = subprocess.Popen(
        [*sleep, f"{tmp_path}/a/ray/session_latest/logs/monitor.log"]
    )  # named by `status`
    try:
        assert LocalCluster(tmp_path / "a").down() == 2
        assert not psutil.pid_exists(named.pid) and not psutil.pid_exists(marked.pid)
        assert other.poll() is None and reader.poll() is None
    finally:
        for process in (named, marked, other, reader):
            process.kill()
            process.wait()


DRIVER = """
import ray
ray.init(log_to_driver=False)
node = ray.remote(lambda: ray.get_runtime_context().get_node_labels()["defi.role"])
decode = node.options(num_cpus=1, label_selector={"defi.role": "decode"})
train = node.options(num_cpus=1, resources={"accelerator": 1}, label_selector={"defi.role": "train"})
print(*ray.get([decode.remote(), train.remote()]))
"""


@pytest.mark.slow
def test_nodes_come_for_labelled_work_and_a_dead_head_is_replaced() -> None:
    folder = Path(
        tempfile.mkdtemp(prefix="defi-")
    )  # short: pytest's own folders are too deep for Ray's sockets
    ports = free_port(), free_port()
    cluster = LocalCluster(folder, *ports)
    options = f" --folder {folder} --port {ports[0]} --dashboard-port {ports[1]}"
    up, status, down = (
        [sys.executable, *shlex.split(line + options)[1:]]
        for line in commands("On a cluster")
        if line.startswith("python cluster/local.py")
    )
    try:
        printed = run(up)
        assert printed.startswith("started at 127.0.0.1:")
        variables = dict(part.split("=", 1) for part in printed.split("export ")[1].split())
        assert run([sys.executable, "-c", DRIVER], **variables).split() == ["decode", "train"]
        assert "Adding 1 node(s) of type train." in run(status)
        outside = {
            (process.name(), listening.laddr)
            for process in cluster.processes()
            for listening in process.net_connections("tcp")
            if listening.status == psutil.CONN_LISTEN and not listening.laddr.ip.endswith("127.0.0.1")
        }
        assert outside == set(), "open to other machines"
        assert run(up).startswith("was up already")
        for process in cluster.head_processes().values():
            process.kill()
        printed = run(up)
        assert "processes that an earlier head had left" in printed and "started at" in printed
        assert run(status).splitlines()[2].split()[:4] == ["decode", "0", "0", "0"]
    finally:
        run(down)
        assert list(cluster.processes()) == []
        shutil.rmtree(folder)


def run(command: list[str], **variables: str) -> str:
    """Runs a command of the cluster in the checkout. Returns: what it printed."""
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("RAY_")
    } | variables
    done = subprocess.run(
        command, env=environment, cwd=REPOSITORY, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
