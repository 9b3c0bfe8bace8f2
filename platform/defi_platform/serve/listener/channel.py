"""Messages between a node's listener and its replicas: one msgpack map per packet of a Unix socket, with a socket or none."""

from __future__ import annotations

import array
import contextlib
import errno
import hashlib
import os
import signal
import socket
import stat
import struct
import tempfile
import time
from collections import deque
from pathlib import Path
from typing import Any

import msgpack

from defi_platform.errors import ServeError

PACKET_LIMIT = 128 * 1024
"""Bytes of one packet. A larger message, such as an observation that moves with its socket, lies in memory that is
passed beside it."""
MESSAGE_LIMIT = 64 * 2**20
"""Bytes of one message. A socket whose session state is larger is not moved but closed."""
_PATH_LIMIT = 107
_ABANDONED_S = 60.0
_NO_ROOM = (errno.ENOBUFS, errno.ENOMEM, errno.ETOOMANYREFS)
_EXITING = 0x4
"""Flag of a process that is being ended (PF_EXITING)."""
_IN_MEMORY = b"\xc1"
"""A packet whose message is in memory; no msgpack begins with this byte."""


class ChannelClosed(Exception):
    """The other process has ended or closed its end."""


class MessageTooLarge(ValueError):
    """A message of more than MESSAGE_LIMIT bytes, or one of values that msgpack does not know."""


class Channel:
    """One end of a connection; neither blocks nor is safe to use from two threads.

    A packet arrives whole or not at all (SOCK_SEQPACKET), so a socket and the words about it cannot be torn
    apart, and the end of the other process is seen at once.
    """

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        with contextlib.suppress(OSError):
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 * PACKET_LIMIT)
        self._connection = connection
        self._waiting: deque[tuple[bytes, socket.socket | None]] = deque()

    def fileno(self) -> int:
        """The file descriptor, for an event loop."""
        return self._connection.fileno()

    @property
    def waiting(self) -> int:
        """Messages that the kernel has not taken yet; `flush` once the descriptor is writable."""
        return len(self._waiting)

    @property
    def peer_pid(self) -> int:
        """The other process, by its number here; 0 where it is in another space of numbers."""
        credentials = self._connection.getsockopt(
            socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")
        )
        return int(struct.unpack("3i", credentials)[0])

    def kill_peer(self) -> bool:
        """Kills the other process. Returns: False where it cannot be reached from here."""
        if not self.peer_pid:
            return False
        try:
            os.kill(self.peer_pid, signal.SIGKILL)
        except OSError:
            return False
        return True

    @property
    def peer_lives(self) -> bool:
        """Whether the process that listened for this connection still runs, its end being closed or not."""
        try:
            fields = Path(f"/proc/{self.peer_pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return False
        return fields[0] not in "ZX" and not int(fields[6]) & _EXITING

    def send(self, message: dict[str, Any], passed: socket.socket | None = None) -> None:
        """Sends a message. A passed socket belongs to the other process from now on; ours is closed.

        Args:
            message: plain values.
            passed: a socket to hand over with it.

        Raises:
            MessageTooLarge: nothing was sent, and `passed` is still ours.
            ChannelClosed: likewise.
        """
        try:
            packet: bytes = msgpack.packb(message)
        except (TypeError, ValueError, OverflowError) as error:
            raise MessageTooLarge(f"not plain values: {error}") from error
        if len(packet) > MESSAGE_LIMIT:
            raise MessageTooLarge(f"{len(packet)} bytes, at most {MESSAGE_LIMIT} travel in one message")
        self.flush()
        if self._waiting or not self._sent(packet, passed):
            self._waiting.append((packet, passed))

    def flush(self) -> None:
        """Sends what waits, as far as the kernel takes it.

        Raises:
            ChannelClosed: the other end is gone; what waits stays, see `abandon`.
        """
        while self._waiting and self._sent(*self._waiting[0]):
            self._waiting.popleft()

    def receive(self) -> tuple[dict[str, Any], socket.socket | None] | None:
        """The next message and its socket; None where none has arrived.

        Raises:
            ChannelClosed: the other end is gone.
        """
        try:
            packet, descriptors, _, _ = socket.recv_fds(
                self._connection, PACKET_LIMIT, 4, socket.MSG_CMSG_CLOEXEC
            )
        except (BlockingIOError, InterruptedError):
            return None
        except OSError as error:
            raise ChannelClosed(str(error)) from error
        if not packet:
            raise ChannelClosed("end of file")
        if packet == _IN_MEMORY and descriptors:
            with open(descriptors.pop(), "rb") as memory:
                memory.seek(0)
                packet = memory.read(MESSAGE_LIMIT)
        passed = socket.socket(fileno=descriptors[0]) if descriptors else None
        if passed is not None:
            passed.setblocking(False)
        for extra in descriptors[1:]:
            os.close(extra)
        # Keys of a load report may be numbers: forward passes are counted by their size.
        try:
            return msgpack.unpackb(packet, strict_map_key=False), passed
        except ValueError as error:
            if passed is not None:
                passed.close()
            raise ChannelClosed(f"the other end sent what is no message: {error}") from error

    def abandon(self) -> list[tuple[dict[str, Any], socket.socket]]:
        """Closes this end. Returns: the sockets that were to be passed and have not left, with their messages."""
        left = [
            (msgpack.unpackb(packet, strict_map_key=False), passed)
            for packet, passed in self._waiting
            if passed is not None
        ]
        self._waiting.clear()
        self._connection.close()
        return left

    def _sent(self, packet: bytes, passed: socket.socket | None) -> bool:
        descriptors = [] if passed is None else [passed.fileno()]
        memory = _memory_of(packet) if len(packet) > PACKET_LIMIT else None
        if memory is not None:
            descriptors.append(memory)
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))]
        try:
            self._connection.sendmsg(
                [packet if memory is None else _IN_MEMORY], rights if descriptors else []
            )
        except (BlockingIOError, InterruptedError):
            return False
        except OSError as error:
            if error.errno in _NO_ROOM:
                return False
            raise ChannelClosed(str(error)) from error
        finally:
            if memory is not None:
                os.close(memory)
        if passed is not None:
            passed.close()
        return True


def _memory_of(packet: bytes) -> int:
    """A descriptor of memory that holds the bytes."""
    memory = os.memfd_create("message", os.MFD_CLOEXEC)
    with open(memory, "wb", closefd=False) as file:
        file.write(packet)
    return memory


def socket_path(secret: bytes) -> Path:
    """The address of this machine's listener: a file in a folder that only this user can enter.

    The same for all of Ray's nodes that share the machine, its ports and the folder: these need one listener.

    Args:
        secret: of the deployment; a machine may serve several clusters.

    Raises:
        ServeError: the folder belongs to somebody else or is open to others, or its name is too long.
    """
    folder = Path(tempfile.gettempdir()) / f"defi-serve-{os.getuid()}"
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise ServeError(
            f"{folder} must be a folder of this user that nobody else can enter (mode 0700), since clients' sockets "
            "pass through it. Remove it, or set TMPDIR to another folder."
        )
    # The folder may be on a file system that several machines share.
    machine = Path("/proc/sys/kernel/random/boot_id").read_bytes() + os.fsencode(
        os.readlink("/proc/self/ns/net")
    )
    path = folder / f"{hashlib.sha256(secret + machine).hexdigest()[:24]}.sock"
    if len(os.fsencode(path)) > _PATH_LIMIT:
        raise ServeError(f"{path} is too long for a Unix socket. Set TMPDIR to a shorter folder.")
    return path


def listen_locally(path: Path) -> socket.socket:
    """The Unix socket that replicas connect to; one that a dead listener left is replaced."""
    _remove_abandoned(path.parent)
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        # Bound under another name first: a replica never meets a file that nobody listens on yet.
        fresh = path.with_suffix(f".{os.getpid()}")
        fresh.unlink(missing_ok=True)
        listening.bind(str(fresh))
        listening.listen(128)
        listening.setblocking(False)
        fresh.replace(path)
    except OSError:
        listening.close()
        raise
    return listening


def _remove_abandoned(folder: Path) -> None:
    """Deletes sockets on which nobody listens: of nodes that were killed."""
    for path in folder.glob("*.sock"):
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe:
            probe.setblocking(False)
            if time.time() - path.stat().st_mtime > _ABANDONED_S:
                try:
                    probe.connect(str(path))
                except ConnectionRefusedError:
                    path.unlink()


def connect_locally(path: Path) -> Channel | None:
    """A connection to the node's listener; None while there is none."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        connection.connect(str(path))
    except OSError:
        connection.close()
        return None
    return Channel(connection)
