"""Broken and hostile clients over real sockets: each gets a clear error, nobody else notices, memory stays flat."""

from __future__ import annotations

import http.client
import random
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import msgpack
import numpy as np
import pytest
from hostile_messages import damaged, mutated, picture
from openpi_client import msgpack_numpy
from openpi_client.websocket_client_policy import WebsocketClientPolicy
from replica_in_process import Served, served
from robot_messages import observation
from websockets.sync.client import connect

from defi_platform.config import LimitsConfig

MUTATIONS = 500
LONGEST_ERROR = 2500
HANDSHAKE = (
    b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n\r\n"
)


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    limits = LimitsConfig(handshake_timeout_s=2.0, message_timeout_s=2.0, write_timeout_s=2.0)
    with served(limits=limits) as running:
        yield running


def resident_mb() -> float:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * 4096 / 2**20


@contextmanager
def unharmed(server: Served, growth_mb: float = 40.0) -> Iterator[None]:
    """Another client gets its own actions all the while, and memory is where it was afterwards."""
    stop = threading.Event()
    slowest, answers = [0.0], [0]
    errors: list[str] = []

    def bystander() -> None:
        client = WebsocketClientPolicy(server.url)
        while not stop.is_set():
            begun = time.perf_counter()
            number = answers[0] % 100
            answer = client.infer(observation(number))
            slowest[0] = max(slowest[0], time.perf_counter() - begun)
            if not np.array_equal(answer["actions"][0], observation(number)["observation/state"]):
                errors.append(f"answer {answers[0]} is not of its observation")
            answers[0] += 1
            time.sleep(0.02)
        client._ws.close()

    before = resident_mb()
    thread = threading.Thread(target=bystander, daemon=True)
    thread.start()
    try:
        yield
        deadline = time.monotonic() + 60
        while answers[0] < 2 and time.monotonic() < deadline:
            time.sleep(0.02)
    finally:
        stop.set()
        thread.join(60)
    assert not thread.is_alive() and not errors, errors
    assert answers[0] >= 2
    assert slowest[0] < 20.0, f"somebody else waited {slowest[0]:.1f} s"
    assert resident_mb() - before < growth_mb


def plain(value: Any) -> Any:
    """Arrays as openpi packs them, as plain values."""
    return msgpack.unpackb(msgpack_numpy.packb(value), strict_map_key=False)


OPENPI = plain(observation(3))
JPEG = OPENPI | {"observation/images/front": picture()}


def vla_eval_message(kind: str, payload: Any, seq: int = 1) -> dict[str, Any]:
    return {"type": kind, "payload": payload, "seq": seq, "timestamp": 1.0}


VLA_EVAL = vla_eval_message(
    "observation",
    {
        "images": {
            "front": {"__image__": True, "format": "png", "data": picture(form="PNG"), "shape": [64, 64, 3]}
        },
        "states": {"__ndarray__": True, "data": b"\0" * 16, "dtype": "<f4", "shape": [4]},
        "task_description": "open the drawer",
    },
)


def exchange(
    url: str, messages: list[bytes], greeted: bool, opening: bytes | None, judge: Callable[[Any], str]
) -> Counter[str]:
    """Sends each message over one socket, which stays open, and files its reply."""
    seen: Counter[str] = Counter()
    with connect(url, compression=None, max_size=None, proxy=None, ping_interval=None) as client:
        if greeted:
            client.recv(timeout=60)
        if opening is not None:
            client.send(opening)
            client.recv(timeout=60)
        for message in messages:
            client.send(message)
            try:
                seen[judge(client.recv(timeout=60))] += 1
            except TimeoutError:
                raise AssertionError(f"no answer within a minute to {message[:300]!r}") from None
    return seen


def test_500_mutations_of_openpi_messages_get_an_answer_or_an_error(server: Served) -> None:
    draw = random.Random(1)

    def judge(reply: Any) -> str:
        if isinstance(reply, str):
            assert 10 < len(reply) < LONGEST_ERROR
            return "error"
        answer = msgpack_numpy.unpackb(reply)
        for each in answer.get("batch", [answer]):
            assert each["actions"].shape == (10, 4)
        return "answer"

    messages = [
        mutated(draw.choice((OPENPI, JPEG, {"batch": [OPENPI, JPEG]})), draw) for _ in range(MUTATIONS)
    ]
    with unharmed(server):
        seen = exchange(server.url, messages, greeted=True, opening=None, judge=judge)
    assert seen["error"] > MUTATIONS / 2, seen


def test_500_mutations_of_vla_eval_messages_get_an_answer_or_an_error(server: Served) -> None:
    draw = random.Random(2)

    def judge(reply: Any) -> str:
        message = msgpack.unpackb(reply)
        assert len(reply) < LONGEST_ERROR
        return str(message["type"])

    # What vla-eval does not answer (EPISODE_START, EPISODE_END) would only look like silence: those are not mutated.
    messages = [mutated(VLA_EVAL, draw) for _ in range(MUTATIONS)]
    silent = (b"episode_start", b"episode_end")
    assert not any(word in message for message in messages for word in silent)
    hello = msgpack.packb(vla_eval_message("hello", {"harness_version": "0.8.0", "protocol_version": 1}, 0))
    with unharmed(server):
        seen = exchange(f"{server.url}/vla-eval", messages, greeted=False, opening=hello, judge=judge)
    assert seen["error"] > MUTATIONS / 2 and set(seen) <= {"error", "action", "hello"}, seen


def test_500_mutations_of_http_requests_get_an_answer_or_an_error(server: Served) -> None:
    draw = random.Random(3)
    seen: Counter[str] = Counter()
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    with unharmed(server):
        for number in range(MUTATIONS):
            body = mutated(draw.choice((OPENPI, JPEG)), draw)
            kind = "application/msgpack" if number % 3 else "application/json"
            connection.request("POST", "/v1/act", body, {"Content-Type": kind})
            response = connection.getresponse()
            words = response.read()
            assert response.status == 200 or len(words) < LONGEST_ERROR
            assert response.status < 500 or response.status == 503, (response.status, words[:300])
            assert words
            seen[f"{response.status // 100}xx"] += 1
    connection.close()
    assert seen["4xx"] > MUTATIONS / 2, seen


def test_damaged_frames_and_requests_end_with_a_close_code_or_a_400(server: Served) -> None:
    draw = random.Random(4)
    message = msgpack_numpy.packb(observation(1))
    frame = struct.pack("!BBQ4s", 0x82, 0xFF, len(message), b"\0\0\0\0") + message
    with unharmed(server):
        for number in range(200):
            with socket.create_connection(("127.0.0.1", server.port), timeout=60) as raw:
                if number % 2:
                    raw.sendall(HANDSHAKE)
                    assert raw.recv(65536).startswith(b"HTTP/1.1 101")
                    raw.sendall(damaged(frame, draw))
                else:
                    raw.sendall(damaged(HANDSHAKE, draw))
                raw.shutdown(socket.SHUT_WR)
                while raw.recv(65536):  # until the server has ended it; a time-out fails the test
                    pass


def test_1000_sockets_are_opened_and_closed(server: Served) -> None:
    with unharmed(server):
        for number in range(1000):
            raw = socket.create_connection(("127.0.0.1", server.port), timeout=60)
            if number % 4 == 0:  # a whole handshake, and gone before the greeting is read
                raw.sendall(HANDSHAKE)
            elif number % 4 == 1:
                raw.sendall(b"GET / HT")
            elif number % 4 == 2:  # a reset instead of a goodbye
                raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            elif number % 20 == 3:  # as a client does
                raw.close()
                with connect(server.url, compression=None, proxy=None) as websocket:
                    websocket.recv()
            raw.close()
    server.wait_until_idle()
    load = server.server.load()
    assert (load["sockets"], load["answering"], load["held_bytes"]) == (0, 0, 0)


def test_300_sockets_that_dawdle_are_closed_and_hold_up_nobody(server: Served) -> None:
    message = msgpack_numpy.packb(observation(1))
    begun = struct.pack("!BBQ4s", 0x82, 0xFF, len(message), b"\0\0\0\0") + message[:100]
    slow = []
    with unharmed(server):
        for number in range(300):
            raw = socket.create_connection(("127.0.0.1", server.port), timeout=60)
            raw.sendall((b"", b"GET / HTTP/1.1\r\nHos", HANDSHAKE + begun)[number % 3])
            slow.append(raw)
        for number, raw in enumerate(slow):
            said = b""
            while data := raw.recv(65536):
                said += data
            raw.close()
            if number % 3 == 2:
                assert b"within 2 s" in said, said[-200:]
    server.wait_until_idle()


def test_answers_that_nobody_reads_take_no_memory(server: Served) -> None:
    """250 unread messages of 6 MB once took 4 GB."""
    big = msgpack_numpy.packb(
        observation(1, **{"observation/images/front": np.zeros((1400, 1400, 3), np.uint8)})
    )
    with unharmed(server, growth_mb=80), socket.create_connection(("127.0.0.1", server.port)) as raw:
        raw.sendall(HANDSHAKE)
        raw.recv(65536)
        raw.setblocking(False)
        frame = struct.pack("!BBQ4s", 0x82, 0xFF, len(big), b"\0\0\0\0") + big
        sent, stream = 0, memoryview(frame * 3)
        deadline = time.monotonic() + 1.5
        while time.monotonic() < deadline:
            try:
                sent += raw.send(stream[sent % len(frame) :])
            except BlockingIOError:
                time.sleep(0.01)
        # One message is being answered and the next is held in the buffers of the two kernels at most.
        assert server.server.load()["held_bytes"] < 2 * len(frame)
