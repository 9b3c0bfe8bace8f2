"""Checks of an HTTP request before the application: token, rate and size."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from defi_platform.serve.connections.access import Access, AccessError
from defi_platform.serve.http import pages

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
AsgiApp = Callable[[Scope, Receive, Send], Awaitable[None]]

OPEN_PATHS = ("/healthz", "/livez", *pages.PATHS)
"""Answered without a token: whoever restarts servers has none, and a browser has none before it shows the page."""

MAX_DISCARDED_BYTES = 256 * 2**20
"""Of a body that is too large; within `limits.message_timeout_s`."""


class BodyTooLargeError(Exception):
    """A request body over the limit."""


class NoMemoryError(Exception):
    """A request body for which there is no room now."""


class GuardedApp:
    """An ASGI application behind the checks."""

    def __init__(
        self, app: AsgiApp, access: Access, max_body_bytes: int, hold: Callable[[int], bool]
    ) -> None:
        """Puts the checks before an application.

        Args:
            app: behind them.
            access: tokens and rates.
            max_body_bytes: of one request.
            hold: counts bytes in memory (`SharedState.hold`); False: there is no room for them.
        """
        self._app = app
        self._access = access
        self._max_body_bytes = max_body_bytes
        self._hold = hold

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
        try:
            name = self._access.admit(headers.get(b"authorization", b"").decode("latin-1"))
        except AccessError as error:
            await _refuse(send, 401, str(error), (b"www-authenticate", b"Bearer"))
            return
        client = scope.get("client") or ("", 0)
        bucket = self._access.bucket(name, f"{client[0]}:{client[1]}") if scope["method"] == "POST" else None
        wait_s = bucket.take() if bucket is not None else 0.0
        if wait_s:
            retry = str(math.ceil(wait_s)).encode()
            await _refuse(
                send, 429, f"too many requests; come back in {wait_s:.2f} s.", (b"retry-after", retry)
            )
            return
        announced = headers.get(b"content-length", b"0")
        if announced.isdigit() and int(announced) > self._max_body_bytes:
            await self._refuse_size(receive, send)
            return
        await self._with_limited_body(scope, receive, send)

    async def _with_limited_body(self, scope: Scope, receive: Receive, send: Send) -> None:
        size, started = 0, False

        async def limited() -> Message:
            nonlocal size
            message = await receive()
            part = len(message.get("body", b""))
            size += part
            if not self._hold(part):
                raise NoMemoryError
            if size > self._max_body_bytes:
                raise BodyTooLargeError
            return message

        async def watched(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self._app(scope, limited, watched)
        except BodyTooLargeError:
            if started:
                raise
            await self._refuse_size(receive, send)
        except NoMemoryError:
            if started:
                raise
            await _refuse(
                send, 503, "too much is being read here (limits.memory_mib).", (b"retry-after", b"1")
            )
        finally:
            self._hold(-size)

    async def _refuse_size(self, receive: Receive, send: Send) -> None:
        # Most clients read nothing before they have sent everything, and would see a broken connection only.
        left = MAX_DISCARDED_BYTES
        while left > 0:
            message = await receive()
            left -= len(message.get("body", b""))
            if not message.get("more_body", False):
                break
        mib = self._max_body_bytes // 2**20
        await _refuse(
            send, 413, f"at most {mib} MiB are read (limits.max_message_mib); send smaller images.", None
        )


async def _refuse(send: Send, status: int, words: str, header: tuple[bytes, bytes] | None) -> None:
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
