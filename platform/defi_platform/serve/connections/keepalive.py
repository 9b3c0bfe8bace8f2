"""TCP's keepalive of the connections to clients."""

from __future__ import annotations

import socket

_KEEPALIVE = ((socket.TCP_KEEPIDLE, 30), (socket.TCP_KEEPINTVL, 10), (socket.TCP_KEEPCNT, 3))


def watch_over(connection: socket.socket) -> None:
    """Has the kernel end a TCP connection within a minute after its robot has lost power or its network."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in _KEEPALIVE:
        connection.setsockopt(socket.IPPROTO_TCP, option, value)
