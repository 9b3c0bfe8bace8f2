"""The one thread in which forward passes run, one at a time."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

from numpy.typing import NDArray

from defi_platform.serve.observation import Observation

Result = TypeVar("Result")

Forward = Callable[[list[Observation]], Sequence[NDArray[Any]]]
"""One forward pass: n observations -> n arrays (chunk, A) float32 in raw units. Never called twice at a time."""


@dataclass(frozen=True)
class WarmUp:
    """The forward passes before the first client."""

    seconds: dict[int, float]
    """Of one warm pass, by its observations."""
    largest: int
    """Observations per pass, at most: fewer than asked for where more do not fit into memory."""


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
    """Runs batches in a thread and hands the results back to the event loop they came from.

    The thread is a daemon, so that a pass that hangs does not keep the process.
    """

    def __init__(self, forward: Forward) -> None:
        """Starts the thread, which ends with the process."""
        self._forward = forward
        self._work: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._passes = 0
        threading.Thread(target=self._loop, name="forward", daemon=True).start()

    def run(self, function: Callable[[], Result]) -> Result:
        """Runs a function in the thread and waits for its result. Raises: whatever it raises."""
        found: Future[Result] = Future()

        def work() -> None:
            try:
                found.set_result(function())
            except BaseException as error:  # noqa: BLE001 - it belongs to the caller
                found.set_exception(error)

        self._work.put(work)
        return found.result()

    def start(self, observations: list[Observation], done: Callable[[PassResult], None]) -> None:
        """Starts a batch from the running event loop.

        Args:
            observations: at least one.
            done: called on that loop once all outcomes are there.
        """
        loop = asyncio.get_running_loop()

        def work() -> None:
            result = self._result(observations)
            with contextlib.suppress(RuntimeError):  # a loop that was closed meanwhile: nobody waits
                loop.call_soon_threadsafe(done, result)

        self._work.put(work)

    def _loop(self) -> None:
        while True:
            self._work.get()()

    def _result(self, observations: list[Observation]) -> PassResult:
        started = time.perf_counter()
        self._passes = 0
        outcomes = self._outcomes(observations)
        return PassResult(outcomes, time.perf_counter() - started, whole=self._passes == 1)

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
