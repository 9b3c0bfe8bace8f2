"""Sockets in front of a policy that only sleeps: the serving path without Ray and without a model."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, cast

import numpy as np
from websockets.frames import Frame, Opcode

from defi_platform.config import LimitsConfig, SecurityConfig
from defi_platform.serve.connections.server import SocketServer
from defi_platform.serve.inference.service import ActionService
from defi_platform.serve.observation import Answer, Observation, PolicySpec
from defi_platform.serve.refusals import Refusal

SPEC = PolicySpec(
    policy="sleeping",
    preset="none",
    cameras=("front",),
    image_size=(8, 8),
    state_dim=0,
    action_dim=4,
    chunk=2,
)


class SleepingService:
    """Answers each observation after `sleep_s` with the seed in every action, so that answers cannot be confused."""

    def __init__(self, sleep_s: float = 0.0, digest: str = "d0") -> None:
        self.spec, self.digest, self.sleep_s = SPEC, digest, sleep_s
        self.asked, self.given_up, self.chunk = 0, 0, 2
        self.go = asyncio.Event()
        """Answers wait for it, where it is not set."""
        self.go.set()
        self.refusals: Counter[str] = Counter()
        self.decoded_ms: list[float] = []

    def metadata(self) -> dict[str, Any]:
        return {**SPEC.metadata(), "policy_digest": self.digest}

    def count(self, refusal: Refusal) -> None:
        self.refusals[refusal.reason] += 1

    def decoded(self, milliseconds: float) -> None:
        self.decoded_ms.append(milliseconds)

    async def act(self, observation: Observation, **options: Any) -> Answer:
        self.asked += 1
        try:
            await asyncio.sleep(self.sleep_s)
            await self.go.wait()
        except asyncio.CancelledError:
            self.given_up += 1
            raise
        actions = np.full((self.chunk, 4), observation.seed, np.float32)
        return Answer(actions, queue_ms=0.0, infer_ms=self.sleep_s * 1e3, batch_size=1)


async def app(scope: Any, receive: Any, send: Any) -> None:
    """An HTTP application that says how many bytes it got."""
    size, more = 0, True
    while more:
        message = await receive()
        size, more = size + len(message.get("body", b"")), message.get("more_body", False)
    body = f"{scope['path']} {size}".encode()
    headers = [(b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


class Place:
    """An address that passes connections on, as the listener does, and the replica that takes them now."""

    def __init__(self, server: SocketServer, service: SleepingService) -> None:
        self.server, self.service = server, service
        self._listening = socket.create_server(("127.0.0.1", 0), backlog=2048)
        self.port: int = self._listening.getsockname()[1]
        self.url = f"ws://127.0.0.1:{self.port}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                accepted, _ = self._listening.accept()
                self.server.adopt(accepted)

    def hold(self) -> None:
        """From now on no answer is given before `answer`."""
        self.service.go.clear()

    def answer(self) -> None:
        """Gives the answers that are held back, and those to come at once."""
        self.server.loop.call_soon_threadsafe(self.service.go.set)

    def stop(self) -> None:
        self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        self.server.close("the test is over", timeout_s=0.2)


def replica(service: SleepingService, **settings: Any) -> SocketServer:
    """A started replica; settings are fields of LimitsConfig and SecurityConfig, and max_connections."""
    limits, security = LimitsConfig(), SecurityConfig()
    room, on_stall = settings.pop("max_connections", 100), settings.pop("on_stall", None)
    for name, value in settings.items():
        setattr(security if hasattr(security, name) else limits, name, value)
    server = SocketServer(
        cast(ActionService, service),
        app,
        limits=limits,
        security=security,
        max_connections=room,
        on_stall=on_stall,
    )
    server.start()
    return server


@contextlib.contextmanager
def serving(sleep_s: float = 0.0, **settings: Any) -> Iterator[Place]:
    """A replica behind an address, for the length of a with block."""
    service = SleepingService(sleep_s)
    place = Place(replica(service, **settings), service)
    try:
        yield place
    finally:
        place.stop()


def observation(seed: int, size: int = 8) -> dict[str, Any]:
    """What `SPEC` takes; the answer's actions are all `seed`."""
    image = np.zeros((size, size, 3), np.uint8)
    return {"observation/images/front": image, "prompt": "open the drawer", "seed": seed}


def until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.005)


HANDSHAKE = (
    b"GET / HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: MDEyMzQ1Njc4OWFiY2RlZg==\r\n\r\n"
)


def raw(place: Place) -> socket.socket:
    """A TCP connection after its handshake and greeting, to send what no client would."""
    sock = socket.create_connection(("127.0.0.1", place.port), timeout=60)
    sock.sendall(HANDSHAKE)
    received = b""
    while b"\r\n\r\n" not in received:
        received += sock.recv(1)
    assert received.startswith(b"HTTP/1.1 101")
    _, size = sock.recv(2, socket.MSG_WAITALL)
    assert size <= 126, "the greeting is a short frame"
    if size == 126:
        size = int.from_bytes(sock.recv(2, socket.MSG_WAITALL), "big")
    assert len(sock.recv(size, socket.MSG_WAITALL)) == size
    return sock


def frame(data: bytes, opcode: Opcode = Opcode.BINARY, fin: bool = True) -> bytes:
    return Frame(opcode, data, fin).serialize(mask=True)
