"""A thread that asks for the next chunk while the last one is carried out."""

from __future__ import annotations

import queue
import threading
import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from defi_client.connection import Connection
from defi_client.errors import ClientError

CLOSE_S = 1.0
"""Seconds for the thread to end; one that is connecting ends by itself."""


@dataclass(frozen=True)
class Asked:
    """An answer, or why there is none."""

    number: int
    """Of the action that came next when the observation was taken."""
    latency_s: float
    """From the observation to the answer."""
    asked_at: float
    """Of `time.monotonic`."""
    actions: np.ndarray[Any, Any] | None = None
    answer: dict[str, Any] | None = None
    error: ClientError | None = None


class Asker:
    """Sends one observation at a time; a lost connection is an error at once, since a fresh observation is better."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._questions: queue.Queue[tuple[int, dict[str, Any]] | None] = queue.Queue()
        self._answers: queue.Queue[Asked | BaseException] = queue.Queue()
        self.waiting = False
        """An observation is on its way, or its answer has not been taken."""
        self._thread = threading.Thread(target=self._run, name="asker", daemon=True)
        self._thread.start()

    def ask(self, number: int, observation: dict[str, Any]) -> None:
        """Sends an observation and returns at once.

        Args:
            number: of the action that comes next.
            observation: as the server reads it.
        """
        assert not self.waiting
        self.waiting = True
        self._questions.put((number, observation))

    def taken(self) -> Asked | None:
        """The answer, if it has come."""
        try:
            answer = self._answers.get_nowait()
        except queue.Empty:
            return None
        self.waiting = False
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def close(self) -> None:
        """Ends the thread. An answer that it waits for is given up, with the connection, which is had again when needed."""
        self._questions.put(None)
        if self.waiting and self._answers.empty():
            self._connection.abandon()
        self._thread.join(CLOSE_S)

    def _run(self) -> None:
        while True:
            question = self._questions.get()
            if question is None:
                return
            number, observation = question
            begun = time.monotonic()
            try:
                actions, answer = self._connection.infer(observation, reconnect_s=0)
            except ClientError as error:
                self._answers.put(Asked(number, time.monotonic() - begun, begun, error=error))
            except Exception as error:  # noqa: BLE001 - raised again in the control loop
                self._answers.put(error)
            else:
                self._answers.put(Asked(number, time.monotonic() - begun, begun, actions, answer))
