"""Connections between the listeners of two machines: bytes are copied while a client's replica is on another machine."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import socket
from typing import Any

import msgpack

from defi_platform.serve.connections.keepalive import watch_over
from defi_platform.serve.listener.channel import MESSAGE_LIMIT

SECRET_BYTES = 32
CONNECT_PATIENCE_S = 2.0
STATE_PATIENCE_S = 10.0
"""Seconds in which the state of a session must have come."""
PASSED, RETURNED = "passed", "returned"
"""The first word of a listener to another: here is a client's connection; here comes one back that was yours."""
_CHUNK = 256 * 1024
_LENGTH_BYTES = 4
_buffer = memoryview(bytearray(_CHUNK))
"""Of all copies of this process: they run on one thread, and none waits while it holds bytes here."""


class Carriage:
    """A client of this machine whose bytes a replica of another machine reads and writes."""

    def __init__(self, client: socket.socket, remote: socket.socket) -> None:
        """Prepares to copy.

        Args:
            client: accepted here.
            remote: connected to the other listener, which has been introduced to.
        """
        self._loop = asyncio.get_running_loop()
        self._client, self._remote = client, remote
        self._returning = False
        self._news: asyncio.Future[None] | None = None
        self.address: tuple[Any, ...] = remote.getsockname()[:2]
        """By which the other listener names it."""
        self.state: asyncio.Future[dict[str, Any]] = self._loop.create_future()
        """What the client's session goes on from, where it is taken back."""
        for end in (client, remote):
            with contextlib.suppress(OSError):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                watch_over(end)

    def take_back(self) -> None:
        """Reads no more of the client; `run` ends when what the other side wrote has been copied."""
        self._returning = True
        self._wake()

    async def run(self) -> bool:
        """Copies until both ends have ended.

        Returns: whether the client has been taken back, and is open; otherwise it is closed.
        """
        copies = [asyncio.ensure_future(self._to_replica()), asyncio.ensure_future(self._to_client())]
        returned = False
        try:
            await asyncio.gather(*copies)
            returned = self._returning
        except OSError:
            pass  # a reset of one side is passed on as the close of the other
        finally:
            for copy in copies:
                copy.cancel()
            await asyncio.gather(*copies, return_exceptions=True)
            self._remote.close()
            if not returned:
                self._client.close()
        return returned

    async def _to_replica(self) -> None:
        while not self._returning:
            await self._until_readable(self._client, wakes=True)
            # Nothing may be read and then not sent on, or a client that is taken back would lose it.
            if self._returning or not await _copy(self._client, self._remote):
                break
        with contextlib.suppress(OSError):
            self._remote.shutdown(socket.SHUT_WR)

    async def _to_client(self) -> None:
        while True:
            await self._until_readable(self._remote)
            if not await _copy(self._remote, self._client):
                break
        if not self._returning:
            with contextlib.suppress(OSError):
                self._client.shutdown(socket.SHUT_WR)

    async def _until_readable(self, end: socket.socket, *, wakes: bool = False) -> None:
        news: asyncio.Future[None] = self._loop.create_future()
        if wakes:
            self._news = news
        self._loop.add_reader(end, _settle, news)
        try:
            await news
        finally:
            self._loop.remove_reader(end)

    def _wake(self) -> None:
        if self._news is not None:
            _settle(self._news)


async def connect(peer: tuple[str, int], secret: bytes, message: dict[str, Any]) -> socket.socket | None:
    """A connection to the listener of another machine, after the introduction.

    Args:
        peer: address of its relay socket.
        secret: SECRET_BYTES bytes that all listeners of a deployment know.
        message: `kind` (PASSED or RETURNED) and what belongs to it.

    Returns: None where the peer cannot be reached.
    """
    loop = asyncio.get_running_loop()
    family = socket.AF_INET6 if ":" in peer[0] else socket.AF_INET
    remote = socket.socket(family, socket.SOCK_STREAM)
    remote.setblocking(False)
    try:
        async with asyncio.timeout(CONNECT_PATIENCE_S):
            await loop.sock_connect(remote, peer)
        async with asyncio.timeout(STATE_PATIENCE_S):
            await loop.sock_sendall(remote, secret)
            await send_message(remote, message)
    except (OSError, TimeoutError):
        remote.close()
        return None
    return remote


async def introduced(connection: socket.socket, secret: bytes) -> dict[str, Any] | None:
    """Reads what another machine's listener sends first; nothing after it is read.

    Args:
        connection: accepted on the relay port.
        secret: what must come.

    Returns: its message; None where the secret did not come within CONNECT_PATIENCE_S, or no message.
    """
    with contextlib.suppress(OSError, TimeoutError, ValueError):
        async with asyncio.timeout(CONNECT_PATIENCE_S):
            received = await _exactly(connection, len(secret))
        if hmac.compare_digest(received, secret):
            return await receive_message(connection)
    return None


async def send_message(connection: socket.socket, message: dict[str, Any]) -> None:
    """Sends a map of plain values, of up to MESSAGE_LIMIT bytes."""
    packed: bytes = msgpack.packb(message)
    data = len(packed).to_bytes(_LENGTH_BYTES, "big") + packed
    await asyncio.get_running_loop().sock_sendall(connection, data)


async def receive_message(connection: socket.socket) -> dict[str, Any]:
    """Reads one message, and nothing after it.

    Raises:
        ValueError: it is no message.
        TimeoutError: it did not come within STATE_PATIENCE_S.
    """
    async with asyncio.timeout(STATE_PATIENCE_S):
        size = int.from_bytes(await _exactly(connection, _LENGTH_BYTES), "big")
        if size > MESSAGE_LIMIT:
            raise ValueError(f"a message of {size} bytes, at most {MESSAGE_LIMIT} are read")
        message = msgpack.unpackb(await _exactly(connection, size), strict_map_key=False)
    if not isinstance(message, dict):
        raise ValueError("no map")
    return message


async def rest_of(connection: socket.socket) -> bytes:
    """Everything that comes until the other end is done.

    Raises:
        TimeoutError: it is not done within STATE_PATIENCE_S.
    """
    loop = asyncio.get_running_loop()
    parts = []
    async with asyncio.timeout(STATE_PATIENCE_S):
        while part := await loop.sock_recv(connection, _CHUNK):
            parts.append(part)
    return b"".join(parts)


async def _exactly(connection: socket.socket, size: int) -> bytes:
    loop = asyncio.get_running_loop()
    received = bytearray()
    while len(received) < size:
        part = await loop.sock_recv(connection, min(_CHUNK, size - len(received)))
        if not part:
            raise ValueError("the connection ended early")
        received += part
    return bytes(received)


async def _copy(source: socket.socket, target: socket.socket) -> bool:
    """Copies what is there now. Returns: False at the end of the source."""
    try:
        count = source.recv_into(_buffer)
    except (BlockingIOError, InterruptedError):
        return True
    if not count:
        return False
    try:
        sent = target.send(_buffer[:count])
    except (BlockingIOError, InterruptedError):
        sent = 0
    if sent < count:
        await asyncio.get_running_loop().sock_sendall(target, bytes(_buffer[sent:count]))
    return True


def _settle(news: asyncio.Future[None]) -> None:
    if not news.done():
        news.set_result(None)
