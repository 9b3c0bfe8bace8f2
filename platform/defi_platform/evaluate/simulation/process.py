"""A simulator's process as its owner sees it: calls with a time limit, a memory limit, and named failures."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import mmap
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from defi_platform.config import SimulatorConfig
from defi_platform.errors import SimulatorError, SimulatorFault
from defi_platform.evaluate.benchmarks.interface import Observation, Step, Task, View
from defi_platform.evaluate.benchmarks.registry import REGISTERED
from defi_platform.evaluate.simulation import wire
from defi_platform.evaluate.simulation.child import PICTURES_AT
from defi_platform.evaluate.simulation.interpreter import installation
from defi_platform.evaluate.simulation.start import MISFIT

_CHECK_S = 0.1
"""Seconds between two looks at a process that is at work."""
_STACK_S = 2.0
"""Seconds in which a process that hangs may write where it is."""
_FRAMES_BYTES = 32 << 20
"""Of shared memory for the frames of one call; it is taken as it is written to."""


@dataclass(frozen=True)
class Advance:
    """What a chunk of actions did: n steps, fewer than asked for where the task was solved or the episode ended."""

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
        self._picture_bytes = view.height * view.width * 3
        self._slots = max(1, _FRAMES_BYTES // (self._picture_bytes * len(view.cameras)))
        self._buffer = bytearray()
        self._output: deque[str] = deque(maxlen=200)
        self._open = contextlib.ExitStack()
        try:
            self._start()
            answer = self._call(
                "open",
                self._limits.reset_timeout_s,
                benchmark=benchmark,
                cameras=list(view.cameras),
                size=[view.height, view.width],
                options=dict(options),
            )
        except BaseException:
            self.close()
            raise
        self.protocol: dict[str, Any] = answer["protocol"]
        """See `Benchmark.protocol`."""

    def __enter__(self) -> SimulatorProcess:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def pid(self) -> int:
        """Of the simulator's process."""
        return self._process.pid

    # ----------------------------------------------------------------------- calls

    def reset(self, task: str, seed: int) -> tuple[tuple[Task, ...], NDArray[np.float32]]:
        """Starts the episode of (task, seed).

        Returns:
            Its subtasks, and the first state, (S,).
        """
        answer = self._call("reset", self._limits.reset_timeout_s, task=task, seed=seed)
        return tuple(Task(*part) for part in answer["chain"]), answer["state"]

    def begin(self, index: int) -> None:
        """Asks for subtask `index` from here on."""
        self._call("begin", self._limits.step_timeout_s, index=index)

    def observe(self, state: NDArray[np.float32]) -> Observation:
        """Pictures of the present state, as they go to a policy with that state."""
        self._call("observe", self._limits.step_timeout_s)
        return Observation(self._pictures(0), state)

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
        self._open.close()

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
        most = self._slots * frame_every if frame_every else count
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
            frames += [self._pictures(slot) for slot in range(answer["frames"])]
            proposed.append(answer["proposed"])
            executed.append(answer["executed"])
            columns = zip(answer["success"], answer["states"], answer["reward"], answer["done"], strict=True)
            steps += [Step(bool(s), state, float(r), bool(d)) for s, state, r, d in columns]
            if steps[-1].done or (steps[-1].success and not through):
                break
        return Advance(steps, np.concatenate(proposed), np.concatenate(executed), frames)

    def _pictures(self, slot: int) -> dict[str, NDArray[np.uint8]]:
        """Copies of the pictures in a slot of the shared memory."""
        view, found = self.view, {}
        for index, camera in enumerate(view.cameras):
            offset = PICTURES_AT + (slot * len(view.cameras) + index) * self._picture_bytes
            flat = np.frombuffer(self._memory, np.uint8, self._picture_bytes, offset)
            found[camera] = flat.reshape(view.height, view.width, 3).copy()
        return found

    # ----------------------------------------------------------------------- the process

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        self._open.callback(ours.close)
        self._socket = ours
        lifeline, self_end = os.pipe()
        self._open.callback(os.close, self_end)
        shared = os.memfd_create("simulator")
        os.ftruncate(shared, PICTURES_AT + self._slots * self._picture_bytes * len(self.view.cameras))
        self._memory = mmap.mmap(shared, 0)
        self._progress: NDArray[np.uint64] = np.frombuffer(self._memory, np.uint64, 1)
        output, output_end = os.pipe()
        passed = {"socket": theirs.fileno(), "lifeline": lifeline, "memory": shared}
        given = {**passed, "packages": _packages(self.benchmark), "path": []}
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        if self._python == sys.executable:
            given["path"] = [entry for entry in sys.path if entry]
        else:  # those of this Python are none of its business
            environment.pop("PYTHONPATH", None)
            environment.pop("PYTHONHOME", None)
        try:
            self._process = subprocess.Popen(
                [self._python, str(Path(__file__).with_name("start.py")), json.dumps(given)],
                stdin=subprocess.DEVNULL,
                stdout=output_end,
                stderr=output_end,
                pass_fds=list(passed.values()),
                env=environment,
                start_new_session=True,  # a group of its own, which is killed as a whole
            )
        except OSError as error:
            os.close(output)
            raise SimulatorError(
                f"the interpreter {self._python} of {self.benchmark} cannot be started ({error.strerror}). "
                f"{installation(self.benchmark)}."
            ) from error
        finally:
            theirs.close()
            for descriptor in (lifeline, shared, output_end):
                os.close(descriptor)
        reader = threading.Thread(target=self._read_output, args=(output,), daemon=True)
        reader.start()
        self._open.callback(reader.join, timeout=_STACK_S)
        self._open.callback(self._kill)

    def _read_output(self, descriptor: int) -> None:
        """Keeps the last lines of what the process writes, so that it never waits for a reader."""
        with open(descriptor, errors="replace") as lines:
            while line := lines.readline(1000):
                if line.strip():
                    self._output.append(line.rstrip())

    def _kill(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _call(self, call: str, timeout_s: float, **arguments: Any) -> dict[str, Any]:
        self.doing = call
        try:
            self._socket.settimeout(timeout_s)
            self._socket.sendall(wire.pack({"call": call, **arguments}))
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
        progress, since = int(self._progress[0]), time.monotonic()
        readable = select.poll()
        readable.register(self._socket, select.POLLIN | select.POLLHUP)
        while True:
            if readable.poll(1000 * _CHECK_S):
                try:
                    received = self._socket.recv(1 << 16)
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
            if self._process.poll() is not None:
                self._died()  # a child of its own keeps the connection open
            if (now := int(self._progress[0])) != progress:
                progress, since = now, time.monotonic()
            elif time.monotonic() - since > timeout_s:
                self._hang(timeout_s)

    def _check_memory(self) -> None:
        try:
            pages = int(Path(f"/proc/{self._process.pid}/statm").read_text().split()[1])
        except (OSError, IndexError):
            return  # it has just ended, which the next look at the connection says
        gigabytes = pages * os.sysconf("SC_PAGE_SIZE") / 1e9
        if gigabytes > self._limits.memory_gb:
            self._fail(
                "memory", f"{gigabytes:.1f} GB in use, simulator.memory_gb is {self._limits.memory_gb:g}"
            )

    # ----------------------------------------------------------------------- failures

    def _hang(self, timeout_s: float) -> NoReturn:
        with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
            self._process.send_signal(signal.SIGABRT)  # it writes where it is, even in native code
            self._process.wait(_STACK_S)
        self._fail("hang", f"no progress in {timeout_s:g} s")

    def _died(self) -> NoReturn:
        try:
            code = self._process.wait(_STACK_S)
        except subprocess.TimeoutExpired:
            self._fail("protocol", "it closed its connection and goes on")
        if code == MISFIT:
            self.close()
            said = self._output[-1] if self._output else "it says nothing"
            raise SimulatorError(
                f"the interpreter {self._python} cannot run {self.benchmark}: {said}. {installation(self.benchmark)}."
            )
        if code == -signal.SIGKILL:
            self._fail("memory", "killed from outside, as the system does when memory runs out")
        how = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
        self._fail("abort", f"the process ended {how}")

    def _fail(self, kind: str, message: str) -> NoReturn:
        self.close()
        raise SimulatorFault(kind, f"{self.benchmark}, {self.doing}: {message}{self._last_words(kind)}")

    def _last_words(self, kind: str) -> str:
        """Where the process was, and its last line of output; only of one that could not answer."""
        if kind not in ("hang", "abort", "protocol"):
            return ""
        lines = list(self._output)
        starts = [n for n, line in enumerate(lines) if "most recent call first" in line]
        stack = [line.strip() for line in lines[starts[-1] :] if line.startswith("  File ")] if starts else []
        before = (
            [line for line in lines[: starts[-1]] if "Fatal Python error" not in line] if starts else lines
        )
        where = f"; at {stack[0]}" if stack else ""
        return where + (f"; its last output: {before[-1][:300]}" if before else "")

    def _unavailable(self, message: str, module: str | None) -> str:
        if module is None:
            return message
        place = "here" if self._python == sys.executable else f"in {self._python}"
        return f"{self.benchmark} is not installed {place} (no module '{module}'). {installation(self.benchmark)}."


def _packages(benchmark: str) -> dict[str, str]:
    """Top-level module -> folder or file, of all that the process needs besides the simulator's own packages."""
    names = ["defi_platform", "defi_models"]
    if benchmark not in REGISTERED:
        names.append(benchmark.partition(":")[0].partition(".")[0])
    found = {}
    for name in names:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.submodule_search_locations:
            found[name] = next(iter(spec.submodule_search_locations))
        elif spec is not None and spec.origin:
            found[name] = spec.origin
    return found
