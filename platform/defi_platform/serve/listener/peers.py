"""The listeners of other machines: what they have said of their replicas, and which of them takes a connection."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

SILENT_AFTER_S = 6.0
"""Seconds without a new announcement after which a peer gets no connections."""
LOST_AFTER_S = 60.0
"""Seconds without a new announcement after which a peer is forgotten: its machine is gone."""
AVOIDED_S = 2.0
"""Seconds for which a peer that could not be reached is not tried again."""


@dataclass
class Peer:
    """The listener of another machine."""

    node: str
    """Ray's id of its node."""
    address: tuple[str, int] | None = None
    """At which it takes connections of others; None: it does not yet."""
    replicas: tuple[tuple[int, int], ...] = ()
    """Generation and sockets of each replica that takes connections."""
    beat: int = -1
    """Of its latest announcement."""
    announced: float = 0.0
    """Seconds, on the clock of here, when that one was new."""
    sent: int = 0
    """Connections sent there since."""
    avoided_until: float = 0.0

    def sockets(self, generation: int) -> float:
        """Sockets of its emptiest replica of a generation, what has been sent there since it said so included."""
        found = [sockets for of, sockets in self.replicas if of == generation]
        return min(found) + self.sent / len(found)


class Peers:
    """All other machines' listeners. A policy of plain values, like the roster."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._peers: dict[str, Peer] = {}

    def update(self, announcements: Mapping[str, Mapping[str, Any]]) -> None:
        """Takes in what all peers have announced.

        Args:
            announcements: of `Listener.announcement`, with a `beat` that changes, by Ray's id of the node.
        """
        now = self._clock()
        self._peers = {node: self._peers.get(node) or Peer(node) for node in announcements}
        for node, said in announcements.items():
            peer = self._peers[node]
            if said["beat"] == peer.beat:
                continue
            address = said["address"]
            peer.address = None if address is None else (str(address[0]), int(address[1]))
            peer.replicas = tuple((int(generation), int(sockets)) for generation, sockets in said["replicas"])
            peer.beat, peer.announced, peer.sent = int(said["beat"]), now, 0

    def lost(self) -> list[str]:
        """Nodes that have announced nothing for LOST_AFTER_S."""
        oldest = self._clock() - LOST_AFTER_S
        return [peer.node for peer in self._peers.values() if peer.announced < oldest]

    def generations(self) -> set[int]:
        """The generations of replicas that connections can be sent to."""
        return {generation for peer in self._live() for generation, _ in peer.replicas}

    def sockets(self, generation: int) -> list[int]:
        """Sockets of each replica of a generation on other machines."""
        return [n for peer in self._live() for of, n in peer.replicas if of == generation]

    def choose(self, generation: int) -> Peer | None:
        """The peer whose emptiest replica of a generation has the fewest sockets; None where none has one."""
        having = [peer for peer in self._live() if any(of == generation for of, _ in peer.replicas)]
        return min(having, key=lambda peer: peer.sockets(generation), default=None)

    def avoid(self, peer: Peer) -> None:
        """Notes that a peer could not be reached."""
        peer.avoided_until = self._clock() + AVOIDED_S

    def at(self, host: str) -> list[Peer]:
        """The peers of a host."""
        return [peer for peer in self._peers.values() if peer.address is not None and peer.address[0] == host]

    def _live(self) -> list[Peer]:
        now = self._clock()
        return [
            peer
            for peer in self._peers.values()
            if peer.address is not None
            and now - peer.announced < SILENT_AFTER_S
            and peer.avoided_until <= now
        ]
