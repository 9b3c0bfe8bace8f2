"""A real S3 server process (moto), and a proxy before it that resets and throttles connections."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

# Benchmarks use this module as well.
sys.path.append(str(Path(__file__).parents[1]))
from ports import free_port


@contextlib.contextmanager
def s3_server(port: int = 0, filled: tuple[str, int] | None = None, **environment: str) -> Iterator[str]:
    """Yields the endpoint of a moto server in another process, on a free port unless one is given.

    Args:
        filled: a bucket that is there already and how many objects it holds; see filled_s3_server.py.
    """
    port = port or free_port()
    program = ["-m", "moto.server"]
    if filled:
        program = [str(Path(__file__).with_name("filled_s3_server.py")), *map(str, filled)]
    process = subprocess.Popen(
        [sys.executable, *program, "-H", "127.0.0.1", "-p", str(port)],
        env=os.environ | environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        endpoint = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + 60
        while True:
            try:
                urllib.request.urlopen(f"{endpoint}/moto-api/", timeout=5).close()
                break
            except (urllib.error.URLError, OSError):
                if time.monotonic() > deadline or process.poll() is not None:
                    raise
                time.sleep(0.2)
        yield endpoint
    finally:
        process.terminate()
        process.wait()


EVERYTHING = (b"GET", b"PUT", b"HEAD", b"POST", b"DELETE")
"""For `FlakyProxy.refuse`: the store is unavailable."""


class FlakyProxy:
    """Passes connections on to `port`, except every so many, which it resets or answers with 503 Slow Down.

    Requests that start with `refuse` are always reset.
    """

    SLOW_DOWN = (
        b"HTTP/1.1 503 Slow Down\r\nContent-Type: application/xml\r\nContent-Length: 94\r\nConnection: close\r\n\r\n"
        b'<?xml version="1.0"?><Error><Code>SlowDown</Code><Message>Reduce your rate.</Message></Error>\n'
    )

    def __init__(
        self,
        port: int,
        reset_every: int = 0,
        throttle_every: int = 0,
        refuse: bytes | tuple[bytes, ...] = b"",
    ) -> None:
        self._target = port
        self._reset_every, self._throttle_every = reset_every, throttle_every
        self.refuse = refuse
        self.resets = self.throttles = self.refused = self._connections = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _serve(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._connection, args=(client,), daemon=True).start()

    def _connection(self, client: socket.socket) -> None:
        self._connections += 1
        with client, contextlib.suppress(OSError):
            if self._reset_every and self._connections % self._reset_every == 0:
                self.resets += 1
                self._reset(client)
                return
            request = self._request(client)
            if not request:
                return
            if self.refuse and request.startswith(self.refuse):
                self.refused += 1
                self._reset(client)
                return
            if self._throttle_every and self._connections % self._throttle_every == 0:
                self.throttles += 1
                client.sendall(self.SLOW_DOWN)
                return
            with socket.create_connection(("127.0.0.1", self._target)) as server:
                # One request per connection, so that every request meets the proxy's moods.
                server.sendall(request.replace(b"\r\n", b"\r\nConnection: close\r\n", 1))
                while part := server.recv(1 << 16):
                    self.count(part)
                    client.sendall(part)

    @staticmethod
    def _reset(client: socket.socket) -> None:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")

    def count(self, part: bytes) -> None:
        """Sees every part of an answer."""

    @staticmethod
    def _request(client: socket.socket) -> bytes:
        data = b""
        while b"\r\n\r\n" not in data:
            part = client.recv(1 << 16)
            if not part:
                return b""
            data += part
        head, _, body = data.partition(b"\r\n\r\n")
        length = next(
            (
                int(line.split(b":")[1])
                for line in head.split(b"\r\n")
                if line.lower().startswith(b"content-length:")
            ),
            0,
        )
        if b"100-continue" in head.lower():
            # The client holds its body back until it is asked for it.
            client.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
            head = b"\r\n".join(
                line for line in head.split(b"\r\n") if not line.lower().startswith(b"expect:")
            )
        while len(body) < length:
            part = client.recv(1 << 16)
            if not part:
                return b""
            body += part
        return head + b"\r\n\r\n" + body
