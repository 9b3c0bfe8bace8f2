"""The live replicas of a node: which of them takes the next connection, and which gives some away."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

DOUBTED_AFTER_S = 1.5
"""Seconds without a load report, which come twice a second, after which others get connections first: what is passed to
a process that is stopped cannot be taken back."""
STALLED_AFTER_S = 4.0
"""Seconds without a load report after which a replica gets no connections: it is stopped, or starved of CPU."""


@dataclass(eq=False)
class Member:
    """A replica that has registered."""

    replica: str
    """Serve's name of it."""
    generation: int
    digest: str
    pid: int
    application: str
    metadata: dict[str, Any] = field(default_factory=dict)
    """Its greeting."""
    movable: bool = True
    """Whether its websockets can pass to another process; not with TLS, whose state is in the process."""
    leaving: bool = False
    passed: int = 0
    """Sockets passed to it so far."""
    load: dict[str, Any] = field(default_factory=dict)
    """Its latest report."""
    reported: float = 0.0
    """Monotonic seconds of the last report from which it could serve."""
    missed: int = 0
    """Looks of the listener at it since that report."""

    @property
    def sockets(self) -> int:
        """Connections it holds, those on the way to it included."""
        return int(self.load.get("sockets", 0)) + self.passed - int(self.load.get("received", 0))

    def summary(self, now: float) -> dict[str, Any]:
        """Plain values of it, at `now` on the roster's clock."""
        return {
            "replica": self.replica,
            "generation": self.generation,
            "digest": self.digest,
            "pid": self.pid,
            "application": self.application,
            "leaving": self.leaving,
            "sockets": self.sockets,
            "silent_s": now - self.reported,
            "load": self.load,
        }


@dataclass(frozen=True)
class Move:
    """A request to a replica to give sockets back."""

    member: Member
    count: int


class Roster:
    """All members of one listener. A policy of plain values: the listener acts on what it returns."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.members: list[Member] = []
        self.current: int | None = None
        """Generation that new connections go to while a member of it lives; None: the newest."""

    def now(self) -> float:
        """Seconds on the clock of the reports."""
        return self._clock()

    def add(self, member: Member) -> None:
        """Takes a new member in; it has reported just now."""
        member.reported = self._clock()
        self.members.append(member)

    def remove(self, member: Member) -> None:
        """Takes a member out whose process has ended."""
        if member in self.members:
            self.members.remove(member)

    def report(self, member: Member, load: dict[str, Any]) -> None:
        """Notes a load report."""
        member.load, member.missed = load, 0
        if not load.get("stands_still"):
            member.reported = self._clock()

    def candidates(self, generation: int | None = None) -> list[Member]:
        """Live members of the generation that serves now (or of `generation`), which take connections."""
        live = self._live()
        if generation is None:
            generation = self.preferred({m.generation for m in live})
        return [m for m in live if m.generation == generation]

    def preferred(self, generations: Set[int]) -> int | None:
        """The generation that serves, of those that have live replicas; None without any."""
        if self.current in generations:
            return self.current
        # A successor that is not announced yet may not be complete: it comes last, the latest before it first.
        older = [g for g in generations if self.current is None or g < self.current]
        return max(older or generations, default=None)

    def generations(self) -> set[int]:
        """The generations of members that take connections."""
        return {m.generation for m in self._live()}

    def open_to(self) -> list[tuple[int, int]]:
        """Generation and sockets of each member that takes connections."""
        return [(m.generation, m.sockets) for m in self._live()]

    def choose(self, generation: int | None = None) -> Member | None:
        """The member that takes the next connection: of those that report in time the one with the fewest sockets.

        Args:
            generation: only of this one; None: of the one that serves now.
        """
        late = self._clock() - DOUBTED_AFTER_S
        return min(
            self.candidates(generation), key=lambda m: (m.reported < late, m.sockets, m.passed), default=None
        )

    def uneven(self, elsewhere: Sequence[int] = ()) -> Move | None:
        """The sockets that the fullest member should give away so that all hold about the same; None where they do.

        One move at a time, and none for a difference that a few reconnecting clients make: each moved socket
        costs some packets, and none is gained by moving it back.

        Args:
            elsewhere: sockets of the replicas on other machines, whose own listeners make them give away.
        """
        members = [m for m in self.candidates() if m.movable]
        if not members or len(members) + len(elsewhere) < 2:
            return None
        sockets = [m.sockets for m in members] + list(elsewhere)
        mean = sum(sockets) / len(sockets)
        fullest, emptiest = max(members, key=lambda m: m.sockets), min(sockets)
        if fullest.sockets - emptiest < margin(mean):
            return None
        count = min(int(fullest.sockets - mean), int(mean - emptiest + 0.999))
        return Move(fullest, count) if count > 0 else None

    def _live(self) -> list[Member]:
        oldest = self._clock() - STALLED_AFTER_S
        return [m for m in self.members if not m.leaving and m.reported >= oldest]


def margin(sockets: float) -> float:
    """The difference from which on connections are moved, or sent to another machine, where so many are usual."""
    return max(2.0, 0.25 * sockets)
