"""Messages out of the bytes of one websocket, one at a time and within limits."""

from __future__ import annotations

import time
from collections.abc import Generator

from websockets.frames import Frame, Opcode
from websockets.http11 import Request, Response
from websockets.protocol import State
from websockets.server import ServerProtocol
from websockets.streams import StreamReader

from defi_platform.serve.protocols.wire import POLICY_VIOLATION, TOO_BIG

MAX_FRAGMENTS = 1024
"""Frames of one message. Each costs some 10 us, so a message in crumbs would hold up every other socket."""
MAX_CONTROL_FRAMES_PER_S = 64
"""Pings and pongs of one socket: a robot sends one in 20 seconds."""
MAX_REASON_BYTES = 123
"""Of a close frame, by RFC 6455."""


def shorten_reason(reason: str) -> str:
    """The reason of a close frame, cut to what fits into one."""
    data = reason.encode()
    return (
        reason
        if len(data) <= MAX_REASON_BYTES
        else data[: MAX_REASON_BYTES - 3].decode(errors="ignore") + "..."
    )


class _HoldingReader(StreamReader):
    """While it holds, the parser sees control frames only: whatever follows the first other frame stays bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.holding = False
        self.at_frame = True
        """The parser waits for the first byte of a frame."""

    def at_eof(self) -> Generator[None, None, bool]:
        """Called at the start of each frame; yields while there is none to parse."""
        self.at_frame = True
        while self.holding and not (self.buffer and self.buffer[0] & 0x08):
            yield
        ended = yield from super().at_eof()
        self.at_frame = False
        return ended


class MessageReader(ServerProtocol):
    """An open websocket without the socket: bytes in, messages out.

    After a message it reads no further until `release`: a client that sends ahead is held back by TCP, and what has
    been received of its next messages is not even parsed. Pings are answered and a close is seen all the time.
    """

    def __init__(self, max_message_bytes: int) -> None:
        """Prepares to read the first frame.

        Args:
            max_message_bytes: a longer message closes the socket with 1009.
        """
        super().__init__(state=State.OPEN, max_size=max_message_bytes)
        self._bytes = _HoldingReader()
        self.reader = self._bytes
        self.parser = self.parse()  # the one that the base class started waits at its own reader
        next(self.parser)
        self.message: bytes | str | None = None
        """The message that has come, until `release`."""
        self._fragments: list[bytes] = []
        self._is_text = False
        self._second, self._control_frames = 0, 0

    @property
    def unread(self) -> bytes:
        """Received bytes that belong to later messages; they begin a frame if `at_boundary`."""
        return bytes(self._bytes.buffer)

    @property
    def held_bytes(self) -> int:
        """Received bytes in memory, those of `message` included."""
        size = len(self._bytes.buffer) + (self.current_size or 0)
        return size if self.message is None else size + len(self.message)

    @property
    def at_boundary(self) -> bool:
        """No frame and no message is half received, so that another process could read on from here."""
        return self.current_size is None and self._bytes.at_frame

    @property
    def full(self) -> bool:
        """A message waits and bytes of the next have come: the socket need not be read."""
        return self._bytes.holding and self._bytes.at_frame and bool(self._bytes.buffer)

    @property
    def is_open(self) -> bool:
        """No close frame has been sent or received."""
        return self.state is State.OPEN

    def release(self) -> None:
        """Goes on after a message; the next may be there at once, in `message`."""
        self.message = None
        self._bytes.holding = False
        next(self.parser)

    def hold(self) -> None:
        """Parses nothing more but control frames: what comes stays in `unread`."""
        self._bytes.holding = True

    def forget_message(self) -> None:
        """Frees an answered message; the next is not parsed before `release`."""
        self.message = None

    def restore(self, message: bytes | str | None, unread: bytes) -> None:
        """Goes on where the reader of another process stopped.

        Args:
            message: to be answered first; None if there is none.
            unread: its `unread`.
        """
        self.message = message
        self._bytes.holding = message is not None
        self.receive_data(unread)

    def recv_frame(self, frame: Frame) -> None:
        """Takes one frame in; the parser turns exceptions into close frames.

        Args:
            frame: complete and unmasked.
        """
        super().recv_frame(frame)
        self.events.clear()
        if frame.opcode in (Opcode.PING, Opcode.PONG):
            self._count_control_frame()
        elif frame.opcode is not Opcode.CLOSE and self.is_open:
            self._take(frame)

    def fail(self, code: int, reason: str = "") -> None:
        """Closes the websocket because of what came; what follows is discarded.

        Args:
            code: of the close frame.
            reason: for the client; shortened.
        """
        if code == TOO_BIG:
            reason = f"{reason}; send smaller images (limits.max_message_mib)"
        self._bytes.holding = False
        self._fragments.clear()
        super().fail(code, shorten_reason(reason))

    def _count_control_frame(self) -> None:
        second = int(time.monotonic())
        if second != self._second:
            self._second, self._control_frames = second, 0
        self._control_frames += 1
        if self._control_frames > MAX_CONTROL_FRAMES_PER_S:
            self.fail(POLICY_VIOLATION, f"more than {MAX_CONTROL_FRAMES_PER_S} pings and pongs a second")

    def _take(self, frame: Frame) -> None:
        if frame.opcode is not Opcode.CONT:
            self._is_text = frame.opcode is Opcode.TEXT
        if frame.fin and not self._fragments:
            data = bytes(frame.data)
        else:
            self._fragments.append(bytes(frame.data))
            if len(self._fragments) > MAX_FRAGMENTS:
                self.fail(POLICY_VIOLATION, f"a message in more than {MAX_FRAGMENTS} frames")
                return
            if not frame.fin:
                return
            data = b"".join(self._fragments)
            self._fragments.clear()
        self.message = data.decode() if self._is_text else data
        self._bytes.holding = True


def answer_handshake(request: Request) -> Response:
    """The server's half of a websocket handshake, without compression and subprotocols.

    Args:
        request: of the client.

    Returns:
        Status 101, or what is wrong with the request.
    """
    return ServerProtocol(state=State.CONNECTING).accept(request)
