"""The public port of a node, with replicas that answer each line with their name."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from machines_of_lines import SECRET, Node, ask, dial, wait
from ports import free_port

from defi_platform.errors import ServeError
from defi_platform.serve.listener import channel as channel_module
from defi_platform.serve.listener import placement
from defi_platform.serve.listener.channel import Channel, MessageTooLarge, socket_path
from defi_platform.serve.listener.roster import DOUBTED_AFTER_S, STALLED_AFTER_S, Member, Roster


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    with ExitStack() as stack:
        yield Node(tmp_path, stack, port=free_port())


def test_connections_go_to_the_replica_with_the_fewest(node: Node) -> None:
    node.listen()
    node.replica("a"), node.replica("b")
    connections = [dial(node.settings.port) for _ in range(10)]
    answers = [ask(connection) for connection in connections]
    assert sorted(answers) == ["a 1"] * 5 + ["b 1"] * 5


def test_a_connection_before_any_replica_waits_for_one(node: Node) -> None:
    listener = node.listen()
    connection = dial(node.settings.port)
    wait(lambda: listener.state()["held"] == 1)
    node.replica("late")
    assert ask(connection) == "late 1"


def test_without_a_replica_a_client_is_refused_in_words(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "HOLD_S", 0.1)
    listener = node.listen()
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.build_opener(urllib.request.ProxyHandler({})).open(
            f"http://127.0.0.1:{node.settings.port}/healthz", timeout=60
        )
    assert refused.value.code == 503 and refused.value.headers["Retry-After"] == "2"
    assert "no replica of the policy" in refused.value.read().decode()
    assert listener.state()["refused"] == 1


def test_a_dead_replica_is_known_at_once(node: Node) -> None:
    listener = node.listen()
    (_, first), (_, _) = node.replica("a"), node.replica("b")
    first.stop()
    wait(lambda: len(listener.state()["replicas"]) == 1)
    assert {ask(dial(node.settings.port)) for _ in range(4)} == {"b 1"}


def test_connections_that_a_dying_replica_has_not_looked_at_go_to_another(node: Node) -> None:
    listener = node.listen()
    first, link = node.replica("a")
    with link._lock:  # it no longer gets to its channel
        connections = [dial(node.settings.port) for _ in range(3)]
        wait(lambda: listener.state()["replicas"][0]["sockets"] == 3)
        node.replica("b")
        assert link._channel is not None
        socket.socket(fileno=os.dup(link._channel.fileno())).shutdown(socket.SHUT_RDWR)
        assert [ask(c) for c in connections] == ["b 1"] * 3
    wait(
        lambda: len(listener.state()["replicas"]) == 2
    )  # it has come back, and what it missed is not its own
    assert [ask(c) for c in connections] == ["b 2"] * 3 and not first.open


def test_a_leaving_replica_gives_its_sockets_to_another_with_their_state(node: Node) -> None:
    node.listen()
    first, link = node.replica("a")
    connections = [dial(node.settings.port) for _ in range(5)]
    assert [ask(c) for c in connections] == ["a 1"] * 5
    node.replica("b")
    link.leave()
    first.move(None, "answers", link.hand_over)
    assert [ask(c) for c in connections] == ["b 2"] * 5
    assert ask(dial(node.settings.port)) == "b 1"


@pytest.mark.parametrize(("state", "words"), [({"lines": 1}, b"\x88"), ({}, b"HTTP/1.1 503 ")])
def test_a_socket_that_nobody_takes_over_ends_in_its_own_protocol(
    node: Node, monkeypatch: pytest.MonkeyPatch, state: dict[str, Any], words: bytes
) -> None:
    monkeypatch.setattr(placement, "HOLD_S", 0.1)
    node.listen()
    server, link = node.replica("a")
    client = dial(node.settings.port)
    assert ask(client) == "a 1"
    link.leave()
    (sock,) = server.open
    with server._reading:  # its thread is not about to read
        server.open.pop(sock)
    assert link.hand_over(sock, state)
    time.sleep(0.2)
    client.sendall(b"GET / HTTP/1.1\r\n\r\n")
    assert client.recv(100).startswith(words)


def test_a_replica_that_leaves_a_busy_listener_loses_no_socket(node: Node) -> None:
    listener = node.listen()
    first, link = node.replica("a")
    connections = [dial(node.settings.port) for _ in range(200)]
    wait(lambda: len(first.open) == 200)
    second, _ = node.replica("b")
    link.leave()
    listener._loop.call_soon_threadsafe(time.sleep, 0.5)
    with first._reading:  # their threads are not about to read
        moving = list(first.open)
        first.open.clear()
    # More than the kernel holds for the listener, so that some wait here when the replica ends.
    assert all(link.hand_over(sock, {"lines": 7, "padding": b"x" * 10_000}) for sock in moving)
    link.stop()
    wait(lambda: len(second.open) == 200)
    assert ask(connections[-1]) == "b 8"


def test_a_leaving_replica_gets_no_connection_after_it_has_said_so(node: Node) -> None:
    listener = node.listen()
    first, link = node.replica("a")
    listener._loop.call_soon_threadsafe(time.sleep, 0.3)
    connection = dial(node.settings.port)  # on its way while the replica leaves
    link.leave()
    assert len(first.open) == 1 and ask(connection) == "a 1"


def test_after_an_upscale_sockets_are_spread_over_the_replicas(node: Node) -> None:
    listener = node.listen()
    node.replica("a")
    connections = [dial(node.settings.port) for _ in range(8)]
    assert {ask(c) for c in connections} == {"a 1"}
    node.replica("b")
    wait(lambda: [r["sockets"] for r in listener.state()["replicas"]] == [4, 4])
    assert sorted(ask(c) for c in connections) == ["a 2"] * 4 + ["b 2"] * 4


def test_a_new_generation_takes_over_only_once_it_is_announced(node: Node) -> None:
    listener = node.listen()
    listener.serve_generation(1)
    node.replica("old", 1), node.replica("new", 2)
    running = dial(node.settings.port)
    assert ask(running) == "old 1"
    listener.serve_generation(2)
    assert ask(dial(node.settings.port)) == "new 1" and ask(running) == "old 2"
    assert listener.order_move("policy-1", "episodes") == 1
    wait(lambda: listener.state()["moved"] == 1)
    assert ask(running) == "new 3"


def test_clients_are_not_refused_while_a_dead_listener_is_started_again(node: Node) -> None:
    listener = node.listen()
    _, link = node.replica("a")
    before = dial(node.settings.port)
    assert ask(before) == "a 1"
    wait(lambda: link._port is not None)
    listener.stop()
    assert ask(before) == "a 2"
    early = dial(node.settings.port)  # waits in the kernel's queue
    successor = node.listen()
    assert ask(early) == "a 1" and ask(dial(node.settings.port)) == "a 1" and ask(before) == "a 3"
    assert successor.state()["accepted"] == 2


def test_a_stranger_on_the_unix_socket_gets_no_connections(node: Node) -> None:
    listener = node.listen()
    raw = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    raw.connect(str(node.path))
    Channel(raw).send({"type": "register", "token": b"guess", "replica": "x"})
    raw.setblocking(True)
    assert raw.recv(10) == b"" and listener.state()["replicas"] == []


def test_a_state_that_is_too_large_stays_with_its_owner() -> None:
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with right, socket.socket() as passed:
        with pytest.raises(MessageTooLarge):
            Channel(left).send({"state": b"0" * channel_module.MESSAGE_LIMIT}, passed)
        assert passed.fileno() > 0


def test_an_observation_larger_than_a_packet_moves_with_its_socket() -> None:
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    sender, receiver = Channel(left), Channel(right)
    with left, right, socket.create_server(("127.0.0.1", 0)) as passed:
        address, image = passed.getsockname(), os.urandom(3 * 2**20)
        sender.send({"state": {"message": image}}, passed)
        sender.send({"alone": image})
        received = receiver.receive()
        assert received is not None and received[0] == {"state": {"message": image}}
        with received[1] as arrived:  # type: ignore[union-attr]
            assert arrived.getsockname() == address
        assert receiver.receive() == ({"alone": image}, None)
        assert receiver.receive() is None


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """A folder whose name leaves room for a Unix socket, which pytest's own may not."""
    with tempfile.TemporaryDirectory(prefix="defi-") as folder:
        yield Path(folder)


def test_the_folder_of_the_unix_sockets_is_closed_to_others(
    short_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(short_folder))
    folder = socket_path(b"abc").parent
    assert folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o755)
    with pytest.raises(ServeError, match="nobody else can enter"):
        socket_path(b"abc")
    assert str(os.getuid()) in folder.name


def member(name: str, sockets: int, generation: int = 1, **options: Any) -> Member:
    return Member(name, generation, "d", 1, "policy", load={"sockets": sockets}, **options)


def test_sockets_of_killed_nodes_are_deleted_and_long_names_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    abandoned, young, live = (tmp_path / f"{name}.sock" for name in ("abandoned", "young", "live"))
    with ExitStack() as stack:
        listening = stack.enter_context(channel_module.listen_locally(live))
        for path in (abandoned, young):
            channel_module.listen_locally(path).close()
        for path in (abandoned, live):
            os.utime(path, (0, 0))
        stack.enter_context(channel_module.listen_locally(tmp_path / "new.sock"))
        assert {p.name for p in tmp_path.glob("*")} == {"young.sock", "live.sock", "new.sock"}
        assert listening.fileno() > 0
    long = tmp_path / ("x" * 60)
    long.mkdir()
    monkeypatch.setattr(channel_module.tempfile, "gettempdir", lambda: str(long))
    with pytest.raises(ServeError, match="too long for a Unix socket"):
        socket_path(b"abc")


def test_a_process_that_stands_still_is_ended(tmp_path: Path) -> None:
    code = f"""
from pathlib import Path
from machines_of_lines import SECRET, LineServer, SECRET
from defi_platform.serve.listener.link import ReplicaLink
identity = dict(replica="a", generation=1, digest="d", application="p", metadata={{}}, token=SECRET, movable=True)
link = ReplicaLink(Path({str(tmp_path / "listener.sock")!r}), identity, LineServer("a"), lambda: None)
link.start()
link._thread.join()
"""
    with ExitStack() as stack:
        node = Node(tmp_path, stack, free_port(), stalled_after_s=1.0)
        listener = node.listen()
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
        secret = f"import machines_of_lines; machines_of_lines.SECRET = {SECRET!r}\n"
        process = stack.enter_context(
            subprocess.Popen([sys.executable, "-c", secret + code], env=environment)
        )
        stack.callback(process.kill)
        client = dial(node.settings.port)
        wait(lambda: len(listener.state()["replicas"]) == 1, seconds=60)
        assert ask(client) == "a 1"
        process.send_signal(signal.SIGSTOP)
        status = Path(f"/proc/{process.pid}/stat")
        wait(lambda: status.read_text().rpartition(")")[2].split()[0] == "T")
        client.settimeout(60)
        client.sendall(b"?\n")
        with contextlib.suppress(ConnectionResetError):
            assert client.recv(10) == b""
        assert process.wait(60) == -signal.SIGKILL and listener.state()["stalled"] == 1


def test_a_silent_replica_gets_no_connections_and_an_unannounced_one_comes_last() -> None:
    now = [0.0]
    roster = Roster(lambda: now[0])
    old, new = member("old", 3, 1), member("new", 0, 2)
    roster.current = 1
    roster.add(old), roster.add(new)
    busy = member("busy", 9, 1)
    now[0] = DOUBTED_AFTER_S + 0.1
    roster.add(busy)
    assert roster.choose() is busy, "the one that is late comes after it"
    roster.remove(busy)
    assert roster.choose() is old
    now[0] = STALLED_AFTER_S + 1
    roster.report(new, {"sockets": 0})
    assert roster.choose() is new
    assert roster.choose(1) is None


def test_only_a_difference_that_matters_is_evened_out() -> None:
    roster = Roster()
    first, second = member("a", 32), member("b", 31)
    roster.add(first), roster.add(second)
    assert roster.uneven() is None
    second.load = {"sockets": 0}
    move = roster.uneven()
    assert move is not None and (move.member, move.count) == (first, 16)
    second.movable = False
    assert roster.uneven() is None
