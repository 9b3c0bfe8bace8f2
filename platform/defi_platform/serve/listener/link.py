"""A replica's end of the connection to its node's listener: registers, reports load, takes and gives back sockets."""

from __future__ import annotations

import contextlib
import logging
import os
import select
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from defi_platform.serve.listener.channel import Channel, ChannelClosed, MessageTooLarge, connect_locally
from defi_platform.serve.listener.port import allow_many_files

log = logging.getLogger(__name__)

REPORT_PERIOD_S = 0.5
RECONNECT_PERIOD_S = 0.1
REVIVE_AFTER_S = 3.0
"""Seconds without a listener after which the replica asks for one; Ray starts a dead one again by itself."""
LISTENER_PATIENCE_S = 2.0
"""Seconds that a busy listener gets to hear that a replica leaves, and to take the sockets that it gives back."""


class Sockets(Protocol):
    """The socket server, as a link needs it."""

    def adopt(self, sock: socket.socket, state: dict[str, Any] | None) -> None:
        """Serves a connection."""

    def load(self) -> dict[str, Any]:
        """The load report; `sockets` is the number of open connections."""

    def move(
        self, count: int | None, when: str, hand_over: Callable[[socket.socket, dict[str, Any]], bool]
    ) -> Any:
        """Gives websockets back.

        Args:
            count: how many; None: all.
            when: "answers" or "episodes": what each finishes first.
            hand_over: takes a socket and its state; False where nobody does.
        """

    def close(self, reason: str) -> Any:
        """Closes every connection once what is in flight on it is answered."""


class ReplicaLink:
    """Keeps a replica registered with its node's listener, with its successor too should it die."""

    def __init__(
        self, path: Path, identity: dict[str, Any], sockets: Sockets, revive: Callable[[], object]
    ) -> None:
        """Prepares a link; `start` connects.

        Args:
            path: of the listener's Unix socket.
            identity: replica, generation, digest, application, token, movable.
            sockets: the replica's socket server.
            revive: starts a listener on this node; called while there is none.
        """
        self._path, self._identity, self._sockets, self._revive = path, identity, sockets, revive
        self._channel: Channel | None = None
        self._lock = threading.RLock()
        self._port: socket.socket | None = None
        self._received = 0
        self._leaving = False
        self._dismissed, self._stop = threading.Event(), threading.Event()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._registered = threading.Event()
        self._thread = threading.Thread(target=self._run, name="listener link", daemon=True)

    @property
    def connected(self) -> bool:
        """Whether a listener knows this replica now."""
        return self._channel is not None

    @property
    def passing(self) -> bool:
        """Sockets that were handed over have not left this process yet."""
        with self._lock:
            return self._channel is not None and bool(self._channel.waiting)

    def start(self) -> None:
        """Registers in a thread of its own."""
        allow_many_files()
        self._thread.start()

    def wait_until_registered(self, timeout_s: float) -> bool:
        """Waits for the first registration. Returns: whether it came in time."""
        return self._registered.wait(timeout_s)

    def leave(self) -> None:
        """Takes no more connections from the listener; those that are here stay.

        Returns once the listener knows, so that none is on its way any more.
        """
        self._leaving = True
        with self._lock:
            if self._channel is None:
                return
            with contextlib.suppress(ChannelClosed):
                self._channel.send({"type": "leaving"})
        self._dismissed.wait(LISTENER_PATIENCE_S)

    def hand_over(self, connection: socket.socket, state: dict[str, Any], *, same: bool = True) -> bool:
        """Gives a websocket back to the listener, for another replica.

        Args:
            connection: between two messages; no longer ours where True is returned.
            state: plain values from which another process goes on.
            same: prefer a replica of the same deployment.

        Returns: False where nobody can take it; the caller still owns it.
        """
        with self._lock:
            if self._channel is None:
                return False
            try:
                self._channel.send({"type": "socket", "state": state, "same": same}, connection)
            except MessageTooLarge as error:
                log.warning("a websocket stays here: %s", error)
                return False
            except ChannelClosed:
                return False
            if self._channel.waiting:
                os.eventfd_write(self._wake, 1)
            return True

    def stop(self) -> None:
        """Ends the thread and the registration, once the listener has taken what was given back."""
        deadline = time.monotonic() + LISTENER_PATIENCE_S
        while self.passing and time.monotonic() < deadline:
            time.sleep(0.005)
        self._stop.set()
        os.eventfd_write(self._wake, 1)
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(5)
        if self._port is not None:
            self._port.close()

    def _run(self) -> None:
        missing_since = time.monotonic()
        while not self._stop.is_set():
            channel = connect_locally(self._path)
            if channel is None:
                if time.monotonic() - missing_since > REVIVE_AFTER_S:
                    missing_since = time.monotonic()
                    try:
                        self._revive()
                    except Exception as error:  # noqa: BLE001 - a cluster in trouble; the next attempt tells
                        log.warning("no listener could be started on this node: %s", error)
                self._stop.wait(RECONNECT_PERIOD_S)
                continue
            try:
                self._talk(channel)
            except ChannelClosed:
                pass
            except Exception:
                log.exception("the listener sent what this replica cannot handle")
            with self._lock:
                self._channel = None
                left = channel.abandon()
            for message, connection in left:
                if message["type"] == "socket" and not self._stop.is_set():
                    self._sockets.adopt(connection, message["state"])
                else:
                    connection.close()
            missing_since = time.monotonic()

    def _talk(self, channel: Channel) -> None:
        self._received = 0
        identity = {"type": "register", "pid": os.getpid(), "load": self._report(), **self._identity}
        channel.send(identity, None if self._port is None else self._port.dup())
        if self._leaving:
            channel.send({"type": "leaving"})
        with self._lock:
            self._channel = channel
        poll = select.poll()
        poll.register(self._wake, select.POLLIN)
        due = time.monotonic() + REPORT_PERIOD_S
        while not self._stop.is_set():
            poll.register(channel.fileno(), select.POLLIN | (select.POLLOUT if channel.waiting else 0))
            poll.poll(max(0.0, due - time.monotonic()) * 1e3)
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self._wake)
            with self._lock:
                channel.flush()
            while True:
                with self._lock:
                    received = channel.receive()
                if received is None:
                    break
                self._obey(*received)
            if time.monotonic() >= due:
                due = time.monotonic() + REPORT_PERIOD_S
                report = self._report()
                with self._lock:
                    channel.send({"type": "load", "load": report})

    def _obey(self, message: dict[str, Any], passed: socket.socket | None) -> None:
        kind = message["type"]
        if kind == "socket":
            self._received += 1
            mine = self._confirm()
            if passed is None:
                log.error("a connection was lost: this process has no room for more open files")
            elif mine:
                self._sockets.adopt(passed, message["state"])
            else:
                passed.close()
        elif kind == "port" and passed is not None:
            if self._port is not None:
                self._port.close()
            self._port = passed
        elif kind == "welcome":
            self._registered.set()
        elif kind == "dismissed":
            self._dismissed.set()
        elif kind == "move":
            same = bool(message["same"])
            self._sockets.move(
                message["count"], message["when"], lambda c, state: self.hand_over(c, state, same=same)
            )
        elif kind == "close":
            self._sockets.close(message["reason"])

    def _confirm(self) -> bool:
        """Tells the listener that a connection has arrived, before anything is read from it.

        Until the listener hears so, it gives the connection to another replica should this one end.

        Returns: whether the connection belongs to this replica.
        """
        with self._lock:
            channel = self._channel
            if channel is None:
                return False
            try:
                channel.send({"type": "received", "count": self._received})
            except ChannelClosed:
                # A listener that lives has given up this registration, and the connection to somebody else.
                return not channel.peer_lives
            return True

    def _report(self) -> dict[str, Any]:
        return {**self._sockets.load(), "received": self._received}
