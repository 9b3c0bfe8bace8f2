"""A cluster of several raylets on this machine that starts and stops nodes by itself, as one in a cloud does.

    python cluster/local.py up|down|status [--folder FOLDER] [--port 6379] [--dashboard-port 8265]

Its node types are those of local_cluster.yaml. Everything listens on loopback and asks for Ray's token.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml

NODE_TYPES = Path(__file__).with_name("local_cluster.yaml")
ROOTS = [str(Path(__file__).resolve().parents[1] / folder) for folder in ("platform", "")]
HEAD_TYPE = "ray.head.default"
HEAD_NODE = "f" * 51 + "00000"
"""Node id that Ray's provider gives to the head."""
FOLDER_VARIABLE = "DEFI_LOCAL_CLUSTER"
"""Set for all processes of a cluster, to its folder."""
LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
"""Without this Ray takes the machine's outer address for its nodes, and for 127.0.0.1 when a driver connects."""
HEAD_PROCESSES = ("gcs/gcs_server", "autoscaler/v2/monitor.py", "dashboard/dashboard.py", "raylet/raylet")
STARTS = 3
"""Attempts to start a head."""
STOP_S, ANSWER_S, START_S = 10.0, 10, 120.0
SHOWN_EVENTS = 8


class LocalClusterError(Exception):
    """A local cluster that cannot be started or does not answer."""


@dataclass(frozen=True)
class LocalCluster:
    """One cluster of this machine; whether it is up is seen from its processes.

    Attributes:
        folder: of its sessions and logs. Short: Ray puts sockets below it, whose paths have 107 characters at most.
        port: of the head (GCS).
        dashboard_port: of the dashboard, which takes jobs.
    """

    folder: Path
    port: int = 6379
    dashboard_port: int = 8265

    @property
    def address(self) -> str:
        """Address for `ray.address` and RAY_ADDRESS."""
        return f"127.0.0.1:{self.port}"

    @property
    def url(self) -> str:
        """URL for `ray job submit --address`."""
        return f"http://127.0.0.1:{self.dashboard_port}"

    @property
    def logs(self) -> Path:
        """Folder of the newest session's logs; monitor.log is the autoscaler's."""
        return self.folder / "ray" / "session_latest" / "logs"

    def up(self) -> bool:
        """Starts the cluster, after it has ended what a dead head has left. Returns: False where it was up.

        Raises: LocalClusterError when a port is taken or Ray does not start.
        """
        if not self._missing():
            return False
        left = self.down()
        if left:
            print(f"ended {left} processes that an earlier head had left")
        for port in (self.port, self.dashboard_port):
            _check_free(port)
        self.folder.mkdir(parents=True, exist_ok=True)
        for session in sorted((self.folder / "ray").glob("session_2*"))[:-1]:
            shutil.rmtree(session, ignore_errors=True)  # the newest one's logs say what its head died of
        for node in self.folder.glob("n[0-9]*"):
            shutil.rmtree(node, ignore_errors=True)
        config = self.folder / "cluster.yaml"
        config.write_text(yaml.safe_dump(node_types(self.address, self.folder)))
        for attempt in range(1, STARTS + 1):
            try:
                self._start(config)
                break
            except LocalClusterError as error:
                self.down()
                # Ray's own limit for its parts, half a minute, is short on a busy machine.
                if attempt == STARTS:
                    raise
                print(f"{error}\nonce more:", file=sys.stderr, flush=True)
        return True

    def down(self) -> int:
        """Ends all processes of the cluster. Returns: how many there were."""
        found = list(self.processes())
        # First the one that would start further nodes.
        found.sort(key=lambda process: "monitor.py" not in _command(process))
        for process in found:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.terminate()
        _, alive = psutil.wait_procs(found, timeout=STOP_S)
        for process in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(alive, timeout=STOP_S)
        return len(found)

    def processes(self) -> Iterator[psutil.Process]:
        """Yields every process of the cluster: of the head, of all nodes, and what runs on them."""
        own = {os.getpid(), *(parent.pid for parent in psutil.Process().parents())}
        seen: set[int] = set()
        for process in psutil.process_iter():
            if process.pid in own or not self._owns(process):
                continue
            with contextlib.suppress(psutil.NoSuchProcess):
                for one in (process, *process.children(recursive=True)):
                    if one.pid not in seen and one.pid not in own:
                        seen.add(one.pid)
                        yield one

    def _owns(self, process: psutil.Process) -> bool:
        # A worker's command is its title; one that has lost its raylet has only the variable.
        with contextlib.suppress(psutil.Error):
            if re.search(rf"{re.escape(str(self.folder))}/(ray|n\d+)/session_\d", _command(process)):
                return True
            return process.environ().get(FOLDER_VARIABLE) == str(self.folder)
        return False

    def head_processes(self) -> dict[str, psutil.Process]:
        """The head's processes by name, as far as they live."""
        found = {}
        for process in self.processes():
            command = _command(process)
            for name in HEAD_PROCESSES:
                if name in command and ("raylet" not in name or HEAD_NODE in command):
                    found[name] = process
        return found

    def _missing(self) -> list[str]:
        alive = self.head_processes()
        return [name for name in HEAD_PROCESSES if name not in alive]

    def node_processes(self, node_type: str) -> dict[str, psutil.Process]:
        """The raylets of the nodes of a type by node id, oldest first."""
        status = self.cluster_status()
        nodes = (*status.active_nodes, *status.idle_nodes)
        ids = [node.node_id for node in nodes if node.ray_node_type_name == node_type]
        raylets = [(p, _command(p)) for p in self.processes()]
        return {
            node: process
            for node in sorted(filter(None, ids))
            for process, command in raylets
            if "raylet/raylet" in command and node in command
        }

    def _start(self, config: Path) -> None:
        command = [
            sys.executable, "-m", "ray.scripts.scripts", "start", "--head", f"--port={self.port}",
            "--num-cpus=0", "--num-gpus=0", f"--object-store-memory={128 << 20}", f"--labels={head_labels()}",
            "--dashboard-host=127.0.0.1", f"--dashboard-port={self.dashboard_port}",
            # Any free ports, since others' Rays may be here too.
            "--min-worker-port=0", "--max-worker-port=0", "--dashboard-agent-listen-port=0",
            f"--ray-client-server-port={_free_port()}", "--disable-usage-stats",
            f"--temp-dir={self.folder / 'ray'}", f"--autoscaling-config={config}",
        ]  # fmt: skip
        environment = os.environ | {
            FOLDER_VARIABLE: str(self.folder),
            # A job's command begins with `python`: this one, which has what it needs.
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
            "PYTHONPATH": os.pathsep.join([*ROOTS, *filter(None, [os.environ.get("PYTHONPATH")])]),
            "RAY_FAKE_CLUSTER": "1",
            "RAY_enable_autoscaler_v2": "1",
            "RAY_CLOUD_INSTANCE_ID": HEAD_NODE,
            "AUTOSCALER_UPDATE_INTERVAL_S": "1",
            # Each node has an agent that measures all processes; they all have the cores of this machine.
            "REPORTER_UPDATE_INTERVAL_MS": "15000",
            **LOOPBACK,
            **token_environment(),
        }
        for name in ("RAY_ADDRESS", "RAY_OVERRIDE_NODE_ID_FOR_TESTING"):
            environment.pop(name, None)
        log = self.folder / "start.log"
        with log.open("w") as output:
            try:
                code = subprocess.run(
                    command, env=environment, stdout=output, stderr=output, timeout=START_S
                ).returncode
            except subprocess.TimeoutExpired:
                code = None
        if code != 0:
            how = f"ended with code {code}" if code is not None else f"took more than {START_S:.0f} s"
            raise LocalClusterError(f"`ray start` {how}; {log} says why:\n{log.read_text()[-2000:]}")
        # The autoscaler reads its configuration after `ray start` has returned.
        deadline = time.monotonic() + START_S
        while not (self.logs / "events" / "event_AUTOSCALER.log").exists():
            missing = self._missing()
            if missing or time.monotonic() > deadline:
                logs = "".join(file.read_text()[-2000:] for file in self.logs.glob("monitor.*"))
                raise LocalClusterError(f"{', '.join(missing) or 'the autoscaler'} did not start:\n{logs}")
            time.sleep(0.5)

    def cluster_status(self) -> Any:
        """What the autoscaler reports (`ray.autoscaler.v2.schema.ClusterStatus`).

        Raises: LocalClusterError when the head does not answer.
        """
        from ray.autoscaler.v2.sdk import get_cluster_status

        try:
            # Ray's client would wait for long, and end the process.
            socket.create_connection(("127.0.0.1", self.port), timeout=ANSWER_S).close()
            return get_cluster_status(self.address, timeout=ANSWER_S)
        except Exception as error:
            raise LocalClusterError(
                f"no head answers at {self.address}: {str(error).splitlines()[0]} "
                f"Start one with `python cluster/local.py up`; logs of the last one: {self.logs}"
            ) from error

    def events(self) -> list[tuple[float, str]]:
        """The autoscaler's events of this session, oldest first: Unix time and text."""
        file = self.logs / "events" / "event_AUTOSCALER.log"
        if not file.exists():
            return []
        found: list[tuple[float, str]] = []
        for line in filter(None, file.read_text().splitlines()):
            row = json.loads(line)
            # At each of its rounds the autoscaler repeats what cannot be met yet; resources are in the table.
            repeated = found and found[-1][1] == row["message"]
            if not repeated and not row["message"].startswith("Current cluster resources"):
                found.append((float(row["timestamp"]), row["message"]))
        return found

    def status(self) -> str:
        """The nodes by type, the demand that waits, the autoscaler's last events, and where its log is."""
        return report(self.cluster_status(), self.events(), self.logs / "monitor.log")


def report(status: Any, events: Iterable[tuple[float, str]], log: Path) -> str:
    """The text of `status`.

    Args:
        status: as `LocalCluster.cluster_status`.
        events: of the autoscaler.
        log: its file.
    """
    # Only nodes that the autoscaler has started say of which type they are.
    busy = Counter(node.ray_node_type_name or HEAD_TYPE for node in status.active_nodes)
    idle = Counter(node.ray_node_type_name or HEAD_TYPE for node in status.idle_nodes)
    starting = Counter(node.ray_node_type_name for node in status.pending_nodes)
    for launch in status.pending_launches:
        starting[launch.ray_node_type_name] += launch.count
    lines = ["node type   busy  idle  starting  most  used"]
    for name, node_type in node_types()["available_node_types"].items():
        nodes = [n for n in (*status.active_nodes, *status.idle_nodes) if n.ray_node_type_name == name]
        used = Counter[str]()
        total = Counter[str]()
        for node in nodes:
            used.update(node.used_resources())
            total.update(node.total_resources())
        shown = [
            f"{r} {used[r]:g}/{total[r]:g}" for r in node_type["resources"] if r != "object_store_memory"
        ]
        most = 1 if name == HEAD_TYPE else node_type["max_workers"]
        title = "head" if name == HEAD_TYPE else name
        lines.append(
            f"{title:<10}{busy[name]:>6}{idle[name]:>6}{starting[name]:>10}{most:>6}  "
            + (", ".join(shown) if nodes else "")
        )
    demands = status.resource_demands
    waiting = [
        f"{request.count} x {request.bundle}"
        for kind in (demands.ray_task_actor_demand, demands.placement_group_demand)
        for demand in kind
        for request in demand.bundles_by_count
    ]
    lines += [f"waits for a node: {one}" for one in waiting] or ["nothing waits for a node"]
    lines += [
        f"did not start: {launch.ray_node_type_name}: {launch.details}" for launch in status.failed_launches
    ]
    lines += [
        f"{time.strftime('%H:%M:%S', time.localtime(moment))} {text}"
        for moment, text in list(events)[-SHOWN_EVENTS:]
    ]
    lines.append(f"log of the autoscaler: {log}")
    return "\n".join(lines)


def node_types(address: str = "", folder: Path = Path()) -> dict[str, Any]:
    """The autoscaler's configuration, for a head at `address` and nodes with their sessions below `folder`."""
    config: dict[str, Any] = yaml.safe_load(NODE_TYPES.read_text())
    config["provider"] |= {"gcs_address": address, "head_node_id": HEAD_NODE, "folder": str(folder)}
    return config


def head_labels() -> str:
    """Labels of the head, by which jobs know the nodes that the autoscaler can add (`defi_platform.roles`)."""
    most: Counter[str] = Counter()
    for node_type in node_types()["available_node_types"].values():
        role = node_type.get("labels", {}).get("defi.role")
        for resource, amount in node_type["resources"].items() if role else ():
            if resource != "object_store_memory":
                most[f"defi.max.{role}.{resource}"] += amount * node_type["max_workers"]
    return ",".join(f"{label}={amount}" for label, amount in most.items())


def token_environment() -> dict[str, str]:
    """Variables by which Ray asks for a token; one is made where the user names none. Raises: LocalClusterError."""
    if not os.environ.get("RAY_AUTH_TOKEN"):
        named = os.environ.get("RAY_AUTH_TOKEN_PATH")
        if named and not Path(named).exists():
            raise LocalClusterError(f"RAY_AUTH_TOKEN_PATH={named} is not there: write one or unset it.")
        if not named and not (Path.home() / ".ray" / "auth_token").exists():
            subprocess.run(
                [sys.executable, "-m", "ray.scripts.scripts", "get-auth-token", "--generate"],
                check=True,
                stdout=subprocess.DEVNULL,  # it prints the token
            )
    return {"RAY_AUTH_MODE": "token"}


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def _check_free(port: int) -> None:
    try:
        # As servers do, so that connections of the cluster before this one do not count.
        with socket.create_server(("127.0.0.1", port), reuse_port=False):
            pass
    except OSError as error:
        raise LocalClusterError(
            f"port {port} of 127.0.0.1 is taken ({error.strerror}), perhaps by another Ray. "
            "Stop that, or choose other ports with --port and --dashboard-port."
        ) from error


def _free_port() -> int:
    """A port for Ray's client server, which cannot be left out and whose own one may be another Ray's."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def default_folder() -> Path:
    """Folder of this user's local cluster."""
    return Path(tempfile.gettempdir()) / f"defi-cluster-{os.getuid()}"


def main(argv: list[str] | None = None) -> int:
    """Runs one command. Returns: the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("command", choices=["up", "down", "status"])
    parser.add_argument(
        "--folder", type=Path, default=default_folder(), help="sessions and logs; a short path"
    )
    parser.add_argument("--port", type=int, default=6379, help="of the head")
    parser.add_argument("--dashboard-port", type=int, default=8265, help="of the dashboard, which takes jobs")
    arguments = parser.parse_args(argv)
    cluster = LocalCluster(arguments.folder.resolve(), arguments.port, arguments.dashboard_port)
    try:
        if arguments.command == "down":
            print(f"ended {cluster.down()} processes")
        elif arguments.command == "status":
            os.environ |= token_environment()
            print(cluster.status())
        else:
            print(
                "started" if cluster.up() else "was up already",
                f"at {cluster.address}, dashboard {cluster.url}",
            )
            values = token_environment() | LOOPBACK
            values |= {"RAY_ADDRESS": cluster.address, "RAY_API_SERVER_ADDRESS": cluster.url}
            print("export", *(f"{name}={value}" for name, value in values.items()))
    except LocalClusterError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
