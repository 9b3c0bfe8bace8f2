"""A simulator's process as its owner sees it: calls with a time limit, a memory limit, and named failures."""

from __future__ import annotations

import contextlib
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from defi_platform.config import SimulatorConfig
from defi_platform.errors import SimulatorError, SimulatorFault
from defi_platform.evaluate.benchmarks.interface import Observation, Step, Task, View
from defi_platform.evaluate.simulation import wire
from defi_platform.evaluate.simulation.interpreter import installation
from defi_platform.evaluate.simulation.launch import Launched
from defi_platform.evaluate.simulation.start import MISFIT

_CHECK_S = 0.1
"""Seconds between two looks at a process that is at work."""
_STACK_S = 2.0
"""Seconds in which a process that hangs may write where it is."""


@dataclass(frozen=True)
class Advance:
    """The result of a chunk of actions: n steps, fewer than asked for where `Step.ends_chunk`."""

    steps: list[Step]
    proposed: NDArray[np.float32]
    """(n, A), before `ActionSpec.prepared`."""
    executed: NDArray[np.float32]
    """(n, A), after it."""
    frames: list[dict[str, NDArray[np.uint8]]]
    """Pictures by camera before each step whose number `frame_every` divides."""


class SimulatorProcess:
    """One benchmark in a process of its own; a context manager.

    After a SimulatorFault the process is gone, with all that it had started; a new episode needs a new one.
    """

    def __init__(
        self,
        benchmark: str,
        view: View,
        options: Mapping[str, Any],
        python: str | None = None,
        limits: SimulatorConfig | None = None,
    ):
        """Starts the process and builds the simulator in it.

        Args:
            benchmark: its name, or module:Class.
            view: cameras and the size of their images.
            options: all of the benchmark's options, see `registry.selected_options`.
            python: interpreter that has the simulator's packages; None for this one.
            limits: time and memory.

        Raises:
            SimulatorError: the simulator cannot run here.
            SimulatorFault: it failed while it was built.
        """
        self.benchmark = benchmark
        self.view = view
        self.doing = "start"
        """The last call, for the place of an error."""
        self._python = python or sys.executable
        self._limits = limits or SimulatorConfig()
        self._buffer = bytearray()
        try:
            self._launched = Launched(self._python, benchmark, view)
        except OSError as error:
            raise SimulatorError(
                f"the interpreter {self._python} of {benchmark} cannot be started ({error.strerror}). "
                f"{installation(benchmark)}."
            ) from error
        try:
            answer = self._call(
                "open",
                self._limits.reset_timeout_s,
                benchmark=benchmark,
                view=[list(view.cameras), view.height, view.width, view.sizes],
                options=dict(options),
            )
        except BaseException:
            self.close()
            raise
        self.protocol: dict[str, Any] = answer["protocol"]
        """See `Benchmark.protocol`."""
        self.initial_positions: dict[str, float] = {}
        """Of the present episode, see `Benchmark.initial_positions`."""

    def __enter__(self) -> SimulatorProcess:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def pid(self) -> int:
        """Of the simulator's process."""
        return self._launched.process.pid

    # ----------------------------------------------------------------------- calls

    def reset(self, task: str, seed: int) -> tuple[tuple[Task, ...], NDArray[np.float32]]:
        """Starts the episode of (task, seed).

        Returns:
            Its subtasks, and the first state, (S,).
        """
        answer = self._call("reset", self._limits.reset_timeout_s, task=task, seed=seed)
        self.initial_positions = answer["positions"]
        return tuple(Task(*part) for part in answer["chain"]), answer["state"]

    def begin(self, index: int) -> None:
        """Asks for subtask `index` from here on."""
        self._call("begin", self._limits.step_timeout_s, index=index)

    def observe(self, state: NDArray[np.float32]) -> Observation:
        """Pictures of the present state, as they go to a policy with that state."""
        self._call("observe", self._limits.step_timeout_s)
        return Observation(self._launched.pictures.get(0), state)

    def advance(
        self,
        actions: NDArray[np.floating],
        *,
        first_step: int = 0,
        frame_every: int = 0,
        through: bool = False,
    ) -> Advance:
        """Executes a chunk of actions.

        Args:
            actions: (K, A) as a policy gave them.
            first_step: number of the first one's step in the episode, by which frames are counted.
            frame_every: steps per frame; 0 for no frames.
            through: go on after success.
        """
        return self._steps(actions, None, len(actions), first_step, frame_every, through)

    def expert(
        self,
        count: int,
        *,
        noise: NDArray[np.floating] | None = None,
        first_step: int = 0,
        frame_every: int = 0,
        through: bool = False,
    ) -> Advance:
        """Lets the benchmark's script act.

        Args:
            count: of steps, at most.
            noise: (count, A), added to what the script proposes.
            first_step: see `advance`.
            frame_every: see `advance`.
            through: see `advance`.
        """
        return self._steps(None, noise, count, first_step, frame_every, through)

    def close(self) -> None:
        """Kills the process and its children, and frees what it held."""
        self._launched.end()

    def _steps(
        self,
        actions: NDArray[np.floating] | None,
        noise: NDArray[np.floating] | None,
        count: int,
        first_step: int,
        frame_every: int,
        through: bool,
    ) -> Advance:
        """`advance` and `expert`, in as many calls as the frames need memory for."""
        steps: list[Step] = []
        proposed, executed, frames = [], [], []
        pictures = self._launched.pictures
        most = pictures.slots * frame_every if frame_every else count
        for start in range(0, count, max(1, most)):
            stop = min(count, start + most)
            answer = self._call(
                "advance",
                self._limits.step_timeout_s,
                actions=None if actions is None else actions[start:stop],
                noise=None if noise is None else noise[start:stop],
                count=stop - start,
                first_step=first_step + start,
                frame_every=frame_every,
                through=through,
            )
            frames += [pictures.get(slot) for slot in range(answer["frames"])]
            proposed.append(answer["proposed"])
            executed.append(answer["executed"])
            columns = zip(answer["success"], answer["states"], answer["reward"], answer["done"], strict=True)
            steps += [Step(bool(s), state, float(r), bool(d)) for s, state, r, d in columns]
            steps[-1] = replace(steps[-1], instruction=answer["instruction"])
            if steps[-1].ends_chunk(through):
                break
        return Advance(steps, np.concatenate(proposed), np.concatenate(executed), frames)

    # ----------------------------------------------------------------------- the process

    def _call(self, call: str, timeout_s: float, **arguments: Any) -> dict[str, Any]:
        self.doing = call
        try:
            self._launched.socket.settimeout(timeout_s)
            self._launched.socket.sendall(wire.pack({"call": call, **arguments}))
        except TimeoutError:
            self._hang(timeout_s)
        except OSError:
            self._died()
        answer = self._answer(timeout_s)
        if "unavailable" in answer:
            self.close()
            raise SimulatorError(self._unavailable(answer["unavailable"], answer["module"]))
        if "fault" in answer:
            self._fail(answer["fault"], answer["message"])
        return answer

    def _answer(self, timeout_s: float) -> dict[str, Any]:
        """Waits for an answer, as long as steps and pictures follow each other within the time limit."""
        pictures = self._launched.pictures
        progress, since = pictures.progress, time.monotonic()
        readable = select.poll()
        readable.register(self._launched.socket, select.POLLIN | select.POLLHUP)
        while True:
            if readable.poll(1000 * _CHECK_S):
                try:
                    received = self._launched.socket.recv(1 << 16)
                except OSError:
                    received = b""
                if not received:
                    self._died()
                self._buffer += received
                try:
                    message = wire.unpack(self._buffer)
                except wire.WireError as error:
                    self._fail("protocol", str(error))
                if message is not None:
                    self._check_memory()
                    return message
                continue
            self._check_memory()
            if self._launched.process.poll() is not None:
                self._died()  # a child of its own keeps the connection open
            if (now := pictures.progress) != progress:
                progress, since = now, time.monotonic()
            elif time.monotonic() - since > timeout_s:
                self._hang(timeout_s)

    def _check_memory(self) -> None:
        gigabytes = self._launched.resident_bytes() / 1e9
        if gigabytes > self._limits.memory_gb:
            self._fail(
                "memory", f"{gigabytes:.2f} GB in use, simulator.memory_gb is {self._limits.memory_gb:g}"
            )

    # ----------------------------------------------------------------------- failures

    def _hang(self, timeout_s: float) -> NoReturn:
        with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
            self._launched.process.send_signal(signal.SIGABRT)  # it writes where it is, even in native code
            self._launched.process.wait(_STACK_S)
        self._fail("hang", f"no progress in {timeout_s:g} s")

    def _died(self) -> NoReturn:
        try:
            code = self._launched.process.wait(_STACK_S)
        except subprocess.TimeoutExpired:
            self._fail("protocol", "it closed its connection and goes on")
        if code == MISFIT:
            self.close()
            said = lines[-1] if (lines := self._launched.output()) else "it says nothing"
            raise SimulatorError(
                f"the interpreter {self._python} cannot run {self.benchmark}: {said}. {installation(self.benchmark)}."
            )
        if code == -signal.SIGKILL:
            self._fail("memory", "killed from outside, as the system does when memory runs out")
        if code >= 0 and self.doing == "open":  # not by a signal: it would end so again
            self.close()
            raise SimulatorError(
                f"{self.benchmark} cannot be started with {self._python}: it ends with exit code {code}"
                f"{self._last_words('abort')}. {installation(self.benchmark)}."
            )
        how = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
        self._fail("abort", f"the process ended {how}")

    def _fail(self, kind: str, message: str) -> NoReturn:
        self.close()
        raise SimulatorFault(kind, f"{self.benchmark}, {self.doing}: {message}{self._last_words(kind)}")

    def _last_words(self, kind: str) -> str:
        """The place in the code and the last line of output; only of a process that could not answer."""
        if kind not in ("hang", "abort", "protocol"):
            return ""
        stack, lines = self._launched.stack()
        where = f"; at {stack[0]}" if stack else ""
        return where + (f"; its last output: {lines[-1][:300]}" if lines else "")

    def _unavailable(self, message: str, module: str | None) -> str:
        if module is None:
            return message
        place = "here" if self._python == sys.executable else f"in {self._python}"
        if not module:
            return f"{self.benchmark} cannot be imported {place} ({message}). {installation(self.benchmark)}."
        return f"{self.benchmark} is not installed {place} (no module '{module}'). {installation(self.benchmark)}."
