"""The way of connections: to a replica of this machine, to another machine's listener, or into a short wait and a refusal."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import socket
from collections import Counter, deque
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

from defi_platform.serve.connections.tls import Certificate
from defi_platform.serve.listener.carrier import RESTART_FRAME, Carrier
from defi_platform.serve.listener.channel import Channel, ChannelClosed, MessageTooLarge
from defi_platform.serve.listener.peers import Peer
from defi_platform.serve.listener.refusal import refuse
from defi_platform.serve.listener.roster import Member, Roster, margin

log = logging.getLogger(__name__)

HOLD_S = 2.0
"""Seconds a new connection waits for a replica before it is refused."""
MOST_HELD = 1024
"""Connections that wait at a time; more are refused at once."""
NOBODY = "no replica of the policy is running now; try again in some seconds"


@dataclass(frozen=True)
class _Passed:
    """A connection on its way to a replica: nothing of it is lost should the replica die first."""

    number: int
    copy: socket.socket
    state: dict[str, Any] | None


class Placement:
    """The replicas that have registered and the connections on their way to them; lives on one event loop."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        secret: bytes,
        port: int,
        certificate: Certificate,
        on_register: Callable[[Member, socket.socket | None], None],
    ) -> None:
        """Prepares a placement without replicas.

        Args:
            loop: on whose thread all methods are called.
            secret: shown by replicas and by listeners of other machines.
            port: that clients connect to.
            certificate: of the public port, for refusals.
            on_register: called with each new replica and the public port that it has kept, if any.
        """
        self.roster = Roster()
        self.counts: Counter[str] = Counter(accepted=0, refused=0, relayed=0, returned=0, moved=0, stalled=0)
        self.carrier = Carrier(secret, port, self.counts, self.take)
        """The ways to and from other machines."""
        self.stays = True
        """Whether this machine is there for as long as the server is; otherwise it carries no client for others, who
        would keep it from being given back."""
        self.held: dict[socket.socket, asyncio.TimerHandle] = {}
        """Connections that wait for a replica."""
        self.moving: dict[socket.socket, tuple[dict[str, Any], asyncio.TimerHandle]] = {}
        """Websockets that a replica gave back and nobody has taken yet, with their state."""
        self.closing: str | None = None
        """Why every new connection is refused, while the server shuts down."""
        self.certificate = certificate
        self._loop, self._secret, self._on_register = loop, secret, on_register
        self._channels: dict[Member, Channel] = {}
        self._unconfirmed: dict[Member, deque[_Passed]] = {}
        """Connections that each replica has not taken out of its channel yet, as far as is known."""
        self._tasks: set[asyncio.Task[Any]] = set()

    def start_task(self, coroutine: Coroutine[Any, Any, Any]) -> None:
        """Runs a coroutine for as long as this lives."""
        task = self._loop.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        """Closes what has not been passed on."""
        for member in list(self._channels):
            self._drop(member, place=False)
        for connection, timer in self.held.items():
            timer.cancel()
            connection.close()
        for connection, (_, timer) in list(self.moving.items()):
            timer.cancel()
            self._give_up(connection)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def place(self, connection: socket.socket) -> None:
        """Finds somebody to serve a new connection.

        Args:
            connection: accepted, not blocking, nothing read from it. What comes from another machine's listener is
                not sent on to a third.
        """
        if self.closing is not None:
            self._refuse(connection)
            return
        found = None if self.carrier.is_relayed(connection) else self._elsewhere(None, new=True)
        if found is not None:
            self._send(connection, *found, None)
        elif self._passed(connection):
            pass
        elif len(self.held) >= MOST_HELD:
            self._refuse(connection)
        else:
            self.held[connection] = self._loop.call_later(HOLD_S, self._refuse, connection)

    def take(
        self, connection: socket.socket, state: dict[str, Any] | None, generation: int | None = None
    ) -> None:
        """Finds somebody to serve a connection that another machine's listener has sent.

        Args:
            connection: not blocking.
            state: of its session; None: it is new.
            generation: that it should go on with, if that has a replica.
        """
        if state is None:
            self.place(connection)
        else:
            self._move_on(connection, state, generation)

    def place_held(self) -> None:
        """Passes waiting connections on, where a replica has come."""
        if not self.roster.generations() and not self.carrier.peers.generations():
            return
        for connection, timer in list(self.held.items()):
            timer.cancel()
            del self.held[connection]
            self.place(connection)
        for connection, (state, timer) in list(self.moving.items()):
            if self._moved_on(connection, state, None):
                timer.cancel()
                del self.moving[connection]

    def welcome(self, connection: socket.socket) -> None:
        """Waits for the registration of a replica that has connected."""
        channel = Channel(connection)
        self._loop.add_reader(channel.fileno(), self._register, channel)

    def end_stalled(self, most: int) -> None:
        """Ends replicas whose process stands still: their clients would wait for minutes until Serve does.

        Args:
            most: calls of this without a report of a replica in between. They are counted, not the time: where the
                whole machine stood still, its reports are there before.
        """
        for member in list(self.roster.members):
            member.missed += 1
            if member.missed > most and self._channels[member].kill_peer():
                log.error("replica %s (process %d) stands still and is ended", member.replica, member.pid)
                self.counts["stalled"] += 1
                member.missed = 0

    def metadata(self) -> dict[str, Any] | None:
        """The greeting of the replicas that serve now; None without one."""
        return next((m.metadata for m in self.roster.candidates()), None)

    def tell(self, member: Member, message: dict[str, Any], passed: socket.socket | None = None) -> None:
        """Sends a message to a replica.

        Args:
            member: the replica.
            message: plain values.
            passed: a socket to hand over; closed here in any case.
        """
        channel = self._channels.get(member)
        try:
            if channel is None:
                raise ChannelClosed
            channel.send(message, passed)
        except ChannelClosed:
            if passed is not None:
                passed.close()
            self._drop(member)
        else:
            self._watch_writing(member)

    def _elsewhere(self, generation: int | None, *, new: bool) -> tuple[Peer, int] | None:
        """The other machine that a connection should go to, and for which generation; None: a replica of here.

        Each byte that goes there is copied once more, here and by the network. So a new connection goes there for a
        difference that matters; one that moves has left a replica for a reason.
        """
        peers, roster = self.carrier.peers, self.roster
        there, here = peers.generations(), roster.generations()
        if generation not in there | here:
            generation = roster.preferred(there | here)
        peer = None if generation is None else peers.choose(generation)
        if peer is None or generation is None:
            return None
        member = roster.choose(generation)
        if member is not None:
            least = margin(member.sockets) if new else 1.0
            if member.sockets - peer.sockets(generation) < least:
                return None
        return peer, generation

    def _passed(
        self, connection: socket.socket, state: dict[str, Any] | None = None, generation: int | None = None
    ) -> bool:
        while (member := self.roster.choose(generation)) is not None:
            try:
                copy = connection.dup()
            except OSError as error:
                log.warning("no connection can be passed on for a moment: %s", error)
                return False
            try:
                self._channels[member].send({"type": "socket", "state": state}, connection)
            except ChannelClosed:
                copy.close()
                self._drop(member)
                continue
            except MessageTooLarge as error:
                copy.close()
                log.warning("a websocket could not move: %s", error)
                return False
            member.passed += 1
            self._unconfirmed[member].append(_Passed(member.passed, copy, state))
            self._watch_writing(member)
            return True
        return False

    def _refuse(self, connection: socket.socket) -> None:
        self.held.pop(connection, None)
        self.counts["refused"] += 1
        self.start_task(refuse(connection, self.closing or NOBODY, self.certificate.context()))

    def _send(
        self, connection: socket.socket, peer: Peer, generation: int, state: dict[str, Any] | None
    ) -> None:
        peer.sent += 1  # at once, so that those accepted in the same turn do not all go to the same

        async def carry() -> None:
            if not await self.carrier.carry(connection, peer, state, generation):
                self.take(connection, state, generation)  # the peer is avoided for a while

        self.start_task(carry())

    def _register(self, channel: Channel) -> None:
        try:
            received = channel.receive()
            if received is None:
                return
            message, port = received
            member = self._member(message)
        except (ChannelClosed, ValueError, KeyError, TypeError) as error:
            log.warning("a replica was turned away: %s", error)
            self._loop.remove_reader(channel.fileno())
            channel.abandon()
            return
        self._channels[member], self._unconfirmed[member] = channel, deque()
        self.roster.add(member)
        self.roster.report(member, message.get("load") or {})
        self._loop.remove_reader(channel.fileno())
        self._loop.add_reader(channel.fileno(), self._hear, member)
        self.tell(member, {"type": "welcome"})
        self._on_register(member, port)
        self.place_held()

    def _member(self, message: dict[str, Any]) -> Member:
        known = hmac.compare_digest(message.get("token") or b"", self._secret)
        if message.get("type") != "register" or not known:
            raise ValueError("it did not introduce itself as a replica of this deployment")
        return Member(
            replica=str(message["replica"]),
            generation=int(message["generation"]),
            digest=str(message["digest"]),
            pid=int(message["pid"]),
            application=str(message["application"]),
            movable=bool(message["movable"]),
            metadata=dict(message["metadata"]),
        )

    def _hear(self, member: Member) -> None:
        channel = self._channels[member]
        try:
            while (received := channel.receive()) is not None:
                message, passed = received
                if message["type"] == "load":
                    self.roster.report(member, message["load"])
                    if self.held or self.moving:
                        self.place_held()
                elif message["type"] == "received":
                    self._confirm(member, message["count"])
                elif message["type"] == "leaving":
                    member.leaving = True
                    self.tell(member, {"type": "dismissed"})
                elif message["type"] == "socket" and passed is not None:
                    self._move(member, passed, message)
        except ChannelClosed:
            self._drop(member)

    def _confirm(self, member: Member, count: int) -> None:
        """Notes that a replica has the first `count` of the connections that were passed to it."""
        unconfirmed = self._unconfirmed[member]
        while unconfirmed and unconfirmed[0].number <= count:
            unconfirmed.popleft().copy.close()

    def _move(self, member: Member, connection: socket.socket, message: dict[str, Any]) -> None:
        """Passes a websocket that a replica gave back to another one, of the same policy where `same` asks for it."""
        connection.setblocking(False)
        member.load["sockets"] = max(0, int(member.load.get("sockets", 0)) - 1)
        self.counts["moved"] += 1
        self._move_on(connection, message["state"], member.generation if message.get("same") else None)

    def _move_on(self, connection: socket.socket, state: dict[str, Any], generation: int | None) -> None:
        if self._moved_on(connection, state, generation):
            return
        if not self.stays and self.carrier.peers.generations():
            # Its client finds a replica through another machine at once.
            self._close_moving(connection, state)
            return
        timer = self._loop.call_later(HOLD_S, self._give_up, connection)
        self.moving[connection] = (state, timer)

    def _moved_on(self, connection: socket.socket, state: dict[str, Any], generation: int | None) -> bool:
        """Whether somebody takes a websocket over, here or on another machine."""
        found = self._elsewhere(generation, new=False)
        if found is None:
            return self._passed(connection, state, generation) or self._passed(connection, state)
        if self.carrier.is_relayed(connection):
            self.start_task(self._give_back(connection, state))
        elif self.stays or self.roster.candidates():
            self._send(connection, *found, state)
        else:
            return False
        return True

    async def _give_back(self, connection: socket.socket, state: dict[str, Any]) -> None:
        if not await self.carrier.give_back(connection, state) and not self._passed(connection, state):
            self._close_moving(connection, state)

    def _give_up(self, connection: socket.socket) -> None:
        """Tells the client of a socket that nobody takes over to connect again."""
        state, _ = self.moving.pop(connection)
        self._close_moving(connection, state)

    def _close_moving(self, connection: socket.socket, state: dict[str, Any]) -> None:
        if state.keys() <= {"unread"}:
            # Between two HTTP requests: the next one is answered, and not in the words of websockets.
            self._refuse(connection)
            return
        # Between two messages and with nothing left to send, a close frame is a few bytes. The client's own close
        # frame is not waited for: there is nothing left to say.
        with contextlib.suppress(OSError):
            connection.send(RESTART_FRAME)
            connection.shutdown(socket.SHUT_WR)
        connection.close()

    def _watch_writing(self, member: Member) -> None:
        channel = self._channels[member]
        if channel.waiting:
            self._loop.add_writer(channel.fileno(), self._flush, member)

    def _flush(self, member: Member) -> None:
        channel = self._channels[member]
        try:
            channel.flush()
        except ChannelClosed:
            self._drop(member)
            return
        if not channel.waiting:
            self._loop.remove_writer(channel.fileno())

    def _drop(self, member: Member, *, place: bool = True) -> None:
        """Forgets a replica that has ended; what had not reached it goes to another one."""
        self.roster.remove(member)
        channel = self._channels.pop(member, None)
        if channel is None:
            return
        self._loop.remove_reader(channel.fileno())
        self._loop.remove_writer(channel.fileno())
        for _, passed in channel.abandon():
            passed.close()  # a port, or a connection of which there is a copy
        for entry in self._unconfirmed.pop(member):
            if not place:
                entry.copy.close()
            elif entry.state is None:
                self.place(entry.copy)
            else:
                self._move_on(entry.copy, entry.state, member.generation)
