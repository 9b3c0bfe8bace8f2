"""Time of a control loop that passes only while its pacer waits, and never while an answer is on its way.

What a loop does with answers that are quick, slow or late then depends on no machine.
"""

from __future__ import annotations

import queue
import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest

from defi_client import asker, control
from defi_client.asker import Asker
from defi_client.connection import Connection
from defi_client.pacing import Pacer

PATIENCE_S = 60.0


class ControlClock:
    """In place of the module `time` in the control loop and in the thread that asks for it."""

    def __init__(self) -> None:
        self._now = 0.0
        self._changed = threading.Condition()
        self._open = 0
        """Questions without an answer."""
        self._due: list[float] = []
        """Ends of what servers wait for."""

    def monotonic(self) -> float:
        return self._now

    def sleep(self, seconds: float) -> None:
        """Of the control loop and its robot."""
        with self._changed:
            end = self._now + seconds
            while True:
                assert self._changed.wait_for(lambda: self._open <= len(self._due), PATIENCE_S), "no answer"
                if not self._due or min(self._due) > end:
                    self._now = end
                    return
                self._now = min(self._due)
                self._due.remove(self._now)
                self._changed.notify_all()

    def answers_after(self, seconds: float) -> None:
        """Of a server, whose answer takes so long."""
        with self._changed:
            due = self._now + seconds
            self._due.append(due)
            self._changed.notify_all()
            assert self._changed.wait_for(lambda: due not in self._due, PATIENCE_S), "the loop stands still"

    def asked(self) -> None:
        with self._changed:
            self._open += 1

    def answered(self) -> None:
        """Also where the question was given up: its server waits no longer."""
        with self._changed:
            self._open -= 1
            if not self._open:
                self._due.clear()
            self._changed.notify_all()


def controlled(monkeypatch: pytest.MonkeyPatch) -> ControlClock:
    """The time of all control loops until the patches are undone."""
    clock = ControlClock()

    class Answers(queue.Queue):  # type: ignore[type-arg]
        def put(self, *arguments: Any, **options: Any) -> None:
            super().put(*arguments, **options)
            clock.answered()

    class CountedAsker(Asker):
        def __init__(self, connection: Connection) -> None:
            super().__init__(connection)
            self._answers: Any = Answers()

        def ask(self, number: int, observation: dict[str, Any]) -> None:
            clock.asked()
            super().ask(number, observation)

    monkeypatch.setattr(control, "Asker", CountedAsker)
    monkeypatch.setattr(control, "Pacer", lambda rate_hz: Pacer(rate_hz, clock))
    monkeypatch.setattr(control, "time", SimpleNamespace(monotonic=clock.monotonic, time_ns=time.time_ns))
    monkeypatch.setattr(asker, "time", clock)
    return clock
