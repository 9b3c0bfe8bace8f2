"""A real openpi websocket server whose policy a test writes as a function."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from websockets.exceptions import ConnectionClosed
from websockets.sync.server import ServerConnection, serve

from defi_platform.serve.protocols import openpi

METADATA = {
    "protocol": openpi.PROTOCOL,
    "preset": "nano",
    "cameras": ["workspace"],
    "image_size": [64, 64],
    "state_dim": 4,
    "action_dim": 4,
    "chunk": 8,
    "policy": "test",
}

Answer = Callable[[dict[str, Any], ServerConnection], dict[str, Any] | str | None]
"""(observation, socket) -> answer; a str is an error, None hangs up without a word."""


class PolicyServer:
    """Where it listens and what it was asked."""

    def __init__(self, url: str):
        self.url = url
        self.observations: list[dict[str, Any]] = []


@contextmanager
def policy_server(answer: Answer, metadata: dict[str, Any] | None = None) -> Iterator[PolicyServer]:
    def talk(socket: ServerConnection) -> None:
        socket.send(openpi.pack({**METADATA, **(metadata or {})}))
        try:
            for message in socket:
                assert isinstance(message, bytes)
                observation = openpi.unpack(message)
                server.observations.append(observation)
                reply = answer(observation, socket)
                if reply is None:
                    return
                socket.send(reply if isinstance(reply, str) else openpi.pack(reply))
        except ConnectionClosed:
            pass  # the client left, or its process died

    listener = serve(talk, "127.0.0.1", 0, compression=None)
    server = PolicyServer(f"ws://127.0.0.1:{listener.socket.getsockname()[1]}")
    thread = threading.Thread(target=listener.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        listener.shutdown()
        thread.join()
