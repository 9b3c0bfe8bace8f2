"""From an HTTP request to an open websocket: path, origin, token and room are checked here."""

from __future__ import annotations

import asyncio
from urllib.parse import urlsplit

from websockets.datastructures import Headers
from websockets.http11 import Request, Response

from defi_platform.serve.connections.access import AccessError
from defi_platform.serve.connections.frames import answer_handshake
from defi_platform.serve.connections.shared import SharedState
from defi_platform.serve.connections.websocket import WebSocketConnection
from defi_platform.serve.protocols.routes import WIRES, wire_class
from defi_platform.serve.protocols.wire import TRY_AGAIN_LATER, ClientInfo
from defi_platform.serve.refusals import Refusal


def open_websocket(
    shared: SharedState,
    transport: asyncio.Transport,
    method: str,
    url: bytes,
    headers: list[tuple[bytes, bytes]],
    ahead: bytes = b"",
) -> None:
    """Answers a handshake and, if it fits, lets a websocket take the transport over.

    Args:
        shared: of the replica.
        transport: of the HTTP connection that brought the handshake.
        method: of the request; only GET opens a websocket.
        url: its target: path and query.
        headers: name in lower case and value, in order.
        ahead: bytes that came behind the handshake.
    """
    if method != "GET":
        _refuse(shared, transport, 405, f"a websocket is opened with GET, not with {method}.")
        return
    request = Request(
        url.decode("latin-1"), Headers([(n.decode("latin-1"), v.decode("latin-1")) for n, v in headers])
    )
    path, _, query = request.path.partition("?")
    wire = wire_class(path)
    if wire is None:
        paths = ", ".join(sorted(WIRES))
        _refuse(shared, transport, 404, f"no websocket protocol at {path[:200]}; there are {paths}.")
        return
    if not _same_origin(request.headers):
        _refuse(shared, transport, 403, "pages of other hosts may not use this policy (Origin).")
        return
    try:
        name = shared.access.admit(_one(request.headers, "Authorization"))
    except AccessError as error:
        _refuse(shared, transport, 401, str(error))
        return
    response = answer_handshake(request)
    if response.status_code != 101:
        shared.counts["refused_handshake"] += 1
        transport.write(response.serialize())
        transport.close()
        return
    client = ClientInfo(_address(transport), name, path, query)
    try:
        dialogue = wire(shared.service, client, shared.wires)
    except Refusal as refusal:
        _refuse(shared, transport, 400, str(refusal))
        return
    websocket = WebSocketConnection(shared, dialogue, shared.access.bucket(name, client.address))
    full = len(shared.websockets) >= shared.max_connections
    websocket.connection_made(transport)
    transport.set_protocol(websocket)
    if full:
        # Accepted and closed: openpi-client shows the reason of a close frame, but not the body of a response.
        shared.counts["refused_full"] += 1
        transport.write(response.serialize())
        websocket.close(
            TRY_AGAIN_LATER, f"all {shared.max_connections} connections are taken (max_connections)"
        )
        return
    shared.counts["websockets"] += 1
    websocket.greet(response.serialize())
    if ahead:
        websocket.data_received(ahead)


def _refuse(shared: SharedState, transport: asyncio.Transport, status: int, words: str) -> None:
    shared.counts[f"refused_{status}"] += 1
    phrase = {
        400: "Bad Request",
        401: "Unauthorized",
        403: "Forbidden",
        404: "Not Found",
        405: "Method Not Allowed",
    }[status]
    body = f"{words}\n".encode()
    headers = Headers([("Content-Type", "text/plain; charset=utf-8"), ("Content-Length", str(len(body)))])
    headers["Connection"] = "close"
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    transport.write(Response(status, phrase, headers, body).serialize())
    transport.close()


def _same_origin(headers: Headers) -> bool:
    """Browsers name the page that opens a websocket; robots do not."""
    origin, host = _one(headers, "Origin"), _one(headers, "Host")
    try:
        return origin is None or (host is not None and urlsplit(origin).netloc.lower() == host.lower())
    except ValueError:  # no address at all, such as "http://["
        return False


def _one(headers: Headers, name: str) -> str | None:
    values = headers.get_all(name)
    return values[0] if len(values) == 1 else None


def _address(transport: asyncio.Transport) -> str:
    peer = transport.get_extra_info("peername")
    return f"{peer[0]}:{peer[1]}" if isinstance(peer, tuple) else ""
