"""The listening sockets of a listener, and what they need of the machine."""

from __future__ import annotations

import contextlib
import hashlib
import os
import resource
import socket
import struct
from pathlib import Path

BACKLOG = 4096


def open_port(host: str, port: int) -> socket.socket:
    """A listening socket at host:port; 0 picks a free port.

    Raises:
        OSError: the port or the address cannot be had.
    """
    family, kind, protocol, _, address = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM)[0]
    listening = socket.socket(family, kind, protocol)
    try:
        # A connection that has just been closed does not hold the port.
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Accepted sockets inherit it: no answer waits for the acknowledgement of the one before.
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        listening.bind(address)
        listening.listen(BACKLOG)
        listening.setblocking(False)
    except OSError:
        listening.close()
        raise
    return listening


def only_one(path: Path) -> socket.socket:
    """A mark that the listener of `path` runs; gone with its process, or when it is closed.

    Raises:
        OSError: another one runs.
    """
    name = hashlib.sha256(os.fsencode(path)).hexdigest()
    mark = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        mark.bind(f"\0defi-serve-{name}")  # in no file system: nothing is left of it
    except OSError as error:
        mark.close()
        raise OSError(error.errno, f"another listener of this deployment runs at {path}") from error
    return mark


def allow_many_files() -> None:
    """Raises this process's limit of open files as far as it may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def same_user(connection: socket.socket) -> bool:
    """Whether the process at the other end of a Unix socket runs as this user."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return int(struct.unpack("3i", credentials)[1]) == os.getuid()
