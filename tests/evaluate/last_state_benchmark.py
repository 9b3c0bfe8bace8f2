"""A simulator of numbers with what few benchmarks have: tasks that their last state decides, one whose instruction changes
on the way, and another number of initial states for each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from defi_platform.evaluate.benchmarks.interface import LAST, ActionSpec, Benchmark, Step, Task, View

HORIZON = 10
CHANGE_AT = 4
"""Step at which the instruction of `put` changes."""
STATES = {"pass": 3, "put": 5, "free": None}


class LastState(Benchmark):
    """The state is the sum of the actions. `pass` is met from 5 to 7, `put` from 9 on, `free` from 5 on."""

    name = "last_state"
    cameras = ("front",)
    default_view = View(("front",), 16, 16)
    state_names = ("sum",)
    action = ActionSpec(("add",), (0.0,), (1.0,))
    control_hz = 10.0
    has_expert = True

    @classmethod
    def tasks(cls, options: Mapping[str, Any]) -> tuple[Task, ...]:
        return (
            Task("pass", "stay between", HORIZON, LAST),
            Task("put", "open it", HORIZON, LAST),
            Task("free", "count", HORIZON),
        )

    @classmethod
    def initial_states(cls, task: str, options: Mapping[str, Any]) -> int | None:
        return STATES[task]

    def protocol(self) -> dict[str, Any]:
        return {}

    def reset(self, task: str, seed: int) -> np.ndarray:
        self._task, self._sum, self._steps = task, 0.0, 0
        return np.array([self._sum], np.float32)

    def step(self, action: np.ndarray) -> Step:
        self._sum += float(action[0])
        self._steps += 1
        met = {"pass": 5 <= self._sum <= 7, "put": self._sum >= 9, "free": self._sum >= 5}[self._task]
        text = "put it in" if self._task == "put" and self._steps == CHANGE_AT else None
        return Step(met, np.array([self._sum], np.float32), instruction=text)

    def render(self) -> dict[str, np.ndarray]:
        return {"front": np.full((16, 16, 3), 100, np.uint8)}

    def expert_action(self) -> np.ndarray:
        return np.ones(1, np.float32)
