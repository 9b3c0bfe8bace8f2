"""The process that owns a machine's public port: it accepts, chooses a replica and passes the socket on."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from defi_platform.serve.connections.tls import Certificate
from defi_platform.serve.listener.channel import listen_locally
from defi_platform.serve.listener.placement import Placement
from defi_platform.serve.listener.port import BACKLOG, allow_many_files, only_one, open_port, same_user
from defi_platform.serve.listener.roster import Member

T = TypeVar("T")
log = logging.getLogger(__name__)

BALANCE_PERIOD_S, BALANCE_PAUSE_S = 0.5, 3.0
BIND_PERIOD_S, BIND_QUIET_TRIES = 0.2, 15
"""Seconds between two tries to get the port, and how many of them nobody hears of: replicas keep the port of a listener
that has died, and bring it to the next."""
_NO_ROOM = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


@dataclass(frozen=True)
class ListenerSettings:
    """Address and secret of a listener; the same on every machine of a deployment."""

    host: str
    port: int
    secret: bytes
    """Shown by replicas and by listeners of other machines: relay.SECRET_BYTES bytes."""
    tls_cert: str | None = None
    tls_key: str | None = None
    stalled_after_s: float = 20.0
    """See `LimitsConfig`."""


class Listener:
    """Accepts connections in a thread of its own. Its methods may be called from any other thread."""

    def __init__(self, settings: ListenerSettings, path: Path, *, stays: bool = True) -> None:
        """Prepares a listener; `start` binds its sockets.

        Args:
            settings: address and secret.
            path: of the Unix socket for replicas.
            stays: see `Placement.stays`.
        """
        self._settings, self._path = settings, path
        self._loop = asyncio.new_event_loop()
        certificate = Certificate(settings.tls_cert, settings.tls_key)
        self._placement = Placement(
            self._loop, settings.secret, settings.port, certificate, self._on_register
        )
        self._placement.stays = stays
        self._public: socket.socket | None = None
        self._listening: list[socket.socket] = []
        self._relaying: socket.socket | None = None
        self._reason = ""
        self._balanced_at = 0.0
        self._thread = threading.Thread(target=self._loop.run_forever, name="listener", daemon=True)

    def start(self) -> None:
        """Binds and begins to accept.

        Where another process holds the port it is tried again until it is free, or a replica brings the port that
        it has kept for a listener that died; `state` tells.

        Raises:
            OSError: another listener of this deployment runs on this machine.
        """
        allow_many_files()
        self._only_one = only_one(self._path)
        local = listen_locally(self._path)
        self._thread.start()
        self._call(lambda: self._begin(local))

    def stop(self) -> None:
        """Closes everything; connections that were passed on are not touched."""
        if not self._thread.is_alive():
            return
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()
        self._only_one.close()

    def close_port(self) -> None:
        """Accepts no more clients; those that are here stay."""

        def close() -> None:
            if self._public is not None:
                self._loop.remove_reader(self._public)
                self._listening.remove(self._public)
                self._public.close()
                self._public, self._reason = None, "this machine is to be given back"

        self._call(close)

    def state(self) -> dict[str, Any]:
        """Plain values: `port` (None until it is bound), `relay` address, `replicas` with their loads, counts."""
        return self._call(self._state)

    def serve_generation(self, generation: int | None) -> None:
        """Sends new connections to replicas of `generation` while one lives; None: to the newest."""

        def change() -> None:
            self._placement.roster.current = generation
            self._placement.place_held()

        self._call(change)

    def follow(self, generation: int) -> None:
        """Like `serve_generation`, also before `start`, and without effect where nothing changes."""
        if self._placement.roster.current == generation:
            return
        if self._thread.is_alive():
            self.serve_generation(generation)
        else:
            self._placement.roster.current = generation

    def use_certificate(self, cert: str | None, key: str | None) -> None:
        """Encrypts refusals as the replicas that serve now encrypt their answers; see `SecurityConfig`."""
        self._placement.certificate = Certificate(cert, key)

    def order_close(self, reason: str) -> int:
        """Asks all replicas to close their connections between answers; new ones are refused from now on.

        Args:
            reason: for the clients.

        Returns: the number of replicas asked.
        """

        def order() -> int:
            self._placement.closing = reason
            asked = list(self._placement.roster.members)
            for member in asked:
                self._placement.tell(member, {"type": "close", "reason": reason})
            return len(asked)

        return self._call(order)

    def announcement(self) -> dict[str, Any]:
        """The news for other machines' listeners: `address` of its relay port, `replicas` (generation and sockets)."""
        return self._call(self._announcement)

    def meet(self, peers: dict[str, dict[str, Any]], host: str) -> dict[str, Any]:
        """Takes in what the listeners of other machines have announced, and is there for them from now on.

        Args:
            peers: the `announcement` of each with a `beat` that changes, by Ray's id of the node.
            host: address of this machine at which they reach it.

        Returns: its own announcement; `lost`: those of which nothing has come for long.
        """

        def change() -> dict[str, Any]:
            if peers and self._relaying is None:
                # Nothing but the public port listens beyond this machine, unless another machine needs it.
                self._relaying = socket.create_server((host, 0), backlog=BACKLOG)
                self._relaying.setblocking(False)
                self._accept_from(self._relaying)
            self._placement.carrier.peers.update(peers)
            self._placement.place_held()
            return {**self._announcement(), "lost": self._placement.carrier.peers.lost()}

        return self._call(change)

    def order_move(self, application: str, when: str) -> int:
        """Asks all replicas of an application to give their websockets back, for the generation that serves now.

        Args:
            application: Serve's name of it.
            when: "answers" or "episodes": what each socket finishes first.

        Returns: the number of replicas asked.
        """

        def order() -> int:
            asked = [m for m in self._placement.roster.members if m.application == application]
            for member in asked:
                self._placement.tell(member, {"type": "move", "count": None, "when": when, "same": False})
            return len(asked)

        return self._call(order)

    # What follows runs on the loop's thread.

    def _call(self, function: Callable[[], T]) -> T:
        async def run() -> T:
            return function()

        return asyncio.run_coroutine_threadsafe(run(), self._loop).result(10)

    def _begin(self, local: socket.socket) -> None:
        self._listening.append(local)
        self._loop.add_reader(local, self._accept_replicas, local)
        try:
            self._use_port(open_port(self._settings.host, self._settings.port))
        except OSError as error:
            self._reason = str(error)
            self._placement.start_task(self._bind_later())
        self._placement.start_task(self._balance())

    async def _end(self) -> None:
        for listening in self._listening:
            self._loop.remove_reader(listening)
            listening.close()
        self._path.unlink(missing_ok=True)
        await self._placement.close()

    async def _bind_later(self) -> None:
        tries = 0
        while self._public is None:
            await asyncio.sleep(BIND_PERIOD_S)
            tries += 1
            if tries == BIND_QUIET_TRIES:
                log.warning("%s:%d: %s", self._settings.host, self._settings.port, self._reason)
            with contextlib.suppress(OSError):
                found = open_port(self._settings.host, self._settings.port)
                if self._public is None:
                    self._use_port(found)

    def _use_port(self, listening: socket.socket) -> None:
        listening.setblocking(False)
        self._public, self._reason = listening, ""
        self._accept_from(listening)
        for member in list(self._placement.roster.members):
            self._share_port(member)

    def _on_register(self, member: Member, port: socket.socket | None) -> None:
        if port is None:
            self._share_port(member)
        elif self._public is None and port.getsockname()[1] == self._settings.port:
            self._use_port(port)
        else:
            port.close()

    def _share_port(self, member: Member) -> None:
        # A replica keeps the port open, without accepting, so that clients wait in the kernel's queue and are not
        # refused while a listener that has died is started again.
        if self._public is not None:
            self._placement.tell(member, {"type": "port"}, self._public.dup())

    def _accept_from(self, listening: socket.socket) -> None:
        if listening not in self._listening:
            self._listening.append(listening)
        self._loop.add_reader(listening, self._accept, listening)

    def _accept(self, listening: socket.socket) -> None:
        for _ in range(64):
            try:
                connection, _ = listening.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                if error.errno not in _NO_ROOM:
                    raise
                log.warning("no connection can be accepted for a moment: %s", error)
                self._loop.remove_reader(listening)
                self._loop.call_later(0.2, self._accept_from, listening)
                return
            connection.setblocking(False)
            self._placement.counts["accepted"] += 1
            if listening is self._relaying:
                self._placement.start_task(self._placement.carrier.receive(connection))
            else:
                self._placement.place(connection)

    def _accept_replicas(self, local: socket.socket) -> None:
        with contextlib.suppress(BlockingIOError, InterruptedError):
            connection, _ = local.accept()
            if same_user(connection):
                self._placement.welcome(connection)
            else:
                connection.close()

    async def _balance(self) -> None:
        while True:
            await asyncio.sleep(BALANCE_PERIOD_S)
            self._placement.end_stalled(int(self._settings.stalled_after_s / BALANCE_PERIOD_S))
            if self._loop.time() - self._balanced_at < BALANCE_PAUSE_S:
                continue
            roster, peers = self._placement.roster, self._placement.carrier.peers
            serving = roster.preferred(roster.generations())
            move = roster.uneven([] if serving is None else peers.sockets(serving))
            if move is not None:
                self._balanced_at = self._loop.time()
                order = {"type": "move", "count": move.count, "when": "answers", "same": True}
                self._placement.tell(move.member, order)

    def _announcement(self) -> dict[str, Any]:
        address = None if self._relaying is None else list(self._relaying.getsockname()[:2])
        return {"address": address, "replicas": self._placement.roster.open_to()}

    def _state(self) -> dict[str, Any]:
        placement, now = self._placement, self._placement.roster.now()
        return {
            "host": self._settings.host,
            "port": None if self._public is None else self._public.getsockname()[1],
            "reason": self._reason,
            "relay": None if self._relaying is None else list(self._relaying.getsockname()[:2]),
            "generation": placement.roster.current,
            "live": len(placement.roster.candidates()),
            "held": len(placement.held),
            "carried": placement.carrier.carried,
            **placement.counts,
            "metadata": placement.metadata(),
            "replicas": [m.summary(now) for m in placement.roster.members],
        }
