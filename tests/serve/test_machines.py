"""The listeners of several machines: where connections go, and how sessions move between them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from machines_of_lines import Node, ask, dial, wait
from ports import free_port

from defi_platform.serve.listener import carrier
from defi_platform.serve.listener import listener as listener_module
from defi_platform.serve.listener.listener import Listener
from defi_platform.serve.listener.peers import LOST_AFTER_S, SILENT_AFTER_S, Peers


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[tuple[Node, Node, Node]]:
    """Three that can reach each other; on this one they differ by folder and port."""
    with ExitStack() as stack:
        for name in "abc":
            (tmp_path / name).mkdir()
        a, b, c = (Node(tmp_path / name, stack, port=free_port()) for name in "abc")
        yield a, b, c


def meet(*listeners: Listener) -> None:
    """What the head's store does once a second."""
    for _ in range(2):  # at the second time each has an address
        said = {
            str(n): {**each.announcement(), "beat": time.monotonic_ns()} for n, each in enumerate(listeners)
        }
        for n, each in enumerate(listeners):
            each.meet({node: about for node, about in said.items() if node != str(n)}, "127.0.0.1")


def test_a_machine_without_a_replica_relays_to_one_that_has(machines: tuple[Node, Node, Node]) -> None:
    here, there = machines[0].listen(), machines[1].listen()
    machines[1].replica("far")
    meet(here, there)
    connection = dial(machines[0].settings.port)
    assert [ask(connection), ask(connection)] == ["far 1", "far 2"]
    assert here.state()["relayed"] == here.state()["carried"] == 1
    with dial(there.announcement()["address"][1]) as stranger:  # without the secret
        stranger.sendall(b"0" * 32)
        assert stranger.recv(100) == b""
    connection.close()
    wait(lambda: here.state()["carried"] == 0 == there.state()["replicas"][0]["sockets"])


def test_connections_go_to_the_emptiest_replica_wherever_it_is(machines: tuple[Node, Node, Node]) -> None:
    listeners = [node.listen() for node in machines]
    machines[1].replica("b"), machines[2].replica("c")
    meet(*listeners)
    connections = [dial(machines[0].settings.port) for _ in range(4)]
    assert sorted(ask(connection) for connection in connections) == ["b 1", "b 1", "c 1", "c 1"]
    machines[0].replica("a")
    assert ask(dial(machines[0].settings.port)) == "a 1"
    more = [dial(machines[0].settings.port) for _ in range(7)]
    # A copy of every byte is worth it only for a difference that matters.
    assert sorted(ask(connection)[0] for connection in more) == ["a"] * 4 + ["b"] * 2 + ["c"]


def test_a_peer_that_cannot_be_reached_is_passed_over(machines: tuple[Node, Node, Node]) -> None:
    here, there = machines[0].listen(), machines[1].listen()
    machines[1].replica("b")
    meet(here, there)
    said = {
        "gone": {"address": ["127.0.0.1", free_port()], "replicas": [[1, 0]], "beat": 1},
        "there": {**there.announcement(), "beat": 0},
    }
    here.meet(said, "127.0.0.1")
    connections = [dial(machines[0].settings.port) for _ in range(3)]
    assert [ask(connection) for connection in connections] == ["b 1"] * 3


def test_sessions_move_to_another_machine_and_back_without_losing_what_their_clients_send(
    machines: tuple[Node, Node, Node], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listener_module, "BALANCE_PAUSE_S", 0.1)
    here, there = machines[0].listen(), machines[1].listen(stays=False)
    near, _ = machines[0].replica("near")
    connections = [dial(machines[0].settings.port) for _ in range(6)]
    assert [ask(c) for c in connections] == ["near 1"] * 6
    for turn in range(2):
        far, link = machines[1].replica("far")
        wait(lambda: meet(here, there) is None and here.state()["carried"] == len(far.open) == 3)  # noqa: B023
        assert (
            sorted(ask(c) for c in connections) == [f"far {2 * turn + 2}"] * 3 + [f"near {2 * turn + 2}"] * 3
        )
        for connection in connections[:3]:
            connection.sendall(b"?\n")  # on its way before the replica leaves, or while it does
        link.leave()
        far.move(None, "answers", link.hand_over)
        for connection in connections[3:]:
            connection.sendall(b"?\n")
        assert {c.recv(100).decode().split()[1] for c in connections} == {str(2 * turn + 3)}
        wait(lambda: len(near.open) == 6 and here.state()["carried"] == 0)
        link.stop()
    assert there.state()["returned"] >= 6


def test_a_leaving_machine_brings_back_what_came_from_elsewhere_and_asks_its_own_clients_to_come_again(
    machines: tuple[Node, Node, Node],
) -> None:
    here, there = machines[0].listen(), machines[1].listen(stays=False)
    far, link = machines[1].replica("far")
    meet(here, there)
    carried, direct = dial(machines[0].settings.port), dial(machines[1].settings.port)
    assert ask(carried) == ask(direct) == "far 1"
    machines[0].replica("near")
    meet(here, there)
    link.leave()
    far.move(None, "answers", link.hand_over)
    assert ask(carried) == "near 2"
    assert direct.recv(100) == carrier.RESTART_FRAME
    wait(lambda: here.state()["carried"] == 0)


def test_a_new_generation_on_another_machine_takes_over(machines: tuple[Node, Node, Node]) -> None:
    here, there = machines[0].listen(), machines[1].listen()
    machines[0].replica("old", 1), machines[1].replica("new", 2)
    for listener in (here, there):
        listener.serve_generation(1)
    meet(here, there)
    running = dial(machines[0].settings.port)
    assert ask(running) == "old 1" and ask(dial(machines[1].settings.port)) == "old 1"
    for listener in (here, there):
        listener.serve_generation(2)
    assert ask(dial(machines[0].settings.port)) == "new 1" and ask(running) == "old 2"
    here.order_move("policy-1", "episodes")
    wait(lambda: here.state()["moved"] == 1)
    assert ask(running) == "new 3"


def test_a_machine_has_one_listener_of_a_deployment(machines: tuple[Node, Node, Node]) -> None:
    node = machines[0]
    first = node.listen()
    with pytest.raises(OSError, match="another listener of this deployment runs"):
        node.listen()
    first.close_port()
    with pytest.raises(ConnectionRefusedError):
        dial(node.settings.port)
    first.stop()
    node.listen()


def test_a_peer_that_says_nothing_more_gets_nothing_and_is_forgotten() -> None:
    now = [0.0]
    peers = Peers(lambda: now[0])
    said = {"n": {"address": ["10.0.0.2", 1], "replicas": [[1, 4], [1, 2]], "beat": 1}}
    peers.update(said)
    peer = peers.choose(1)
    assert (
        peer is not None and peer.sockets(1) == 2 and peers.sockets(1) == [4, 2] and peers.choose(2) is None
    )
    peers.avoid(peer)
    assert peers.choose(1) is None
    now[0] = SILENT_AFTER_S - 1
    assert peers.choose(1) is peer
    now[0] = LOST_AFTER_S + 1
    peers.update(said)
    assert peers.choose(1) is None and peers.lost() == ["n"]
    peers.update({})
    assert peers.lost() == []
