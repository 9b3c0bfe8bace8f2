"""Watch over the loop of the sockets, from a thread beside it: one that no longer turns can say nothing itself."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Callable

from websockets.frames import Close, Frame, Opcode

from defi_platform.serve.protocols.wire import SERVICE_RESTART

CHECKS = 20
"""Looks at the loop within the time that it may stand still. They are counted, not the time: where the whole process
stood still, the loop gets as many turns afterwards."""

DOUBTED_AFTER_S = 1.5
"""Seconds without a turn of the loop after which new clients should rather go elsewhere."""

STALLED_FRAME = Frame(
    Opcode.CLOSE, Close(SERVICE_RESTART, "this replica stands still: connect again").serialize()
).serialize(mask=False)
STALLED_RESPONSE = (
    b"HTTP/1.1 503 Service Unavailable\r\nretry-after: 1\r\nconnection: close\r\n"
    b"content-type: text/plain\r\ncontent-length: 29\r\n\r\nthis replica stands still.  \n"
)


class Watchdog:
    """Calls a function once when a loop has not turned for some time."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, patience_s: float, on_stall: Callable[[], object]
    ) -> None:
        """Prepares a thread; `start` begins.

        Args:
            loop: that must turn.
            patience_s: seconds that it may take.
            on_stall: called in the thread of the watchdog.
        """
        self._loop, self._period_s, self._on_stall = loop, patience_s / CHECKS, on_stall
        self._missed = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def start(self) -> None:
        """Begins to watch."""
        self._thread.start()

    def stop(self) -> None:
        """Watches no longer."""
        self._stop.set()

    @property
    def stands_still(self) -> bool:
        """The loop has not turned for DOUBTED_AFTER_S."""
        return self._missed * self._period_s > DOUBTED_AFTER_S

    def _turned(self) -> None:
        self._missed = 0

    def _watch(self) -> None:
        while not self._stop.wait(self._period_s):
            if self._missed >= CHECKS:
                self._on_stall()
                return
            self._missed += 1
            try:
                self._loop.call_soon_threadsafe(self._turned)
            except RuntimeError:  # it has ended
                return


def send_past_loop(transport: asyncio.Transport, data: bytes) -> None:
    """Sends the last bytes of a connection from another thread than that of its loop, which stands still.

    Args:
        transport: plain TCP; nothing is sent behind bytes that it still holds.
        data: as much of it as the kernel takes at once.
    """
    if transport.get_write_buffer_size():
        return
    with contextlib.suppress(OSError), duplicate_socket(transport) as sock:
        sock.setblocking(False)
        sock.send(data)
        sock.shutdown(socket.SHUT_WR)


def duplicate_socket(transport: asyncio.Transport) -> socket.socket:
    """A second descriptor of a transport's socket.

    Args:
        transport: plain TCP.
    """
    copy: socket.socket = transport.get_extra_info("socket").dup()
    return copy
