"""An event loop whose clock jumps to the next timer, and a device that only takes time: minutes of load in a second."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable, Coroutine
from typing import Any

import numpy as np

from defi_platform.serve.inference.forward_thread import PassResult
from defi_platform.serve.observation import Observation


class _JumpingSelector(selectors.SelectSelector):
    now = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        assert timeout is not None, "everything waits for everything else"
        self.now += max(0.0, timeout)
        return super().select(0)


class VirtualLoop(asyncio.SelectorEventLoop):
    """Runs what its timers say without waiting."""

    def __init__(self) -> None:
        self._jumping = _JumpingSelector()
        super().__init__(self._jumping)

    def time(self) -> float:
        return self._jumping.now


def run_virtually(main: Coroutine[Any, Any, Any]) -> Any:
    """Result of a coroutine that runs in virtual time."""
    loop = VirtualLoop()
    try:
        return loop.run_until_complete(main)
    finally:
        loop.close()


class SleepingDevice:
    """Forward passes of fixed_s + each_s * n seconds; an observation's action is its seed."""

    def __init__(self, fixed_s: float = 0.020, each_s: float = 0.0006) -> None:
        self.fixed_s, self.each_s = fixed_s, each_s
        self.passes: list[tuple[float, int]] = []
        """Start and size of each."""

    def start(self, observations: list[Observation], done: Callable[[PassResult], None]) -> None:
        loop = asyncio.get_running_loop()
        self.passes.append((loop.time(), len(observations)))
        took = self.fixed_s + self.each_s * len(observations)
        outcomes: list[Any] = [np.array([[each.seed]], np.float32) for each in observations]
        loop.call_later(took, done, PassResult(outcomes, took, whole=True))


def numbered(number: int) -> Observation:
    return Observation(np.zeros((1, 2, 2, 3), np.uint8), state=None, prompt="", seed=number)
