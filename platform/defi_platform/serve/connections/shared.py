"""The common state of all sockets of a replica: the service, the limits, the counts, and whether they are leaving."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from defi_platform.config import LimitsConfig
from defi_platform.serve.connections.access import Access
from defi_platform.serve.protocols.wire import TRY_AGAIN_LATER, WireSettings

if TYPE_CHECKING:
    from defi_platform.serve.connections.http_connection import HttpConnection
    from defi_platform.serve.connections.websocket import WebSocketConnection
    from defi_platform.serve.inference.service import ActionService

log = logging.getLogger(__name__)

HandOver = Callable[[socket.socket, dict[str, Any]], bool]
"""Passes a socket and its state on, and owns the socket then; False if nobody took it. An empty state is a socket between
two HTTP requests."""


@dataclass(frozen=True)
class Leave:
    """An order to sockets to leave."""

    when: str
    """Between two "answers", or only between two "episodes"."""
    hand_over: HandOver | None
    """Who takes them; None: they are closed."""
    code: int
    """Of the close frame, where a socket cannot be handed over."""
    reason: str
    must: bool = True
    """A socket that cannot be handed over is closed; otherwise it stays."""


class SharedState:
    """The sockets of one replica and what they have in common. Used on the loop only, but for its counts."""

    def __init__(
        self,
        service: ActionService,
        limits: LimitsConfig,
        access: Access,
        max_connections: int,
        wires: WireSettings | None = None,
    ) -> None:
        """Prepares for sockets.

        Args:
            service: answers their observations.
            limits: of each and of all.
            access: who may come in.
            max_connections: open websockets; the next client is turned away.
            wires: of their dialogues; the defaults when None.
        """
        self.wires = wires
        self.service = service
        self.limits = limits
        self.access = access
        self.max_connections = max_connections
        self.loop: asyncio.AbstractEventLoop
        self.websockets: set[WebSocketConnection] = set()
        self.https: set[HttpConnection] = set()
        self.leave: Leave | None = None
        """Given to every socket there is and that comes."""
        self.held_bytes = 0
        """Received and not yet answered, of all sockets."""
        self.answering = 0
        self.counts: Counter[str] = Counter()
        """Events since the start by reason: answers, moved, closed_<why>, refused_<why>."""
        self.moving = 0
        """Sockets that are being handed over: nobody's yet."""
        self.readopt: Callable[[socket.socket, dict[str, Any], Leave | None], None]
        self._movers = ThreadPoolExecutor(max_workers=2, thread_name_prefix="move")

    @property
    def max_message_bytes(self) -> int:
        """Bytes of one message, at most."""
        return self.limits.max_message_mib * 2**20

    def connections(self) -> list[WebSocketConnection | HttpConnection]:
        """All open sockets."""
        return [*self.websockets, *self.https]

    def hand_over(
        self,
        order: Leave,
        sock: socket.socket,
        state: dict[str, Any],
        taken: Callable[[bool], None],
    ) -> None:
        """Passes a socket on in a thread of its own.

        Args:
            order: names who takes it.
            sock: and
            state: as `HandOver` takes them.
            taken: called on the loop with whether somebody took it; false: the socket is the caller's again.
        """
        assert order.hand_over is not None
        self.moving += 1

        def done(result: asyncio.Future[bool]) -> None:
            error = result.exception()
            if error is not None:
                log.warning("a socket could not be handed over: %r", error)
            gone = error is None and result.result()
            self.counts["moved" if gone else "not_moved"] += 1
            taken(gone)
            self.moving -= 1

        self.loop.run_in_executor(self._movers, order.hand_over, sock, state).add_done_callback(done)

    def close(self) -> None:
        """Ends the threads."""
        self._movers.shutdown(wait=False)

    def hold(self, change: int) -> bool:
        """Counts received bytes and, past the limit, gives up the message that has been arriving for longest.

        Args:
            change: bytes received (or, negative, answered).

        Returns:
            False if all are over the limit nevertheless.
        """
        self.held_bytes += change
        allowed = self.limits.memory_mib * 2**20
        while change > 0 and self.held_bytes > allowed:
            arriving = [websocket for websocket in self.websockets if websocket.arriving_since is not None]
            if not arriving:
                return False
            oldest = min(arriving, key=lambda websocket: websocket.arriving_since or 0.0)
            self.counts["closed_memory"] += 1
            oldest.close(
                TRY_AGAIN_LATER,
                f"over {self.limits.memory_mib} MiB of messages wait here (limits.memory_mib)",
            )
        return True
