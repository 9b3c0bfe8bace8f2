"""A real openpi websocket server whose policy a test writes as a function."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Callable, Dict, Optional, Union  # noqa: UP035 - defi_client's tests run on Python 3.8 too

from websockets.exceptions import ConnectionClosed
from websockets.sync.server import ServerConnection, serve

from defi_client import wire

METADATA = {
    "protocol": "openpi-websocket",
    "preset": "nano",
    "cameras": ["workspace"],
    "image_size": [64, 64],
    "state_dim": 4,
    "action_dim": 4,
    "chunk": 8,
    "policy": "test",
}

Answer = Callable[[Dict[str, Any], ServerConnection], Optional[Union[Dict[str, Any], str]]]  # noqa: UP006, UP007, UP045
"""(observation, socket) -> answer; a str is an error, None hangs up without a word."""


class PolicyServer:
    """Where it listens and what it was asked."""

    def __init__(self, url: str, stop: Callable[[], None]):
        self.url = url
        self.stop = stop
        self.observations: list[dict[str, Any]] = []


@contextmanager
def policy_server(
    answer: Answer, metadata: dict[str, Any] | None = None, port: int = 0
) -> Iterator[PolicyServer]:
    def talk(socket: ServerConnection) -> None:
        socket.send(wire.pack({**METADATA, **(metadata or {})}))
        try:
            for message in socket:
                assert isinstance(message, bytes)
                observation = wire.unpack(message)
                server.observations.append(observation)
                reply = answer(observation, socket)
                if reply is None:
                    return
                socket.send(reply if isinstance(reply, str) else wire.pack(reply))
        except ConnectionClosed:
            pass  # the client left, or its process died

    listener = serve(talk, "127.0.0.1", port, compression=None)
    server = PolicyServer(f"ws://127.0.0.1:{listener.socket.getsockname()[1]}", listener.shutdown)
    thread = threading.Thread(target=listener.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        listener.shutdown()
        thread.join()
