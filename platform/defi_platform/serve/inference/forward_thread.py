"""The one thread in which forward passes run, one at a time."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from defi_platform.serve.observation import Observation

Forward = Callable[[list[Observation]], Sequence[NDArray[Any]]]
"""One forward pass: n observations -> n arrays (chunk, A) float32 in raw units. Never called twice at a time."""


@dataclass(frozen=True)
class PassResult:
    """The outcomes of a batch."""

    outcomes: list[NDArray[Any] | Exception]
    """Actions or the error of each observation, in order."""
    seconds: float
    """From start to end, repetitions after an error included."""
    whole: bool
    """It took one pass: nothing failed."""


class ForwardThread:
    """Runs batches in a thread and hands the results back to the event loop they came from."""

    def __init__(self, forward: Forward) -> None:
        """Prepares the thread, which starts with the first batch and ends with the process."""
        self._forward = forward
        self._batches: queue.SimpleQueue[
            tuple[list[Observation], asyncio.AbstractEventLoop, Callable[[PassResult], None]]
        ] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._passes = 0

    def start(self, observations: list[Observation], done: Callable[[PassResult], None]) -> None:
        """Starts a batch from the running event loop.

        Args:
            observations: at least one.
            done: called on that loop once all outcomes are there.
        """
        if self._thread is None:
            # A daemon, so that a pass that hangs does not keep the process.
            self._thread = threading.Thread(target=self._work, name="forward", daemon=True)
            self._thread.start()
        self._batches.put((observations, asyncio.get_running_loop(), done))

    def _work(self) -> None:
        while True:
            observations, loop, done = self._batches.get()
            started = time.perf_counter()
            self._passes = 0
            outcomes = self._outcomes(observations)
            result = PassResult(outcomes, time.perf_counter() - started, whole=self._passes == 1)
            with contextlib.suppress(RuntimeError):  # a loop that was closed meanwhile: nobody waits
                loop.call_soon_threadsafe(done, result)

    def _outcomes(self, observations: list[Observation]) -> list[NDArray[Any] | Exception]:
        """Actions or errors; a batch that fails is halved until only the culprits have failed."""
        self._passes += 1
        try:
            results = self._forward(observations)
            if len(results) != len(observations):
                raise RuntimeError(
                    f"the policy gave {len(results)} results for {len(observations)} observations"
                )
            return list(results)
        except Exception as error:  # noqa: BLE001 - whatever the model raises belongs to whoever sent the observation
            if len(observations) == 1:
                return [error]
        half = len(observations) // 2
        return self._outcomes(observations[:half]) + self._outcomes(observations[half:])
