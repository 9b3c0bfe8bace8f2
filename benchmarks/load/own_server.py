"""Our server around the policy that sleeps (POLICY=nano: a real one), without Ray: prints its port, and the processes that it consists of.

    python benchmarks/load/own_server.py REPLICAS

REPLICAS 0: sockets and policy in this process, as in a replica, without a listener. From 1 on: a listener and so
many replicas, a process each, as on a node. Ends with its standard input.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from defi_platform.config import LimitsConfig, SecurityConfig
from defi_platform.serve.connections.server import SocketServer
from defi_platform.serve.http.app import http_app
from defi_platform.serve.inference.service import ActionService, ServiceSettings
from defi_platform.serve.listener.link import ReplicaLink
from defi_platform.serve.listener.listener import Listener, ListenerSettings
from defi_platform.serve.listener.relay import SECRET_BYTES
from defi_platform.serve.observation import Observation, PolicySpec
from load import peers, wires

DIGEST, SECRET = "0" * 16, b"s" * SECRET_BYTES
SPEC = PolicySpec(
    policy="sleeps",
    preset="nano",
    cameras=tuple(wires.CAMERAS),
    image_size=wires.IMAGE_SIZE,
    state_dim=wires.STATE_DIM,
    action_dim=wires.ACTION_DIM,
    chunk=wires.CHUNK,
)


def forward(observations: list[Observation]) -> Sequence[np.ndarray]:
    """Sleeps, then answers each observation with its own state."""
    peers.sleep_like_a_policy(len(observations))
    return [peers.chunk(each.state) for each in observations]


def service_that_sleeps() -> ActionService:
    """Around `forward`."""
    return ActionService(forward, SPEC, DIGEST, ServiceSettings(max_batch_size=64))


def service_of_nano() -> ActionService:
    """Around a nano policy with random weights and the cameras of the load, as a replica loads it."""
    from defi_models import presets
    from defi_models.policy import DeFIPolicy
    from defi_platform.serve.inference.forward import PolicyForward

    with tempfile.TemporaryDirectory() as folder:
        policy = DeFIPolicy(presets.policy("nano", views=len(wires.CAMERAS), cameras=list(wires.CAMERAS)))
        loaded = PolicyForward(str(policy.save_pretrained(folder)), threads=1)
    return ActionService(loaded, loaded.spec, DIGEST, warm_up=loaded.warm_up)


class Replica:
    """What a `ReplicaLink` needs: the sockets of this process, with the service's numbers in their load."""

    def __init__(self) -> None:
        service = service_of_nano() if os.environ.get("POLICY") == "nano" else service_that_sleeps()
        self._service = service
        self.server = SocketServer(
            service, http_app(service), limits=LimitsConfig(), security=SecurityConfig()
        )
        self.adopt, self.move, self.close = self.server.adopt, self.server.move, self.server.close
        self.server.start()

    def load(self) -> dict[str, Any]:
        """Of the sockets and of the service."""
        return {**self.server.load(), "service": asdict(self._service.snapshot())}


def alone() -> None:
    """Serves in this process, without a listener, until standard input ends."""
    replica = Replica()
    listener = socket.create_server(("127.0.0.1", 0), backlog=1024)

    def accept() -> None:
        while True:
            replica.adopt(listener.accept()[0], None)

    threading.Thread(target=accept, daemon=True).start()
    print(f"port {listener.getsockname()[1]}", flush=True)
    sys.stdin.read()
    replica.close("the benchmark is over")


def behind_listener(path: str) -> None:
    """Serves sockets that the listener at `path` passes, until standard input ends."""
    identity = {
        "replica": str(os.getpid()),
        "generation": 1,
        "digest": DIGEST,
        "application": "benchmark",
        "metadata": {},
        "token": SECRET,
        "movable": True,
    }
    link = ReplicaLink(Path(path), identity, Replica(), lambda: None)
    link.start()
    if not link.wait_until_registered(60):
        raise SystemExit(f"the listener at {path} does not answer")
    print("registered", flush=True)
    sys.stdin.read()


def several(replicas: int) -> None:
    """A listener in this process and replicas in others, until standard input ends."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "listener"
        listener = Listener(ListenerSettings("127.0.0.1", 0, SECRET), path)
        listener.start()
        command = [sys.executable, __file__, "behind", str(path)]
        processes = [
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            for _ in range(replicas)
        ]
        for process in processes:
            assert process.stdout is not None and process.stdout.readline() == "registered\n"
        print(
            "port", listener.state()["port"], os.getpid(), *(process.pid for process in processes), flush=True
        )
        sys.stdin.read()
        for process in processes:
            process.terminate()
            process.wait()
        listener.stop()


if __name__ == "__main__":
    if sys.argv[1] == "behind":
        behind_listener(sys.argv[2])
    elif sys.argv[1] == "0":
        alone()
    else:
        several(int(sys.argv[1]))
