"""What a soak has shown, from the lines of its robots: outcomes, gaps, wrong answers, memory."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class Line:
    """One observation's end."""

    at: float
    client: int
    kind: str
    outcome: str
    words: str


@dataclass
class Event:
    """Something done to the server."""

    at: float
    what: str
    done: float
    """When the step that caused it had returned."""
    goal_s: float
    """The longest gap without an answer that it may leave."""
    gap_s: float = 0.0


@dataclass
class Report:
    """The figures of a run."""

    lines: list[Line]
    events: list[Event]
    memory: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    """Process -> (time, resident MB)."""
    failed: list[str] = field(default_factory=list)
    """Steps that did not come about."""

    def faults(self) -> list[str]:
        """What must not be: [] when the run has shown what it must."""
        wrong = [line for line in self.lines if line.outcome == "wrong"]
        faults = [*self.failed]
        faults += [f"client {line.client} ({line.kind}): {line.words}" for line in wrong]
        for client in sorted({line.client for line in self.lines if line.outcome == "unanswered"}):
            faults.append(f"client {client}: an observation was neither answered nor refused")
        served = {line.client for line in self.lines if line.outcome == "answered"}
        for client in sorted({line.client for line in self.lines} - served):
            faults.append(f"client {client}: not one answer")
        lost = sum(line.outcome == "lost" for line in self.lines)
        near = sum(
            line.outcome == "lost"
            and any("kill" in e.what and e.at - 1 < line.at < e.done + 5 for e in self.events)
            for line in self.lines
        )
        if lost > near:
            faults.append(f"{lost - near} sockets ended without a word while nothing was killed")
        for event in self.events:
            if event.gap_s > event.goal_s:
                faults.append(
                    f"{event.what}: {event.gap_s:.1f} s without an answer, the goal is {event.goal_s:g} s"
                )
        for name, samples in self.memory.items():
            growth = growth_of(samples)
            if growth > 0.10:
                faults.append(f"{name} grew by {growth:.0%}")
        return faults

    def text(self) -> str:
        """A table of events, and the counts."""
        answered = sum(line.outcome == "answered" for line in self.lines)
        outcomes = Counter(line.outcome for line in self.lines)
        words = Counter(
            f"{line.outcome}: {line.words[:90]}"
            for line in self.lines
            if line.outcome not in ("answered", "wrong")
        )
        digests = Counter(line.words for line in self.lines if line.outcome == "answered")
        kinds = Counter(line.kind for line in self.lines if line.outcome == "answered")
        rows = [
            f"| {event.at - self.lines[0].at:.0f} s | {event.what} | {event.gap_s:.2f} | {event.goal_s:g} |"
            for event in self.events
        ]
        memory = [
            f"  {name}: {samples[0][1]:.0f} -> {samples[-1][1]:.0f} MB in {samples[-1][0] - samples[0][0]:.0f} s"
            f" ({growth_of(samples):+.0%} after its first quarter)"
            for name, samples in sorted(self.memory.items())
        ]
        return "\n".join(
            [
                f"{len(self.lines)} observations, {answered} answered; outcomes: {dict(outcomes)}",
                f"answers by client {dict(kinds)}, by policy {dict(digests)}",
                "",
                "| at | what | longest gap s | goal s |",
                "| ---: | --- | ---: | ---: |",
                *rows,
                "",
                "not answered:",
                *(f"  {count} x {each}" for each, count in words.most_common(12)),
                "memory:",
                *memory,
                "",
                *(f"FAULT {fault}" for fault in self.faults() or []),
            ]
        )


def parsed(output: Iterable[str]) -> list[Line]:
    """The lines of soak_clients.py, in order of time."""
    return sorted(
        (Line(*json.loads(line)) for line in output if line.startswith("[")), key=lambda line: line.at
    )


def measure_gaps(lines: list[Line], events: list[Event], after_s: float = 45.0) -> None:
    """Sets each event's gap: the longest time without any answer from just before it to the next event.

    Args:
        lines: in order of time.
        events: in order of time.
        after_s: seconds after an event's end in which a gap is its doing.
    """
    answers = np.array([line.at for line in lines if line.outcome == "answered"])
    for number, event in enumerate(events):
        end = min([event.done + after_s, lines[-1].at, *(each.at for each in events[number + 1 :])])
        inside = answers[(answers > event.at - 1) & (answers < end)]
        edges = np.concatenate([[event.at - 1], inside, [end]])
        event.gap_s = max(0.0, float(np.diff(edges).max()))  # negative: the clients had ended before


def growth_of(samples: list[tuple[float, float]]) -> float:
    """Growth of a process's memory from the end of the first quarter of its life to its last tenth.

    Args:
        samples: (time, MB); a life of less than a minute says nothing and counts as 0.
    """
    if samples[-1][0] - samples[0][0] < 60:
        return 0.0
    megabytes = np.array([each[1] for each in samples])
    begin = len(megabytes) // 4
    early = float(np.median(megabytes[begin : begin + max(3, begin // 2)]))
    late = float(np.median(megabytes[-max(3, len(megabytes) // 10) :]))
    return late / early - 1
