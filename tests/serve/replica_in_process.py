"""A replica without Ray: real sockets and every protocol, around a policy that a test writes as a function."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from defi_platform.config import LimitsConfig, SecurityConfig
from defi_platform.serve.connections.server import SocketServer
from defi_platform.serve.http.app import http_app
from defi_platform.serve.inference.service import ActionService, Forward, ServiceSettings
from defi_platform.serve.observation import Observation, PolicySpec

SPEC = PolicySpec(
    policy="test",
    preset="nano",
    cameras=("front",),
    image_size=(64, 64),
    state_dim=4,
    action_dim=4,
    chunk=10,
)
DIGEST = "0123456789abcdef"


def state_as_actions(observations: Sequence[Observation]) -> list[np.ndarray]:
    """A policy that takes 2 ms and whose actions show whose observation they answer."""
    time.sleep(0.002)
    return [np.tile(np.asarray(each.state, np.float32), (SPEC.chunk, 1)) for each in observations]


@dataclass
class Served:
    """Where it listens, and its parts."""

    port: int
    service: ActionService
    server: SocketServer
    scheme: str = "ws"

    @property
    def url(self) -> str:
        return f"{self.scheme}://127.0.0.1:{self.port}"

    @property
    def http_url(self) -> str:
        return self.url.replace("ws", "http", 1)

    def wait_until_idle(self, seconds: float = 60.0) -> None:
        """Until no socket is open."""
        deadline = time.monotonic() + seconds
        while (load := self.server.load())["websockets"] + load["https"]:
            assert time.monotonic() < deadline, load
            time.sleep(0.02)


@contextmanager
def served(
    forward: Forward = state_as_actions,
    *,
    spec: PolicySpec = SPEC,
    settings: ServiceSettings | None = None,
    limits: LimitsConfig | None = None,
    security: SecurityConfig | None = None,
    max_connections: int = 1000,
) -> Iterator[Served]:
    """Serves until the end of the block."""
    security = security or SecurityConfig()
    service = ActionService(forward, spec, DIGEST, settings)
    server = SocketServer(
        service,
        http_app(service),
        limits=limits or LimitsConfig(),
        security=security,
        max_connections=max_connections,
    )
    listener = socket.create_server(("127.0.0.1", 0), backlog=1024)

    def accept() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return  # the end of the block
            server.adopt(connection, None)

    threading.Thread(target=accept, daemon=True).start()
    server.start()
    try:
        scheme = "wss" if security.tls_cert else "ws"
        yield Served(listener.getsockname()[1], service, server, scheme)
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        server.close("the test is over", timeout_s=2.0)
