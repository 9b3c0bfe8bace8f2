"""One HTTP connection: uvicorn's parser and dialogue within limits of size and time, until it becomes a websocket."""

from __future__ import annotations

import asyncio
import logging
import sys
from typing import Any, cast

from httptools import HttpParserUpgrade
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from defi_platform.serve.connections.handshake import open_websocket
from defi_platform.serve.connections.shared import Leave, SharedState
from defi_platform.serve.connections.watchdog import STALLED_RESPONSE, duplicate_socket, send_past_loop

log = logging.getLogger(__name__)

MAX_HEADER_BYTES = 32 * 2**10
"""Of the request line and all headers; counted again before they are complete, since the parser keeps what it has."""
MAX_PIPELINED_REQUESTS = 16
KEEP_ALIVE_S = 60
LINGER_S = 10.0
"""Seconds in which a client may read the rest of what it was sent before a closed connection is cut."""

_quiet = logging.getLogger(f"{__name__}.uvicorn")
_quiet.setLevel(logging.ERROR)


def uvicorn_config(app: Any) -> Config:
    """Settings of uvicorn's protocol for a connection.

    Args:
        app: ASGI application for requests that are no websocket handshakes.
    """
    config = Config(
        app,
        http=HttpToolsProtocol,
        ws=asyncio.Protocol,  # any class: an upgrade goes to `open_websocket`
        log_config=None,
        log_level="error",  # by itself a line for each broken request: whoever sends them would fill the disk
        access_log=False,
        lifespan="off",
        proxy_headers=False,
        timeout_keep_alive=KEEP_ALIVE_S,
    )
    config.load()
    return config


class HttpConnection(HttpToolsProtocol):
    """A connection that speaks HTTP/1.1."""

    def __init__(self, shared: SharedState, config: Config, state: ServerState, ahead: bytes = b"") -> None:
        """Prepares for a socket.

        Args:
            shared: of the replica.
            config: of `uvicorn_config`.
            state: uvicorn's, of all connections of the replica.
            ahead: bytes of the client that have been read elsewhere.
        """
        super().__init__(config, state, {}, shared.loop)
        self.logger = _quiet  # what strangers send is counted, not logged
        self.shared = shared
        self._ahead = ahead
        self._header_bytes = 0
        self._received = b""
        self._head_bytes: int | None = 0
        """Received of a request whose headers are not complete; None once they are."""
        self._framing_bytes = 0.0
        """Received of a body beyond its content and a quarter of it: sizes of chunks, their extensions, trailers."""
        self._begun = False
        """Bytes of a request have come that is not complete."""
        self._waiting_since: float | None = None
        """For the first request, or for the rest of one."""
        self._first = True
        self._slow_since: float | None = None
        self._closing_since: float | None = None
        self._leave: Leave | None = None
        self._gone = False

    @property
    def answering(self) -> bool:
        """A request has begun that is not answered."""
        return not self._idle

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Takes the socket over; the first request is awaited for `handshake_timeout_s`.

        Args:
            transport: of a new connection, or of one between two requests.
        """
        super().connection_made(cast(asyncio.Transport, transport))
        self.shared.https.add(self)
        self._waiting_since = self.shared.loop.time()
        if self._ahead:
            self.data_received(self._ahead)
            self._ahead = b""

    def connection_lost(self, exc: Exception | None) -> None:
        """Forgets the socket.

        Args:
            exc: what happened; None after a close.
        """
        self.shared.https.discard(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Reads bytes of the client.

        Args:
            data: as they came.
        """
        self._begin()
        if self._head_bytes is not None:
            if self._head_bytes > MAX_HEADER_BYTES:
                self.send_400_response("headers too large")
                return
            self._head_bytes += len(data)
        else:
            # The parser keeps a trailer until it ends, and a body in crumbs would hold up every other socket.
            if self._framing_bytes > MAX_HEADER_BYTES:
                self.send_400_response("a body with more framing than content; send larger chunks")
                return
            self._framing_bytes += len(data)
        self._received = data
        super().data_received(data)
        self._received = b""

    def on_message_begin(self) -> None:
        """A request begins (called by the parser; an exception is answered with 400)."""
        if len(self.pipeline) >= MAX_PIPELINED_REQUESTS:
            raise ValueError("too many requests at once")
        self._header_bytes = 0
        self._begin()
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        """A part of the request's target (called by the parser).

        Args:
            url: the part.
        """
        self._count_header(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """One header (called by the parser).

        Args:
            name: of the header.
            value: of the header.
        """
        self._count_header(len(name) + len(value))
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """The headers have come whole (called by the parser)."""
        self._first = False
        self._head_bytes, self._framing_bytes = None, 0.0
        self._waiting_since = self.shared.loop.time()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """A part of the body (called by the parser).

        Args:
            body: the part.
        """
        self._framing_bytes -= 1.25 * len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        """A request has come whole (called by the parser)."""
        self._begun, self._waiting_since, self._head_bytes = False, None, 0
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """A request has been answered."""
        super().on_response_complete()
        self.leave_if_possible()

    def handle_websocket_upgrade(self) -> None:
        """A websocket handshake has come: the socket changes hands."""
        if not self._answered:
            self.send_400_response("a websocket handshake must wait for the answer to the request before it")
            return
        self._unset_keepalive_if_required()
        # A client that does not wait for the answer to its handshake has sent frames behind it.
        upgrade = sys.exc_info()[1]
        ahead = self._received[upgrade.args[0] :] if isinstance(upgrade, HttpParserUpgrade) else b""
        open_websocket(self.shared, self.transport, self.scope["method"], self.url, self.headers, ahead)
        if self.transport.get_protocol() is not self:  # not refused
            self._gone = True
            self.shared.https.discard(self)
            self.connections.discard(self)

    def send_400_response(self, msg: str) -> None:
        """Refuses what is no request and ends the connection.

        Args:
            msg: for the client.
        """
        self.shared.counts["refused_400"] += 1
        super().send_400_response(msg)

    def leave(self, order: Leave) -> None:
        """Leaves between two requests.

        Args:
            order: whither.
        """
        self._leave = order
        self.leave_if_possible()

    def leave_if_possible(self) -> None:
        """Moves or closes the socket if it is between two requests and is to leave."""
        order = self._leave or self.shared.leave
        if order is None or self._gone or self.transport.is_closing() or not self._idle:
            return
        plain = self.transport.get_extra_info("sslcontext") is None
        if order.hand_over is None or not plain:
            if order.must:
                self.transport.close()
            return
        if self.transport.get_write_buffer_size():
            self.shared.loop.call_later(0.002, self.leave_if_possible)
            return
        self._move(order)

    def abort(self) -> None:
        """Cuts the connection off."""
        self.transport.abort()

    def say_goodbye(self) -> None:
        """Refuses the request that is being answered, past a loop that stands still. Called from another thread."""
        plain = self.transport.get_extra_info("sslcontext") is None
        if plain and not self._idle and not (self.cycle is not None and self.cycle.response_started):
            send_past_loop(self.transport, STALLED_RESPONSE)

    def check_times(self, now: float) -> None:
        """Ends what has taken too long. Called about once a second.

        Args:
            now: the loop's time in seconds.
        """
        limits = self.shared.limits
        if self.transport.is_closing():
            # It closes when the client has read everything, which may be never.
            self._closing_since = self._closing_since or now
            if now - self._closing_since > LINGER_S:
                self.transport.abort()
            return
        if self.flow is not None and self.flow.write_paused:
            self._slow_since = self._slow_since or now
            if now - self._slow_since > limits.write_timeout_s:
                self.shared.counts["closed_write_timeout"] += 1
                self.transport.abort()
            return
        self._slow_since = None
        if self._waiting_since is not None and self._queued:
            self._waiting_since = now  # its client may wait for the answer before, or is not read meanwhile
            return
        allowed = limits.handshake_timeout_s if self._first else limits.message_timeout_s
        if self._waiting_since is not None and now - self._waiting_since > allowed:
            self.shared.counts["closed_request_timeout"] += 1
            if self._begun:
                self.transport.write(
                    b"HTTP/1.1 408 Request Timeout\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"
                )
            self.transport.close()

    @property
    def _idle(self) -> bool:
        """No byte of a request has come that has not been answered."""
        return self._answered and not self._begun

    @property
    def _answered(self) -> bool:
        """Every request that has come whole, or at least its headers, is answered."""
        return (self.cycle is None or self.cycle.response_complete) and not self.pipeline

    @property
    def _queued(self) -> bool:
        """The request that is arriving stands behind one that is being answered."""
        return bool(self.pipeline) or not (self._answered or self.cycle.more_body)

    def _begin(self) -> None:
        if not self._begun:
            self._begun = True
            if self._waiting_since is None:
                self._waiting_since = self.shared.loop.time()

    def _count_header(self, size: int) -> None:
        self._header_bytes += size
        if self._header_bytes > MAX_HEADER_BYTES:
            raise ValueError("headers too large")

    def _move(self, order: Leave) -> None:
        sock = duplicate_socket(self.transport)
        self._gone = True
        self._unset_keepalive_if_required()
        self.shared.https.discard(self)
        self.transport.abort()
        shared = self.shared

        def taken(gone: bool) -> None:
            if not gone and order.must:
                sock.close()
            elif not gone:
                shared.readopt(sock, {}, None)

        shared.hand_over(order, sock, {}, taken)
