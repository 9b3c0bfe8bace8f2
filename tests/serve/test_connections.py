"""Websockets over real sockets: one message at a time, limits with words, slow and lost clients."""

from __future__ import annotations

import io
import logging
import socket
import struct
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from openpi_client.websocket_client_policy import WebsocketClientPolicy
from sleeping_policy import HANDSHAKE, Place, frame, observation, raw, serving, until
from websockets.client import ClientProtocol
from websockets.exceptions import ConnectionClosed
from websockets.frames import Opcode
from websockets.protocol import State
from websockets.sync.client import ClientConnection, connect
from websockets.uri import parse_uri

from defi_platform.serve.connections import server as server_module
from defi_platform.serve.protocols import openpi


def client(place: Place, path: str = "/") -> ClientConnection:
    """A greeted websocket."""
    websocket = connect(place.url + path, compression=None, max_size=None, proxy=None)
    websocket.recv()
    return websocket


def close_code(sock: socket.socket) -> tuple[int, str]:
    """Code and reason of the close frame that ends what the server sends."""
    reader = ClientProtocol(parse_uri("ws://x"), state=State.OPEN, max_size=None)
    while reader.close_rcvd is None:
        part = sock.recv(65536)
        assert part, "the connection ended without a close frame"
        reader.receive_data(part)
    sock.sendall(b"".join(reader.data_to_send()))
    return reader.close_rcvd.code, reader.close_rcvd.reason


def test_openpi_clients_each_get_their_own_answers() -> None:
    with serving(0.002) as place, ThreadPoolExecutor(16) as threads:

        def episode(number: int) -> list[float]:
            robot = WebsocketClientPolicy(place.url)
            return [robot.infer(observation(100 * number + n))["actions"][0, 0] for n in range(5)]

        answers = list(threads.map(episode, range(16)))
    assert answers == [[100 * number + n for n in range(5)] for number in range(16)]


def test_messages_sent_ahead_stay_unread_and_are_answered_in_turn() -> None:
    with serving() as place:
        place.hold()
        sock = raw(place)
        ahead = b"".join(frame(openpi.pack(observation(n))) for n in range(4))
        sock.sendall(ahead)
        until(lambda: place.server.load()["answering"] == 1, "the first message")
        time.sleep(0.05)
        assert place.service.asked == 1, "one message in flight"
        place.answer()
        until(lambda: place.service.asked == 4, "the others")
        until(lambda: place.server.load()["counts"]["answers"] == 4, "their answers")


def test_a_client_that_sends_gigabytes_ahead_is_held_back_by_tcp() -> None:
    with serving(30.0) as place:
        sock = raw(place)
        sock.settimeout(0.3)
        message = frame(openpi.pack(observation(1, size=1400)))
        with pytest.raises(TimeoutError):
            for _ in range(50):
                sock.sendall(message)
        held = place.server.load()["held_bytes"]
        assert held < 7 * 2**20


def test_pings_are_answered_while_an_answer_takes_long() -> None:
    with serving() as place, client(place) as websocket:
        place.hold()
        websocket.send(openpi.pack(observation(1)))
        assert websocket.ping().wait(timeout=60)
        place.answer()
        assert openpi.unpack(websocket.recv())["actions"][0, 0] == 1


def test_an_answer_for_a_client_that_hung_up_is_given_up() -> None:
    with serving(30.0) as place:
        sock = raw(place)
        sock.sendall(frame(openpi.pack(observation(1))))
        until(lambda: place.service.asked == 1, "the message")
        sock.close()
        until(lambda: place.service.given_up == 1, "its end")
        assert place.server.load()["answering"] == 0 and place.server.load()["websockets"] == 0


def test_openpi_client_shows_why_a_message_is_too_big() -> None:
    with serving(max_message_mib=1) as place:
        robot = WebsocketClientPolicy(place.url)
        with pytest.raises(
            ConnectionClosed, match=r"1009.*exceeds limit of 1048576 bytes; send smaller images"
        ):
            robot.infer(observation(1, size=2000))
        assert WebsocketClientPolicy(place.url).infer(observation(2))["actions"][0, 0] == 2


def test_clients_past_max_connections_are_turned_away_in_words() -> None:
    with serving(max_connections=2) as place:
        robots = [WebsocketClientPolicy(place.url) for _ in range(2)]
        with pytest.raises(ConnectionClosed, match="all 2 connections are taken"):
            WebsocketClientPolicy(place.url)
        assert robots[0].infer(observation(5))["actions"][0, 0] == 5


@pytest.mark.parametrize(
    ("sent", "code"),
    [
        (frame(b"\xff\xfe", Opcode.TEXT), 1007),
        (b"\x82\x05hello", 1002),  # not masked
        (frame(b"x")[:1].replace(b"\x82", b"\xc2") + frame(b"x")[1:], 1002),  # reserved bit
        (frame(b"x", Opcode.CONT), 1002),
        (frame(b"", Opcode.BINARY, fin=False) + frame(b"", Opcode.CONT, fin=False) * 2000, 1008),
        (frame(b"", Opcode.PING) * 2000, 1008),
        (b"\x82\xff" + struct.pack("!Q", 2**62), 1009),
    ],
    ids=["utf-8", "unmasked", "reserved bit", "continuation", "crumbs", "pings", "size"],
)
def test_frames_that_no_client_sends_close_the_socket_and_harm_nobody(sent: bytes, code: int) -> None:
    with serving() as place:
        robot = WebsocketClientPolicy(place.url)
        sock = raw(place)
        sock.sendall(sent)
        assert close_code(sock)[0] == code
        sock.close()
        assert robot.infer(observation(3))["actions"][0, 0] == 3
        until(lambda: place.server.load()["websockets"] == 1, "the rude client's end")


def test_a_message_that_does_not_arrive_and_a_silent_client_are_closed_in_words() -> None:
    with serving(message_timeout_s=0.3, idle_timeout_s=60.0, handshake_timeout_s=60.0) as place:
        slow, idle = raw(place), raw(place)
        slow.sendall(frame(bytes(1000))[:500])
        until(lambda: place.server.load()["held_bytes"] > 0, "half a message")
        silent = socket.create_connection(("127.0.0.1", place.port))
        until(lambda: place.server.load()["https"] == 1, "a client that says nothing")
        # Not before: a busy machine may need longer for two handshakes.
        limits = place.server._shared.limits
        limits.idle_timeout_s, limits.handshake_timeout_s = 0.6, 0.3
        assert close_code(slow)[0] == 1008
        assert close_code(idle) == (1001, "no message for 0.6 s (limits.idle_timeout_s)")
        silent.settimeout(60)
        assert silent.recv(100) == b""
        counts = place.server.load()["counts"]
        assert counts["closed_message_timeout"] == counts["closed_request_timeout"] == 1


def test_half_a_request_is_answered_with_408() -> None:
    with serving(message_timeout_s=0.3, handshake_timeout_s=1.0) as place:
        sock = socket.create_connection(("127.0.0.1", place.port), timeout=60)
        sock.sendall(b"POST /v1/act HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\nabc")
        assert sock.recv(1000).startswith(b"HTTP/1.1 408")


def test_messages_that_arrive_slowly_cannot_fill_the_memory() -> None:
    with serving(max_message_mib=4, memory_mib=8) as place:
        socks = []
        for _ in range(6):
            sock = raw(place)
            sock.sendall(frame(bytes(3 * 2**20))[:-1])
            socks.append(sock)
        assert close_code(socks[0])[0] == 1013
        assert place.server.load()["held_bytes"] <= 8 * 2**20
        robot = WebsocketClientPolicy(place.url)
        assert robot.infer(observation(3, size=300))["actions"][0, 0] == 3


def test_a_client_that_does_not_read_gets_no_more_answers_and_is_cut_off() -> None:
    with serving(write_timeout_s=0.5) as place:
        place.service.chunk = 100_000  # each answer is 1.6 MB
        slow = raw(place)
        message = frame(openpi.pack(observation(1)))
        slow.sendall(20 * message)
        until(lambda: place.server.load()["counts"].get("closed_write_timeout") == 1, "its end")
        assert place.server.load()["websockets"] == 0 and place.service.asked < 20


def test_frames_behind_the_handshake_are_not_lost() -> None:
    with serving() as place:
        sock = socket.create_connection(("127.0.0.1", place.port), timeout=60)
        sock.sendall(HANDSHAKE + frame(openpi.pack(observation(1))))
        until(lambda: place.service.asked == 1, "the message")


def test_an_answer_that_is_given_up_before_it_begins_is_not_counted_for_ever() -> None:
    with serving() as place:
        WebsocketClientPolicy(place.url)
        (websocket,) = place.server._shared.websockets

        def message_and_close_in_one_turn_of_the_loop() -> None:
            websocket.data_received(frame(openpi.pack(observation(1))))
            websocket.data_received(frame(b"", Opcode.CLOSE))

        place.server.loop.call_soon_threadsafe(message_and_close_in_one_turn_of_the_loop)
        until(lambda: place.server.load()["websockets"] == 0, "its end")
        assert place.server.load()["answering"] == 0 and place.service.asked == 0


def test_clients_of_a_loop_that_stands_still_are_asked_to_come_again() -> None:
    ended = threading.Event()
    with serving(30.0, stalled_after_s=0.4, on_stall=ended.set) as place:
        waiting, idle = raw(place), raw(place)
        waiting.sendall(frame(openpi.pack(observation(1))))
        request = socket.create_connection(("127.0.0.1", place.port), timeout=60)
        request.sendall(b"POST /v1/act HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\nabc")
        until(lambda: place.service.asked == 1 and place.server.load()["https"] == 1, "both")
        assert not ended.wait(0.6), "a loop that turns is left alone"
        place.server.loop.call_soon_threadsafe(ended.wait, 60)
        for sock in (waiting, idle):
            assert close_code(sock) == (1012, "this replica stands still: connect again")
        assert request.recv(1000).startswith(b"HTTP/1.1 503") and ended.wait(60)


def test_a_loop_that_stands_still_with_the_lock_of_a_log_is_ended_as_well(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(server_module, "GOODBYE_S", 0.1)
    ended, handler = threading.Event(), logging.StreamHandler(io.StringIO())

    def stand_still() -> None:
        handler.acquire()
        ended.wait(60)
        handler.release()

    server_module.log.addHandler(handler)
    try:
        with serving(stalled_after_s=0.4, on_stall=ended.set) as place:
            place.server.loop.call_soon_threadsafe(stand_still)
            assert ended.wait(30)
    finally:
        server_module.log.removeHandler(handler)
