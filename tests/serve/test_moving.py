"""Sockets that move to another replica between two answers, and what happens to those that cannot."""

from __future__ import annotations

import contextlib
import http.client
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from openpi_client.websocket_client_policy import WebsocketClientPolicy
from sleeping_policy import HANDSHAKE, SleepingService, frame, observation, raw, replica, serving, until
from websockets.exceptions import ConnectionClosed
from websockets.frames import Opcode
from websockets.sync.client import connect

from defi_platform.serve.connections.server import SocketServer
from defi_platform.serve.protocols import openpi


@contextlib.contextmanager
def successor(sleep_s: float = 0.0, **settings: Any) -> Iterator[SocketServer]:
    """Another replica, whose policy has the digest d1."""
    server = replica(SleepingService(sleep_s, digest="d1"), **settings)
    try:
        yield server
    finally:
        server.close("the test is over", timeout_s=0.2)


def to(server: SocketServer) -> Any:
    """Hands sockets over to a replica of this process."""

    def hand_over(sock: socket.socket, state: dict[str, Any]) -> bool:
        server.adopt(sock, state)
        return True

    return hand_over


def nobody(sock: socket.socket, state: dict[str, Any]) -> bool:
    return False


def digest_of(robot: WebsocketClientPolicy, seed: int) -> str:
    answer = robot.infer(observation(seed))
    assert answer["actions"][0, 0] == seed, "an answer to another observation"
    return str(answer["policy_digest"])


def test_idle_websockets_move_and_their_clients_notice_nothing() -> None:
    with serving() as place, successor() as other:
        robots = [WebsocketClientPolicy(place.url) for _ in range(8)]
        assert [digest_of(robot, n) for n, robot in enumerate(robots)] == ["d0"] * 8
        place.server.move(None, "answers", to(other))
        until(lambda: place.server.load()["sockets"] == 0, "all to have left")
        assert [digest_of(robot, n) for n, robot in enumerate(robots)] == ["d1"] * 8
        assert place.server.load()["counts"]["moved"] == 8 and other.load()["websockets"] == 8


def test_busy_websockets_are_answered_first_and_no_answer_is_lost_or_confused() -> None:
    with serving(0.003) as place, successor(0.003) as other, ThreadPoolExecutor(16) as threads:
        stop, served_by_both = threading.Event(), threading.Event()

        def robot(number: int) -> int:
            mine, asked, digests = WebsocketClientPolicy(place.url), 0, set()
            while not stop.is_set():
                digests.add(digest_of(mine, 1000 * number + asked))
                asked += 1
                if digests == {"d0", "d1"}:
                    served_by_both.set()
            return asked

        robots = [threads.submit(robot, number) for number in range(16)]
        until(lambda: place.server.load()["counts"].get("answers", 0) > 50, "load")
        here, there = place.server, other
        for _ in range(6):  # there and back, all the time under load
            here.move(8, "answers", to(there))
            here, there = there, here
            time.sleep(0.03)
        assert served_by_both.wait(60)
        stop.set()
        asked = [robot.result() for robot in robots]
        answers = [server.load()["counts"]["answers"] for server in (place.server, other)]
    assert sum(asked) == sum(answers)


def test_messages_sent_ahead_move_too() -> None:
    with serving() as place, successor() as other:
        place.hold()
        sock = raw(place)
        sock.sendall(b"".join(frame(openpi.pack(observation(n))) for n in range(5)))
        until(lambda: place.service.asked == 1, "the first message")
        place.server.move(None, "answers", to(other))
        until(lambda: place.server.load()["leaving"], "the order")
        place.answer()
        until(lambda: other.load()["counts"].get("answers") == 4, "the rest to be answered by the successor")
        assert place.service.asked == 1


def test_a_message_on_its_way_is_waited_for() -> None:
    with serving() as place, successor() as other:
        sock = raw(place)
        message = frame(openpi.pack(observation(7, size=200)))
        sock.sendall(message[:1000])
        until(lambda: place.server.load()["held_bytes"] > 0, "its beginning")
        place.server.move(None, "answers", to(other))
        time.sleep(0.05)
        assert place.server.load()["websockets"] == 1
        sock.sendall(message[1000:])
        until(lambda: other.load()["websockets"] == 1, "the move")
        assert place.service.asked == 1


def test_episodes_end_where_they_began() -> None:
    with serving() as place, successor() as other:
        running, fresh = WebsocketClientPolicy(place.url), WebsocketClientPolicy(place.url)
        assert digest_of(running, 1) == "d0"
        place.server.move(None, "episodes", to(other))
        until(lambda: other.load()["websockets"] == 1, "the one without an episode to move")
        assert digest_of(fresh, 2) == "d1" and digest_of(running, 3) == "d0"
        place.server.move(None, "answers", to(other))
        until(lambda: place.server.load()["sockets"] == 0, "the other one")
        assert digest_of(running, 4) == "d1"


def test_only_as_many_move_as_are_asked_for() -> None:
    with serving() as place, successor() as other:
        robots = [WebsocketClientPolicy(place.url) for _ in range(6)]
        place.server.move(2, "answers", to(other))
        until(lambda: other.load()["websockets"] == 2, "two to move")
        assert sorted(digest_of(robot, 1) for robot in robots) == ["d0"] * 4 + ["d1"] * 2


def test_where_nobody_takes_them_some_stay_and_all_are_closed_with_1012() -> None:
    with serving() as place:
        robots = [WebsocketClientPolicy(place.url) for _ in range(3)]
        place.server.move(2, "answers", nobody)
        until(lambda: place.server.load()["counts"].get("not_moved") == 2, "the attempts")
        assert [digest_of(robot, 1) for robot in robots] == ["d0"] * 3
        place.server.move(None, "answers", nobody)
        until(lambda: place.server.load()["sockets"] == 0, "their end")
        with pytest.raises(ConnectionClosed, match=r"1012.*connect again"):
            robots[0].infer(observation(1))


def test_http_connections_move_between_requests_and_before_the_first() -> None:
    with serving() as place, successor() as other:
        used = http.client.HTTPConnection("127.0.0.1", place.port, timeout=60)
        used.request("GET", "/before")
        assert used.getresponse().read() == b"/before 0"
        silent = socket.create_connection(("127.0.0.1", place.port), timeout=60)
        until(lambda: place.server.load()["https"] == 2, "both")
        place.server.move(1, "answers", to(other))
        until(lambda: other.load()["https"] == 1, "one to move")
        place.server.move(None, "answers", to(other))
        until(lambda: other.load()["https"] == 2, "both to move")
        used.request("GET", "/after")
        assert used.getresponse().read() == b"/after 0"
        silent.sendall(b"GET /late HTTP/1.1\r\nHost: x\r\n\r\n")
        assert silent.recv(1000).endswith(b"/late 0")


def test_close_waits_for_answers_and_says_why() -> None:
    with serving() as place, ThreadPoolExecutor(1) as threads:
        place.hold()
        idle, busy = WebsocketClientPolicy(place.url), WebsocketClientPolicy(place.url)
        last = threads.submit(digest_of, busy, 1)
        until(lambda: place.service.asked == 1, "the last message")
        threading.Timer(0.2, place.answer).start()
        place.server.close("the policy server is shutting down", timeout_s=60)
        assert last.result() == "d0"
        for robot in (idle, busy):
            with pytest.raises(ConnectionClosed, match=r"1001.*the policy server is shutting down"):
                robot.infer(observation(1))


def test_the_first_message_of_a_new_episode_moves_with_its_socket() -> None:
    with serving() as place, successor() as other:
        robot = WebsocketClientPolicy(place.url)
        assert robot.infer(observation(1) | {"episode": 1})["policy_digest"] == "d0"
        place.server.move(None, "episodes", to(other))
        assert robot.infer(observation(2) | {"episode": 1})["policy_digest"] == "d0"
        answer = robot.infer(observation(3) | {"episode": 2})
        assert answer["policy_digest"] == "d1" and answer["actions"][0, 0] == 3
        until(lambda: place.server.load()["counts"].get("moved") == 1, "the move to be counted")
        assert other.load()["websockets"] == 1


def test_a_new_episode_that_nobody_takes_is_not_answered_by_the_old_policy() -> None:
    with serving() as place:
        robot = WebsocketClientPolicy(place.url)
        robot.infer(observation(1) | {"episode": 1})
        place.server.move(None, "episodes", nobody)
        until(lambda: place.server.load()["leaving"], "the order to arrive")
        with pytest.raises(ConnectionClosed, match="1012"):
            robot.infer(observation(2) | {"episode": 2})


def test_a_socket_counts_as_long_as_nobody_has_taken_it() -> None:
    asked = threading.Event()

    def slowly(sock: socket.socket, state: dict[str, Any]) -> bool:
        asked.wait(60)
        return False

    with serving() as place:
        robots = [WebsocketClientPolicy(place.url) for _ in range(3)]
        place.server.move(None, "answers", slowly)
        until(lambda: place.server.load()["websockets"] == 0, "them to leave")
        assert place.server.load()["sockets"] == 3, "a replica that ended now would cut them off"
        asked.set()
        until(lambda: place.server.load()["sockets"] == 0, "the end")
        for robot in robots:
            with pytest.raises(ConnectionClosed, match=r"1012.*connect again"):
                robot.infer(observation(1))


def test_a_client_that_reads_nothing_holds_up_no_replica_that_leaves() -> None:
    with serving(write_timeout_s=0.2) as place, socket.socket() as deaf:
        place.service.chunk = 1000
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.connect(("127.0.0.1", place.port))
        deaf.sendall(HANDSHAKE)
        until(lambda: place.server.load()["websockets"] == 1, "the websocket")
        (websocket,) = place.server._shared.websockets
        while not websocket._transport.get_write_buffer_size():  # less than what stops the next answer
            deaf.sendall(frame(openpi.pack(observation(1))))
            time.sleep(0.004)
        place.server.move(None, "answers", nobody)
        until(lambda: place.server.load()["sockets"] == 0, "its end")
        assert place.server.load()["counts"]["closed_write_timeout"] == 1


def test_a_client_that_sends_ahead_all_the_time_gets_every_answer_in_turn() -> None:
    with serving(0.001) as place, successor(0.001) as other:
        robot = connect(place.url, compression=None, proxy=None, legacy=True)
        robot.recv()

        def send() -> None:
            for number in range(60):
                robot.send(openpi.pack(observation(number, size=150)))

        threading.Thread(target=send, daemon=True).start()
        seeds = []
        here, there = place.server, other
        for _ in range(60):
            here.move(1, "answers", to(there))
            here, there = there, here
            reply = robot.recv(timeout=60)
            assert isinstance(reply, bytes)
            seeds.append(openpi.unpack(reply)["seed"])
        moved = sum(server.load()["counts"].get("moved", 0) for server in (place.server, other))
    assert seeds == list(range(60)) and moved > 10


def test_a_ping_that_has_come_in_part_is_not_lost() -> None:
    ping = frame(b"whole", Opcode.PING)
    with serving() as place, successor() as other:
        sock = raw(place)
        sock.sendall(frame(openpi.pack(observation(1) | {"episode": 1})))
        sock.recv(65536)
        place.server.move(None, "episodes", to(other))
        until(lambda: place.server.load()["leaving"], "the order")
        sock.sendall(frame(openpi.pack(observation(2) | {"episode": 2})) + ping[:4])
        time.sleep(0.05)
        sock.sendall(ping[4:])
        received = b""
        while b"whole" not in received:
            received += sock.recv(65536)
        until(lambda: other.load()["counts"].get("answers") == 1, "the message of the new episode")
