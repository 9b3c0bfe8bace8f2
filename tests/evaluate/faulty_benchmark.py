"""A simulator of numbers whose tasks break it, each in a way in which real ones break."""

from __future__ import annotations

import ctypes
import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from defi_platform.evaluate.benchmarks.interface import ActionSpec, Benchmark, Step, Task, View
from defi_platform.evaluate.benchmarks.metaworld.benchmark import MetaWorld

HORIZON = 20
FAULT_AT = 4
"""Number of the step in which the tasks break it."""


class Counter(Benchmark):
    """The state is the sum of the actions; a subtask is solved when it has grown by 5."""

    name = "counter"
    cameras = ("left", "right")
    default_view = View(("left", "right"), 16, 16, {"right": (32, 24)})
    state_names = ("sum",)
    action = ActionSpec(("add",), (0.0,), (1.0,))
    control_hz = 10.0
    has_expert = True
    options = {"trace": ()}  # noqa: RUF012 (of the interface, where it is a ClassVar)

    @classmethod
    def tasks(cls, options: Mapping[str, Any]) -> tuple[Task, ...]:
        names = ("chain", *(name.removeprefix("_do_") for name in vars(cls) if name.startswith("_do_")))
        return tuple(Task(name, f"do {name}", HORIZON) for name in names)

    def protocol(self) -> dict[str, Any]:
        return {"python": sys.executable}

    def chain(self, task: str, seed: int) -> tuple[Task, ...]:
        if task != "chain":
            return super().chain(task, seed)
        return tuple(Task(f"part {n}", f"count {n}", HORIZON) for n in range(3))

    def reset(self, task: str, seed: int) -> np.ndarray:
        self._task, self._sum, self._steps, self._from = task, float(seed), 0, float(seed)
        return np.array([self._sum], np.float32)

    def begin(self, index: int) -> None:
        self._from = self._sum

    def step(self, action: np.ndarray) -> Step:
        if self._steps == FAULT_AT and self._task != "chain":
            getattr(self, f"_do_{self._task}")()
        self._steps += 1
        self._sum += float(action[0])
        # From seed 900 on the last part of a chain cannot be solved.
        solved = self._sum - self._from >= 5 and not (self._sum > 911)
        return Step(solved, np.array([self._sum], np.float32), reward=float(action[0]))

    def render(self) -> dict[str, np.ndarray]:
        if self._task == "lost_context" and self._steps > FAULT_AT:
            raise RuntimeError("no current context")
        value = 0 if self._task == "black_picture" and self._steps > FAULT_AT else 1 + self._steps % 200
        pictures = {name: np.full((*self.view.size(name), 3), value, np.uint8) for name in self.view.cameras}
        if self._task == "wrong_picture":
            pictures["right"] = pictures["right"].astype(np.float32)
        return pictures

    def expert_action(self) -> np.ndarray:
        return np.ones(1, np.float32)


class Faulty(Counter):
    """Breaks at step FAULT_AT in the way that the task says."""

    name = "faulty"

    def _do_nothing(self) -> None:
        pass

    def _do_hang(self) -> None:
        # With the interpreter's lock held, as native code does that waits for what never comes.
        ctypes.PyDLL(None).sleep(1000)

    def _do_hang_with_child(self) -> None:
        child = subprocess.Popen(["sleep", "1000"])
        print(f"child {child.pid}", flush=True)
        Path(os.environ["PIDS_FILE"]).write_text(f"{os.getpid()} {child.pid}")
        self._do_hang()

    def _do_abort(self) -> None:
        print("physics has diverged", flush=True)
        ctypes.CDLL(None).abort()

    def _do_segfault(self) -> None:
        ctypes.string_at(0)

    def _do_exit(self) -> None:
        os._exit(3)

    def _do_killed(self) -> None:
        os.kill(os.getpid(), 9)

    def _do_leak(self) -> None:
        self._kept = np.ones(30_000_000)  # 240 MB

    def _do_leak_for_ever(self) -> None:
        self._kept = []
        while True:
            self._kept.append(np.ones(250_000))
            time.sleep(0.01)

    def _do_error(self) -> None:
        raise ZeroDivisionError("the quaternion has no length")

    def _do_lost_context(self) -> None:
        pass

    _do_black_picture = _do_wrong_picture = _do_lost_context

    def _do_garbage(self) -> None:
        """Bytes where the answers go, from code that writes to a descriptor that it believes to be its own."""
        for number in map(int, os.listdir("/proc/self/fd")):
            try:
                with socket.socket(fileno=os.dup(number)) as connection:
                    connection.sendall(b"MuJoCo warning: nan in qacc" * 3)
            except OSError:
                continue

    def _do_chatter(self) -> None:
        os.write(1, b"WARNING: unstable\n" * 50_000)
        os.write(2, b"\xff\x00 not text\n" * 10_000)

    def _do_slow(self) -> None:
        time.sleep(0.4)

    def _do_twice(self) -> None:
        """Breaks two processes; the third finds the traces of both."""
        trace = Path(self.given["trace"])
        trace.write_text(trace.read_text() + "x" if trace.exists() else "x")
        if len(trace.read_text()) <= 2:
            self._do_abort()


class Uninstalled(Counter):
    """A benchmark whose packages are not there."""

    def __init__(self, view: View, options: Mapping[str, Any]):
        super().__init__(view, options)
        import no_such_simulator  # noqa: F401


class WideState(Faulty):
    """Gives more than `state_names` says."""

    def reset(self, task: str, seed: int) -> np.ndarray:
        return np.repeat(super().reset(task, seed), 3)


class Diverged(Faulty):
    """Its physics do not hold."""

    def step(self, action: np.ndarray) -> Step:
        return Step(False, super().step(action).state * np.nan)


class NoSubtask(Faulty):
    """Asks for nothing, which would be solved at once."""

    def chain(self, task: str, seed: int) -> tuple[Task, ...]:
        return ()


class NoSteps(Faulty):
    """Gives a subtask no step, which no policy could solve."""

    def chain(self, task: str, seed: int) -> tuple[Task, ...]:
        return (Task("nothing", "do nothing", 0),)


class OneArray(Faulty):
    """Writes every state into the same array."""

    def reset(self, task: str, seed: int) -> np.ndarray:
        self._state = super().reset(task, seed)
        return self._state

    def step(self, action: np.ndarray) -> Step:
        self._state[:] = super().step(action).state
        return Step(False, self._state)


class NoJson(Faulty):
    """Its protocol cannot be stored."""

    def protocol(self) -> dict[str, Any]:
        return {"model": Path("scene.xml")}


class NoLibrary(Faulty):
    """Its package is there, a library of the system is not."""

    def __init__(self, view: View, options: Mapping[str, Any]):
        super().__init__(view, options)
        raise ImportError("libGL.so.1: cannot open shared object file")


class LostContext(MetaWorld):
    """Meta-World whose rendering context goes with the driver, after the first picture."""

    def render(self) -> dict[str, np.ndarray]:
        pictures = super().render()
        renderer = self._renderer
        assert renderer is not None
        renderer._gl.free()
        return pictures
