"""HTTP connections of clients that are broken or hostile: one clear answer each, bounded memory and time."""

from __future__ import annotations

import asyncio
import http.client
import logging
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import pytest
from replica_in_process import served
from sleeping_policy import HANDSHAKE, Place, SleepingService, app, serving, until

from defi_platform.config import LimitsConfig, SecurityConfig
from defi_platform.serve.connections import http_connection
from defi_platform.serve.connections.server import SocketServer

CHUNKED = b"POST /v1/act HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"


@contextmanager
def serving_app(application: Any, **limits: float) -> Iterator[Place]:
    service = SleepingService()
    server = SocketServer(
        cast(Any, service), application, limits=LimitsConfig(**cast(Any, limits)), security=SecurityConfig()
    )
    server.start()
    place = Place(server, service)
    try:
        yield place
    finally:
        place.stop()


def exchange(port: int, data: bytes, answers: int = 1) -> bytes:
    """What comes back until the server ends the connection or so many answers have come."""
    received = b""
    with socket.create_connection(("127.0.0.1", port), timeout=60) as sock:
        sock.sendall(data)
        while received.count(b"HTTP/1.1 ") < answers or b"\r\n\r\n" not in received:
            if not (part := sock.recv(65536)):
                break
            received += part
    return received


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (HANDSHAKE.replace(b"Host: x", b"Host: x\r\nOrigin: http://["), b"403"),
        (HANDSHAKE.replace(b"GET", b"POST"), b"405"),
    ],
)
def test_handshakes_that_are_none_are_refused_without_a_word_in_the_log(
    request_: bytes, status: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    with serving() as place:
        assert exchange(place.port, request_).startswith(b"HTTP/1.1 " + status)
    assert not caplog.records


def test_an_answer_never_gets_into_a_websocket_that_was_opened_behind_its_request() -> None:
    with serving() as place:
        received = exchange(
            place.port, b"POST /a HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n" + HANDSHAKE
        )
        assert b" 101 " not in received and b"must wait for the answer to the request before" in received


@pytest.mark.parametrize(
    "body",
    [b"0\r\nX: " + b"a" * 2**20, b"1\r\na\r\n" * 2**17, b"1" + b";a" * 2**19],
    ids=["trailer", "crumbs", "extension"],
)
def test_a_body_with_more_framing_than_content_is_given_up(body: bytes) -> None:
    with serving() as place:
        try:
            received = exchange(place.port, CHUNKED + body)
            assert received.startswith(b"HTTP/1.1 400") and b"send larger chunks" in received
        except ConnectionError:  # it was still sending
            pass
        assert place.server.load()["counts"]["refused_400"] == 1


def test_chunks_of_an_ordinary_size_are_read() -> None:
    with serving() as place:
        chunks = b"40\r\n" + b"a" * 64 + b"\r\n"
        assert exchange(place.port, CHUNKED + chunks * 20_000 + b"0\r\nX: y\r\n\r\n").startswith(
            b"HTTP/1.1 200"
        )


def test_a_body_that_waits_behind_another_request_is_not_a_slow_one() -> None:
    async def slow(scope: Any, receive: Any, send: Any) -> None:
        await asyncio.sleep(1.5 if scope["path"] == "/slow" else 0)
        await app(scope, receive, send)

    with serving_app(slow, message_timeout_s=1.0) as place:
        first = b"GET /slow HTTP/1.1\r\nHost: x\r\n\r\n"
        second = b"POST /next HTTP/1.1\r\nHost: x\r\nContent-Length: 300000\r\n\r\n" + b"x" * 300_000
        received = exchange(place.port, first + second, answers=2)
        assert received.count(b"HTTP/1.1 200") == 2 and b"/slow 0" in received, received


@pytest.mark.parametrize("last", [b"\0\r\n\r\n", HANDSHAKE.replace(b"GET /", b"GET /nowhere")])
def test_a_client_that_does_not_read_its_refusal_is_cut_off(
    monkeypatch: pytest.MonkeyPatch, last: bytes
) -> None:
    monkeypatch.setattr(http_connection, "LINGER_S", 0.1)

    async def big(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"50000")]})
        await send({"type": "http.response.body", "body": bytes(50_000)})

    with serving_app(big) as place, socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect(("127.0.0.1", place.port))
        until(lambda: place.server.load()["https"] == 1, "the connection")
        (connection,) = place.server._shared.https
        while not connection.transport.get_write_buffer_size():
            sock.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            time.sleep(0.005)
        sock.sendall(last)
        until(lambda: connection.transport.is_closing(), "the refusal")
        assert place.server.load()["sockets"] == 1, "it counts until it is gone"
        until(lambda: place.server.load()["sockets"] == 0, "its end")


def test_a_client_learns_why_its_large_body_was_refused(tmp_path: Any) -> None:
    (tmp_path / "tokens").write_text("robot: " + "a" * 20)
    for settings, status, words in (
        ({"tokens": str(tmp_path / "tokens")}, 401, "asks for a token"),
        ({"rate": 0.001}, 429, "too many requests"),
    ):
        with serving(**settings) as place:
            for _ in range(2):  # the first uses up the rate
                connection = http.client.HTTPConnection("127.0.0.1", place.port, timeout=60)
                connection.request("POST", "/v1/act", bytes(6 * 2**20))
                response = connection.getresponse()
                said = response.read().decode()
            assert response.status == status and words in said


def test_the_application_itself_refuses_bodies_in_words_and_logs_none(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """An exception out of `receive` is answered by FastAPI with 500 and a traceback."""
    piece = b"10000\r\n" + b"a" * 65536 + b"\r\n"
    whole = b"POST /v1/act HTTP/1.1\r\nHost: x\r\nContent-Length: 1048576\r\n\r\n"
    with (
        caplog.at_level(logging.WARNING),
        served(limits=LimitsConfig(max_message_mib=1, memory_mib=2)) as server,
    ):
        assert exchange(server.port, CHUNKED + piece * 20 + b"0\r\n\r\n").startswith(b"HTTP/1.1 413")
        others = [socket.create_connection(("127.0.0.1", server.port), timeout=60) for _ in range(2)]
        for sock in others:
            sock.sendall(whole + bytes(1_000_000))
        until(lambda: server.server.load()["held_bytes"] == 2_000_000, "bodies to wait")
        received = exchange(server.port, CHUNKED + piece * 2)
        assert received.startswith(b"HTTP/1.1 503") and b"retry-after: 1" in received
        for sock in others:
            sock.close()
        until(lambda: server.server.load()["held_bytes"] == 0, "them to be forgotten")
    assert not caplog.records
