"""The answer of a listener itself: HTTP 503 in words, for plain requests and websocket handshakes, with TLS or without."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl

from defi_platform.errors import one_line

RETRY_AFTER_S = 2
_HEAD_LIMIT, _PATIENCE_S = 16 * 1024, 2.0


async def refuse(connection: socket.socket, words: str, tls: ssl.SSLContext | None) -> None:
    """Reads the head of the request, answers 503 with `Retry-After` and closes.

    Args:
        connection: accepted, nothing read from it yet; closed in the end.
        words: why, for the client.
        tls: of the server; None: plain.
    """
    body = f"{one_line(ValueError(words))}\n".encode()
    head = (
        "HTTP/1.1 503 Service Unavailable\r\nContent-Type: text/plain; charset=utf-8\r\n"
        f"Content-Length: {len(body)}\r\nRetry-After: {RETRY_AFTER_S}\r\nConnection: close\r\n\r\n"
    )
    writer: asyncio.StreamWriter | None = None
    # A client that says nothing, or goes, has not earned more than this.
    with contextlib.suppress(OSError, ValueError, TimeoutError, asyncio.IncompleteReadError):
        async with asyncio.timeout(_PATIENCE_S):
            reader, writer = await _streams(connection, tls)
            # Closing with bytes unread would reset the connection, and the answer with it.
            with contextlib.suppress(asyncio.LimitOverrunError):
                await reader.readuntil(b"\r\n\r\n")
            writer.write(head.encode() + body)
            await writer.drain()
            if writer.can_write_eof():
                writer.write_eof()
                while await reader.read(_HEAD_LIMIT):
                    pass
    if writer is not None:
        writer.close()
    else:
        connection.close()


async def _streams(
    connection: socket.socket, tls: ssl.SSLContext | None
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(limit=_HEAD_LIMIT, loop=loop)
    protocol = asyncio.StreamReaderProtocol(reader, loop=loop)
    transport, _ = await loop.connect_accepted_socket(
        lambda: protocol, connection, ssl=tls, ssl_handshake_timeout=_PATIENCE_S if tls else None
    )
    return reader, asyncio.StreamWriter(transport, protocol, reader, loop)
