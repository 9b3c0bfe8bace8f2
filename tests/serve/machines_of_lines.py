"""Listeners with replicas that answer each line with their name."""

from __future__ import annotations

import secrets
import select
import socket
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from defi_platform.serve.inference.load import ServiceLoad
from defi_platform.serve.listener.link import ReplicaLink
from defi_platform.serve.listener.listener import Listener, ListenerSettings

SECRET = secrets.token_bytes(32)


class LineServer:
    """Stands for a replica's socket server: answers a line with its name and the number of lines answered so far."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.open: dict[socket.socket, int] = {}
        self._reading = threading.Lock()

    def adopt(self, sock: socket.socket, state: dict[str, Any] | None) -> None:
        sock.settimeout(60)
        self.open[sock] = state["lines"] if state else 0
        if state and state.get("unread"):
            self._answer(sock)
        threading.Thread(target=self._serve, args=(sock,), daemon=True).start()

    def load(self) -> dict[str, Any]:
        # With the numbers of a service that has answered: batches are counted by their size, a number.
        return {"sockets": len(self.open), "service": asdict(ServiceLoad(batch_sizes={1: 3, 8: 2}))}

    def move(self, count: int | None, when: str, hand_over: Callable[..., bool]) -> None:
        for sock in list(self.open)[:count]:
            with self._reading:  # between two lines
                lines = self.open.pop(sock)
            assert hand_over(sock, {"lines": lines})

    def _serve(self, sock: socket.socket) -> None:
        while True:
            try:
                select.select([sock], [], [], 0.02)
            except (OSError, ValueError):
                return  # it has moved
            with self._reading:
                if sock not in self.open:
                    return
                if not select.select([sock], [], [], 0)[0]:
                    continue
                if not sock.recv(100):
                    self.open.pop(sock)
                    sock.close()
                    return
                self._answer(sock)

    def _answer(self, sock: socket.socket) -> None:
        self.open[sock] += 1
        sock.sendall(f"{self.name} {self.open[sock]}\n".encode())


class Node:
    """One node: its listener and the replicas on it."""

    def __init__(self, folder: Path, stack: ExitStack, port: int, stalled_after_s: float = 20.0) -> None:
        host = "127.0.0.1"
        self.path = folder / "listener.sock"
        self.settings = ListenerSettings(host, port, SECRET, stalled_after_s=stalled_after_s)
        self.stack = stack

    def listen(self, stays: bool = True) -> Listener:
        listener = Listener(self.settings, self.path, stays=stays)
        listener.start()
        self.stack.callback(listener.stop)
        return listener

    def replica(self, name: str, generation: int = 1) -> tuple[LineServer, ReplicaLink]:
        server = LineServer(name)
        identity = {
            "replica": name,
            "generation": generation,
            "digest": "d" * 64,
            "application": f"policy-{generation}",
            "metadata": {"policy": name},
            "token": SECRET,
            "movable": True,
        }
        link = ReplicaLink(self.path, identity, server, lambda: None)
        link.start()
        self.stack.callback(link.stop)
        assert link.wait_until_registered(60)
        return server, link


def dial(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=60)


def ask(connection: socket.socket) -> str:
    connection.sendall(b"?\n")
    return connection.recv(100).decode().strip()


def wait(until: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not until():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)
