"""Checks of an HTTP request before the application: token, rate and size."""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from defi_platform.serve.connections.access import Access, AccessError
from defi_platform.serve.http import pages
from defi_platform.serve.protocols.wire import SPEND

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
AsgiApp = Callable[[Scope, Receive, Send], Awaitable[None]]
_Refusal = tuple[int, str, tuple[bytes, bytes] | None]
"""Status, words and a header."""

OPEN_PATHS = ("/healthz", "/-/healthz", "/livez", *pages.PATHS)
"""Answered without a token: whoever restarts servers has none, and a browser has none before it shows the page."""

MAX_DISCARDED_BYTES = 256 * 2**20
"""Of a body that is refused; within `limits.message_timeout_s`."""
PATIENCE_S = 1.0
"""Seconds in which more of a refused body must come; its sender may be waiting for the answer."""


class GuardedApp:
    """An ASGI application behind the checks."""

    def __init__(
        self,
        app: AsgiApp,
        access: Access,
        max_body_bytes: int,
        hold: Callable[[int], bool],
        counts: Counter[str],
    ) -> None:
        """Puts the checks before an application.

        Args:
            app: behind them.
            access: tokens and rates.
            max_body_bytes: of one request.
            hold: counts bytes in memory (`SharedState.hold`); False: there is no room for them.
            counts: of refusals by status, as refused_<status>.
        """
        self._app = app
        self._access = access
        self._max_body_bytes = max_body_bytes
        self._hold = hold
        self._counts = counts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers a request, or refuses it in words.

        Args:
            scope: of the request.
            receive: gives its body.
            send: takes the response.
        """
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS:
            await self._app(scope, receive, send)
            return
        headers: dict[bytes, bytes] = dict(scope["headers"])
        refusal = self._refusal(scope, headers)
        if refusal is not None:
            await self._refuse(receive, send, refusal, discard=b"expect" not in headers)
            return
        await self._with_whole_body(scope, receive, send)

    def _refusal(self, scope: Scope, headers: dict[bytes, bytes]) -> _Refusal | None:
        """A refusal for which the headers alone are enough; None: there is none."""
        try:
            name = self._access.admit(headers.get(b"authorization", b"").decode("latin-1"))
        except AccessError as error:
            return 401, str(error), (b"www-authenticate", b"Bearer")
        client = scope.get("client") or ("", 0)
        bucket = self._access.bucket(name, f"{client[0]}:{client[1]}") if scope["method"] == "POST" else None
        wait_s = bucket.take() if bucket is not None else 0.0
        if bucket is not None:
            scope[SPEND] = bucket.spend
        if wait_s:
            retry = (b"retry-after", str(math.ceil(wait_s)).encode())
            return 429, f"too many requests; come back in {wait_s:.2f} s.", retry
        announced = headers.get(b"content-length", b"0")
        if announced.isdigit() and int(announced) > self._max_body_bytes:
            return self._too_large()
        return None

    async def _with_whole_body(self, scope: Scope, receive: Receive, send: Send) -> None:
        # Read here and not by the application, which would answer an exception out of `receive` by itself, with 500.
        parts: list[bytes] = []
        size, more = 0, True
        refusal: _Refusal | None = None
        try:
            while more and refusal is None:
                message = await receive()
                if message["type"] == "http.disconnect":
                    return
                parts.append(message.get("body", b""))
                more = message.get("more_body", False)
                size += len(parts[-1])
                if size > self._max_body_bytes:
                    refusal = self._too_large()
                if not self._hold(len(parts[-1])):
                    words = "too much is being read here (limits.memory_mib)."
                    refusal = 503, words, (b"retry-after", b"1")
            if refusal is None:
                body: Message = {"type": "http.request", "body": b"".join(parts), "more_body": False}
                parts.clear()
                await self._app(scope, _once(body, receive), send)
        finally:
            self._hold(-size)
        if refusal is not None:
            parts.clear()
            await self._refuse(receive, send, refusal, discard=more)

    async def _refuse(self, receive: Receive, send: Send, refusal: _Refusal, *, discard: bool) -> None:
        self._counts[f"refused_{refusal[0]}"] += 1
        await _refuse(receive, send, refusal, discard=discard)

    def _too_large(self) -> _Refusal:
        mib = self._max_body_bytes // 2**20
        return 413, f"at most {mib} MiB are read (limits.max_message_mib); send smaller images.", None


def _once(first: Message, receive: Receive) -> Receive:
    """Gives the body, then what `receive` gives: the news that the client has gone."""
    waiting = [first]

    async def next_message() -> Message:
        return waiting.pop() if waiting else await receive()

    return next_message


async def _refuse(receive: Receive, send: Send, refusal: _Refusal, *, discard: bool) -> None:
    status, words, header = refusal
    # Most clients read nothing before they have sent everything, and would see a broken connection only.
    left = MAX_DISCARDED_BYTES if discard else 0
    while left > 0:
        try:
            message = await asyncio.wait_for(receive(), PATIENCE_S)
        except TimeoutError:
            break
        left -= len(message.get("body", b""))
        if not message.get("more_body", False):
            break
    body = f"{words}\n".encode()
    headers = [
        (b"content-type", b"text/plain; charset=utf-8"),
        (b"content-length", str(len(body)).encode()),
        (b"connection", b"close"),
    ]
    if header is not None:
        headers.append(header)
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
