"""Connections between the listeners of two nodes: bytes are copied, for a node that has no replica of its own."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import socket
from collections.abc import Callable

from defi_platform.serve.connections.keepalive import watch_over

SECRET_BYTES = 32
CONNECT_PATIENCE_S = 2.0
_CHUNK = 256 * 1024


async def relay(
    client: socket.socket, peer: tuple[str, int], secret: bytes, connected: Callable[[], object]
) -> bool:
    """Copies bytes between a client and the listener of another node until both have ended.

    Args:
        client: accepted, nothing read from it; closed in the end, unless the peer cannot be reached.
        peer: address of the other node's relay socket.
        secret: SECRET_BYTES bytes that all listeners of a deployment know.
        connected: called once the peer has been reached.

    Returns: False where the peer cannot be reached.
    """
    loop = asyncio.get_running_loop()
    family = socket.AF_INET6 if ":" in peer[0] else socket.AF_INET
    remote = socket.socket(family, socket.SOCK_STREAM)
    remote.setblocking(False)
    try:
        async with asyncio.timeout(CONNECT_PATIENCE_S):
            await loop.sock_connect(remote, peer)
            await loop.sock_sendall(remote, secret)
    except (OSError, TimeoutError):
        remote.close()
        return False
    connected()
    for end in (client, remote):
        with contextlib.suppress(OSError):
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            watch_over(end)
    copies = [asyncio.ensure_future(_copy(client, remote)), asyncio.ensure_future(_copy(remote, client))]
    try:
        await asyncio.gather(*copies)
    except OSError:
        pass  # a reset of one side is passed on as the close of the other
    finally:
        for copy in copies:
            copy.cancel()
        await asyncio.gather(*copies, return_exceptions=True)
        client.close()
        remote.close()
    return True


async def introduced(connection: socket.socket, secret: bytes) -> bool:
    """Reads the secret that another node's listener sends first; nothing after it is read.

    Args:
        connection: accepted on the relay port.
        secret: what must come.

    Returns: whether it came within CONNECT_PATIENCE_S.
    """
    loop = asyncio.get_running_loop()
    received = b""
    with contextlib.suppress(OSError, TimeoutError):
        async with asyncio.timeout(CONNECT_PATIENCE_S):
            while len(received) < len(secret):
                part = await loop.sock_recv(connection, len(secret) - len(received))
                if not part:
                    break
                received += part
    return hmac.compare_digest(received, secret)


async def _copy(source: socket.socket, target: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    buffer = bytearray(_CHUNK)
    view = memoryview(buffer)
    while count := await loop.sock_recv_into(source, buffer):
        await loop.sock_sendall(target, view[:count])
    with contextlib.suppress(OSError):
        target.shutdown(socket.SHUT_WR)
