"""The sockets of a replica: one thread, one loop, every protocol."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import uvloop
from uvicorn.server import ServerState

from defi_platform.config import LimitsConfig, SecurityConfig
from defi_platform.serve.connections.access import Access
from defi_platform.serve.connections.guard import AsgiApp, GuardedApp
from defi_platform.serve.connections.http_connection import HttpConnection, uvicorn_config
from defi_platform.serve.connections.keepalive import watch_over
from defi_platform.serve.connections.shared import HandOver, Leave, SharedState
from defi_platform.serve.connections.tls import Certificate
from defi_platform.serve.connections.watchdog import Watchdog
from defi_platform.serve.connections.websocket import GOING_AWAY, WebSocketConnection, client_of
from defi_platform.serve.protocols.routes import wire_class
from defi_platform.serve.protocols.wire import SERVICE_RESTART, WireSettings

if TYPE_CHECKING:
    from defi_platform.serve.inference.service import ActionService

log = logging.getLogger(__name__)

CHECK_S = 0.5
"""Seconds between two looks at which sockets have taken too long."""
HTTP_ROOM = 256
"""Sockets beside `max_connections` that are not websockets: handshakes and HTTP."""
TLS_SHUTDOWN_S = 2.0
"""Seconds from the end of a connection until a client that does not say goodbye in TLS is cut off."""
FAREWELL_S = 0.5
"""Seconds in which what was being answered may notice that its socket is gone."""
GOODBYE_S = 2.0
"""Seconds in which clients are asked to connect again, once the loop stands still."""
RECONNECT = "this replica is leaving: connect again, another one answers"
LOST_S = 60
"""Seconds after which a robot that lost its power or its network is given up."""
STRICTER = "this server asks for a token or for TLS now: connect again"

_FULL = (
    b"HTTP/1.1 503 Service Unavailable\r\nretry-after: 1\r\nconnection: close\r\n"
    b"content-type: text/plain\r\ncontent-length: 33\r\n\r\nall connections here are taken.  \n"
)


class SocketServer:
    """Serves sockets that somebody else has accepted."""

    def __init__(
        self,
        service: ActionService,
        app: AsgiApp,
        *,
        limits: LimitsConfig,
        security: SecurityConfig,
        max_connections: int = 1000,
        wires: WireSettings | None = None,
        on_stall: Callable[[], object] | None = None,
    ) -> None:
        """Reads tokens and certificate; `start` does the rest.

        Args:
            service: answers observations; runs on the loop of this server.
            app: ASGI application for HTTP requests.
            limits: of each socket and of all.
            security: tokens, TLS and rate.
            max_connections: open websockets.
            wires: of their dialogues; the defaults when None.
            on_stall: called from another thread when the loop has stood still for `limits.stalled_after_s`, after
                every client has been asked to connect again; to end this process. None: nobody watches.

        Raises:
            ConfigError: the tokens file or the certificate does not fit.
        """
        access = Access(security)
        self._certificate = Certificate(security.tls_cert, security.tls_key)
        self._certificate.read()
        self._shared = SharedState(service, limits, access, max_connections, wires)
        self._shared.readopt = self._readopt
        self._config = uvicorn_config(
            GuardedApp(app, access, self._shared.max_message_bytes, self._shared.hold, self._shared.counts)
        )
        self._state = ServerState()
        self.loop: asyncio.AbstractEventLoop = uvloop.new_event_loop()
        """Where everything of this server and of its service runs."""
        self._shared.loop = self.loop
        self._on_stall = on_stall
        self._watchdog = Watchdog(self.loop, limits.stalled_after_s, self._stalled)
        self._opening = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._thread = threading.Thread(target=self._run, name="sockets", daemon=True)

    def start(self) -> None:
        """Starts the thread with the loop."""
        self._thread.start()
        if self._on_stall is not None:
            self._watchdog.start()

    def adopt(self, sock: socket.socket, state: dict[str, Any] | None = None) -> None:
        """Takes a socket over. May be called from any thread.

        Args:
            sock: an accepted connection; belongs to this server from now on.
            state: that another replica gave with it (`move`); None or without a path: no websocket, but a new
                connection or one between two HTTP requests, of which `unread` has been read already.
        """
        self.loop.call_soon_threadsafe(self._adopt, sock, state or {}, None)

    def load(self) -> dict[str, Any]:
        """Numbers of the moment. May be called from any thread.

        Returns:
            sockets, of which websockets, https (neither) and moving (being handed over), answering (messages),
            held_bytes (received, not answered),
            leaving (every socket is to go), stands_still (the loop does not turn), and counts: events since the start by name.
        """
        shared = self._shared
        websockets, https = len(shared.websockets), len(shared.https) + self._opening
        return {
            "sockets": websockets + https + shared.moving,
            "websockets": websockets,
            "https": https,
            "moving": shared.moving,
            "answering": shared.answering,
            "held_bytes": shared.held_bytes,
            "leaving": shared.leave is not None,
            "stands_still": self._watchdog.stands_still,
            "counts": dict(shared.counts),
        }

    def move(self, count: int | None, when: str, hand_over: HandOver) -> None:
        """Makes sockets leave; `load` says how many are left. May be called from any thread.

        Args:
            count: of sockets, idle ones first; the ones that cannot be handed over stay. None: every socket that
                there is and that still comes; those that cannot be handed over are closed with 1012.
            when: between two "answers", or only between two "episodes".
            hand_over: takes a socket and a state of plain values and passes them to `adopt` of another replica.
                True: the socket is its own from now on; False: nobody took them. Runs in a thread of its own.
        """
        order = Leave(when, hand_over, SERVICE_RESTART, RECONNECT, must=count is None)
        self.loop.call_soon_threadsafe(self._order, order, count)

    def close(self, reason: str, timeout_s: float = 10.0) -> None:
        """Closes each socket after its answer, with 1001, and ends the thread.

        Args:
            reason: for the clients.
            timeout_s: seconds after which what is still open is cut off.
        """
        if not self._thread.is_alive():
            return
        self._watchdog.stop()
        order = Leave("answers", None, GOING_AWAY, reason)
        self.loop.call_soon_threadsafe(self._order, order, None)
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if not self.load()["sockets"]:
                break
            time.sleep(0.01)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(timeout=5)
        self._shared.close()

    def _stalled(self) -> None:
        assert self._on_stall is not None
        # In a thread: what the loop holds while it stands still, such as the lock of a log, may hold this up as well.
        farewell = threading.Thread(target=self._say_goodbye, name="farewell", daemon=True)
        farewell.start()
        farewell.join(GOODBYE_S)
        self._on_stall()

    def _say_goodbye(self) -> None:
        for connection in self._shared.connections():
            with contextlib.suppress(
                Exception
            ):  # what is just ending does not keep the others from hearing it
                connection.say_goodbye()
        log.critical(
            "the loop of the sockets has stood still for %g s (limits.stalled_after_s)",
            self._shared.limits.stalled_after_s,
        )

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.call_later(CHECK_S, self._check_times)
        try:
            self.loop.run_forever()
        finally:
            for connection in self._shared.connections():
                connection.abort()
            if pending := asyncio.all_tasks(self.loop):
                # Most of them end by themselves once their socket is gone.
                self.loop.run_until_complete(asyncio.wait(pending, timeout=FAREWELL_S))
            pending = asyncio.all_tasks(self.loop)
            for task in pending:
                task.cancel()
            self.loop.run_until_complete(asyncio.gather(*pending, return_exceptions=True))
            self.loop.close()

    def _readopt(self, sock: socket.socket, state: dict[str, Any], leave: Leave | None) -> None:
        self._adopt(sock, state, leave)

    def _adopt(self, sock: socket.socket, state: dict[str, Any], leave: Leave | None) -> None:
        self._opening += 1
        task = self.loop.create_task(self._open(sock, state, leave))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _open(self, sock: socket.socket, state: dict[str, Any], leave: Leave | None) -> None:
        try:
            sock.setblocking(False)
            if sock.family in (socket.AF_INET, socket.AF_INET6):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                watch_over(sock)
                # An answer that is not acknowledged would be sent again for a quarter of an hour.
                lost_s = max(LOST_S, self._shared.limits.write_timeout_s)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(1000 * lost_s))
            if "path" in state:
                await self._resume(sock, state, leave)
            else:
                await self._open_new(sock, state.get("unread", b""))
        except (OSError, TimeoutError) as error:
            # The client has gone, or does not speak TLS.
            self._shared.counts["closed_opening"] += 1
            log.debug("a socket ended before it began: %r", error)
            sock.close()
        except Exception:
            log.exception("a socket could not be taken over")
            self._shared.counts["closed_opening"] += 1
            sock.close()
        finally:
            self._opening -= 1

    async def _open_new(self, sock: socket.socket, ahead: bytes) -> None:
        shared = self._shared
        in_use = len(shared.websockets) + len(shared.https) + self._opening
        if in_use > shared.max_connections + HTTP_ROOM:
            shared.counts["refused_full"] += 1
            if not self._certificate.wanted:
                with contextlib.suppress(OSError):
                    sock.send(_FULL)
            sock.close()
            return
        tls = self._certificate.context()
        handshake = None if tls is None else shared.limits.handshake_timeout_s
        await self.loop.connect_accepted_socket(
            lambda: HttpConnection(shared, self._config, self._state, ahead),
            sock,
            ssl=tls,
            ssl_handshake_timeout=handshake,
            ssl_shutdown_timeout=None if tls is None else TLS_SHUTDOWN_S,
        )

    async def _resume(self, sock: socket.socket, state: dict[str, Any], leave: Leave | None) -> None:
        shared = self._shared
        client = client_of(state)
        kind = wire_class(client.path)
        if kind is None:
            log.error("a websocket came with the unknown path %s", client.path)
            sock.close()
            return
        wire = kind(shared.service, client, shared.wires)
        wire.resume(state["wire"])
        websocket = WebSocketConnection(shared, wire, shared.access.bucket(client.name, client.address))
        websocket.restore(state)
        await self.loop.connect_accepted_socket(lambda: websocket, sock)
        shared.counts["resumed"] += 1
        if leave is None and (self._certificate.wanted or not shared.access.knows(client.name)):
            leave = Leave("answers", None, SERVICE_RESTART, STRICTER)
        websocket.resume(leave)

    def _order(self, order: Leave, count: int | None) -> None:
        shared = self._shared
        if count is None:
            shared.leave = order
            for connection in shared.connections():
                connection.leave(order)
            return
        for connection in sorted(shared.connections(), key=lambda connection: connection.answering)[:count]:
            connection.leave(order)

    def _check_times(self) -> None:
        self.loop.call_later(CHECK_S, self._check_times)
        now = self.loop.time()
        for connection in self._shared.connections():
            connection.check_times(now)
