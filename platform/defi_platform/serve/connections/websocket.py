"""One websocket: a message at a time is answered, and between two answers it may move to another process."""

from __future__ import annotations

import asyncio
import logging
from typing import Any, cast

from defi_platform.serve.connections.access import Bucket
from defi_platform.serve.connections.frames import MessageReader, shorten_reason
from defi_platform.serve.connections.shared import Leave, SharedState
from defi_platform.serve.connections.watchdog import STALLED_FRAME, duplicate_socket, send_past_loop
from defi_platform.serve.protocols.wire import ClientInfo, Reply, Wire
from defi_platform.serve.refusals import RateError

log = logging.getLogger(__name__)

GOING_AWAY, INTERNAL_ERROR = 1001, 1011
LINGER_S = 10.0
"""Seconds in which a client may read why it was closed before the connection is cut."""
FLUSH_S = 0.002
"""Seconds between two looks at whether an answer has left, before a socket moves."""


class WebSocketConnection(asyncio.Protocol):
    """One open websocket: bytes between a transport and a `Wire`."""

    def __init__(self, shared: SharedState, wire: Wire, bucket: Bucket | None) -> None:
        """Prepares for a transport.

        Args:
            shared: of the replica.
            wire: the dialogue with this client.
            bucket: its rate; None: no limit.
        """
        self.shared = shared
        self.wire = wire
        self._bucket = bucket
        if bucket is not None:
            wire.spend = bucket.spend
        self._reader = MessageReader(shared.max_message_bytes)
        self._transport: asyncio.Transport
        self._answer_task: asyncio.Task[None] | None = None
        self._held = 0
        self._gone = False
        """The connection is lost, or another process has it."""
        self._read_paused = False
        self._leave: Leave | None = None
        self._write_paused = False
        self._unread_since: float | None = None
        """When it was first seen that the client leaves something unread."""
        self._closing_since: float | None = None
        self._active_at = shared.loop.time()
        self.arriving_since: float | None = None
        """When the first byte of an incomplete message came."""

    @property
    def answering(self) -> bool:
        """A message is being answered."""
        return self._answer_task is not None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Takes the socket over.

        Args:
            transport: of the open websocket.
        """
        self._transport = cast(asyncio.Transport, transport)
        self.shared.websockets.add(self)
        self._leave = self.shared.leave

    def greet(self, handshake: bytes) -> None:
        """Sends the end of the handshake and the greeting.

        Args:
            handshake: status 101 and its headers.
        """
        greeting = self.wire.greeting()
        if greeting is not None:
            self._reader.send_binary(greeting)
        self._transport.write(b"".join([handshake, *self._reader.data_to_send()]))
        self._leave_if_possible()

    def restore(self, state: dict[str, Any]) -> None:
        """Takes in what another process had read. Before there is a transport, which reads on at once.

        Args:
            state: of `_state`; its wire has been resumed already.
        """
        self._reader.restore(state.get("message"), state.get("unread", b""))

    def resume(self, leave: Leave | None) -> None:
        """Goes on where another process stopped, or where handing over failed.

        Args:
            leave: None: it stays; otherwise it is closed, and its client asks somebody else.
        """
        if leave is not None:
            self.close(leave.code, leave.reason)
            return
        self._after_input()
        self._leave_if_possible()

    def data_received(self, data: bytes) -> None:
        """Reads bytes of the client.

        Args:
            data: as they came.
        """
        self._reader.receive_data(data)
        self._after_input()

    def eof_received(self) -> None:
        """The client has hung up; the transport closes itself."""

    def connection_lost(self, exc: Exception | None) -> None:
        """Forgets the socket and gives up its answer.

        Args:
            exc: what happened; None after a close.
        """
        if not self._gone:
            self._forget()
        self._give_up_answer()

    def pause_writing(self) -> None:
        """The client does not read its answers: it gets no more, and what it sends is not read."""
        self._write_paused = True
        self._pause_reading(True)

    def resume_writing(self) -> None:
        """The client has read."""
        self._write_paused = False
        self._after_input()

    def leave(self, order: Leave) -> None:
        """Leaves as soon as the order allows.

        Args:
            order: whither, and when.
        """
        self._leave = order
        self._leave_if_possible()

    def close(self, code: int, reason: str) -> None:
        """Closes the websocket; the connection ends once the client has seen it.

        Args:
            code: of the close frame.
            reason: for the client; shortened to 123 bytes.
        """
        if self._gone or self._closing_since is not None:
            return
        if self._reader.is_open and self._reader.at_boundary:
            self._reader.send_close(code, shorten_reason(reason))
        elif self._reader.is_open:
            self._reader.fail(code, reason)  # what has come of a message is freed, the rest is not kept
        self._begin_closing()

    def abort(self) -> None:
        """Cuts the connection off."""
        self._transport.abort()

    def say_goodbye(self) -> None:
        """Asks the client to connect again, past a loop that stands still. Called from another thread."""
        if self._gone or self._closing_since is not None or self._is_tls:
            return
        send_past_loop(self._transport, STALLED_FRAME)

    def check_times(self, now: float) -> None:
        """Ends what has taken too long. Called about once a second.

        Args:
            now: the loop's time in seconds.
        """
        limits = self.shared.limits
        unread = self._transport.get_write_buffer_size() > 0
        self._unread_since = (self._unread_since or now) if unread else None
        if self._closing_since is not None:
            if now - self._closing_since > LINGER_S:
                self._transport.abort()
        elif self._unread_since is not None and now - self._unread_since > limits.write_timeout_s:
            self.shared.counts["closed_write_timeout"] += 1
            self._transport.abort()
        elif self.arriving_since is not None and now - self.arriving_since > limits.message_timeout_s:
            self.shared.counts["closed_message_timeout"] += 1
            self.close(
                1008, f"a message must arrive within {limits.message_timeout_s:g} s (message_timeout_s)"
            )
        elif not self.answering and now - self._active_at > limits.idle_timeout_s:
            self.shared.counts["closed_idle"] += 1
            self.close(GOING_AWAY, f"no message for {limits.idle_timeout_s:g} s (limits.idle_timeout_s)")

    def _after_input(self) -> None:
        """Sends what the reader has to send and answers a message that has come."""
        reader = self._reader
        self._flush()
        if self._gone:
            return
        if self._closing_since is None:
            if not reader.is_open:
                self._begin_closing()
            elif reader.message is not None and not self.answering and not self._write_paused:
                self.arriving_since = None
                self.shared.answering += 1
                self._answer_task = self.shared.loop.create_task(self._answer(reader.message))
            elif reader.message is None and not reader.at_boundary:
                self.arriving_since = self.arriving_since or self.shared.loop.time()
        self._count_held()
        self._pause_reading(reader.full or self._write_paused)

    async def _answer(self, message: bytes | str) -> None:
        try:
            wait_s = self._bucket.take() if self._bucket is not None else 0.0
            reply = await (
                self.wire.turn_away(message, RateError(wait_s)) if wait_s else self.wire.answer(message)
            )
        except asyncio.CancelledError:
            reply = Reply(close=(INTERNAL_ERROR, "the server gave up this message"))
        except Exception:
            log.exception("a message of %s could not be answered", self.wire.client)
            self.shared.counts["closed_error"] += 1
            reply = Reply(close=(INTERNAL_ERROR, "the server failed on this message; its log says why"))
        if self._answer_task is not None:  # it has not been given up
            self._answer_task = None
            self.shared.answering -= 1
            self._send(reply, message)

    def _give_up_answer(self) -> None:
        if self._answer_task is not None:
            # Counted here: a task that is cancelled before its first step never runs.
            self._answer_task.cancel()
            self._answer_task = None
            self.shared.answering -= 1

    def _send(self, reply: Reply, message: bytes | str) -> None:
        self._active_at = self.shared.loop.time()
        if reply.hand_over:
            self._reader.forget_message()
            self._depart(self._leave or self.shared.leave, message)
            return
        if isinstance(reply.data, str):
            self._reader.send_text(reply.data.encode())
        elif reply.data is not None:
            self._reader.send_binary(reply.data)
        self.shared.counts["answers"] += 1
        if reply.close is not None:
            self.close(*reply.close)
            return
        self._reader.forget_message()
        self._flush()
        if not self._leave_if_possible():
            self._go_on()

    def _go_on(self) -> None:
        self._reader.release()
        self._after_input()

    def _leave_if_possible(self) -> bool:
        """Begins to leave if the order allows it now; asked again after each answer."""
        order = self._leave
        if order is None or self.answering or self._gone or not self._reader.is_open:
            return False
        self.wire.leaving = order.when == "episodes"
        if self._reader.message is not None or not self._reader.at_boundary:
            return False  # a message is here or on its way: it is answered first
        if order.when == "episodes" and not self.wire.between_episodes:
            return False
        self._depart(order, None)
        return True

    def _depart(self, order: Leave | None, message: bytes | str | None) -> None:
        self._reader.hold()
        if self._gone or self._closing_since is not None:
            return
        # A ping of which a part has come would be lost on the way.
        if self._transport.get_write_buffer_size() or not self._reader.at_boundary:
            self.shared.loop.call_later(FLUSH_S, self._depart, order, message)
            return
        can_move = order is not None and order.hand_over is not None and not self._is_tls
        if order is not None and can_move:
            self._move(order, message)
        elif order is None or order.must or message is not None:
            code, reason = (order.code, order.reason) if order else (1012, "connect again")
            self.close(code, reason)
        else:
            self._leave = None
            self._go_on()

    @property
    def _is_tls(self) -> bool:
        return self._transport.get_extra_info("sslcontext") is not None

    def _move(self, order: Leave, message: bytes | str | None) -> None:
        sock = duplicate_socket(self._transport)
        state = self._state(message)
        self._forget()
        self._transport.abort()  # of this descriptor only: it closes without a word, the connection lives on
        shared = self.shared

        def taken(gone: bool) -> None:
            if not gone:
                shared.readopt(sock, state, order if order.must or message is not None else None)

        shared.hand_over(order, sock, state, taken)

    def _state(self, message: bytes | str | None) -> dict[str, Any]:
        client = self.wire.client
        state: dict[str, Any] = {
            "address": client.address,
            "name": client.name,
            "path": client.path,
            "query": client.query,
            "wire": self.wire.state(),
            "unread": self._reader.unread,
        }
        if message is not None:
            state["message"] = message
        return state

    def _begin_closing(self) -> None:
        self._closing_since = self.shared.loop.time()
        self.arriving_since = None
        self._give_up_answer()
        self._reader.release()  # to see the client's close frame
        self._flush()
        self._count_held()
        self._pause_reading(False)

    def _count_held(self) -> None:
        held = self._reader.held_bytes
        change, self._held = held - self._held, held
        self.shared.hold(change)

    def _flush(self) -> None:
        output = self._reader.data_to_send()
        if not output or self._gone:
            return
        if not self._transport.get_write_buffer_size():
            self._unread_since = None  # the answer before has been read
        self._transport.write(b"".join(output))
        if output[-1] == b"":  # the sentinel of websockets: nothing follows
            if self._reader.close_rcvd is None and self._transport.can_write_eof():
                # The client may still be sending. Cutting it off now would take the close frame from it.
                self._transport.write_eof()
            else:
                self._transport.close()

    def _pause_reading(self, pause: bool) -> None:
        if pause == self._read_paused or self._transport.is_closing():
            return
        self._read_paused = pause
        if pause:
            self._transport.pause_reading()
        else:
            self._transport.resume_reading()

    def _forget(self) -> None:
        self._gone = True
        self.arriving_since = None
        self.shared.websockets.discard(self)
        self.shared.hold(-self._held)
        self._held = 0


def client_of(state: dict[str, Any]) -> ClientInfo:
    """The client of a moved websocket.

    Args:
        state: that came with it.
    """
    return ClientInfo(state["address"], state["name"], state["path"], state["query"])
