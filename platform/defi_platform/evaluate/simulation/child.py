"""The simulator's side of its process: one benchmark, called by the process that owns this one.

Pictures go into memory that both processes share, and so does the count of steps and pictures, by which the owner
tells a slow call from one that hangs.
"""

from __future__ import annotations

import contextlib
import faulthandler
import fcntl
import json
import os
import resource
import signal
import socket
import traceback
from typing import Any

import numpy as np
from numpy.typing import NDArray

from defi_platform.errors import ConfigError, SimulatorError, SimulatorFault, one_line
from defi_platform.evaluate.benchmarks.interface import FIRST, LAST, Benchmark, Step, View
from defi_platform.evaluate.benchmarks.registry import benchmark_class
from defi_platform.evaluate.simulation import wire
from defi_platform.evaluate.simulation.pictures import SharedPictures

_F_SETSIG = 10  # of fcntl.h; Python's module does not name it
_OUT_OF_MEMORY_FIRST = "500"


def serve(connection: int, lifeline: int, memory: int) -> None:
    """Answers calls until the owner closes the connection.

    Args:
        connection: file descriptor of a stream socket.
        lifeline: of a pipe whose other end the owner holds and never writes to.
        memory: of the shared memory.
    """
    for descriptor in (connection, lifeline, memory):
        os.set_inheritable(descriptor, False)
    _die_with(lifeline)
    faulthandler.enable()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as score:
        score.write(_OUT_OF_MEMORY_FIRST)  # rather than the worker that reports it
    simulator = _Simulator(memory)
    buffer = bytearray()
    with socket.socket(fileno=connection) as owner:
        while True:
            request = wire.unpack(buffer)
            if request is None:
                received = owner.recv(1 << 16)
                if not received:
                    break
                buffer += received
                continue
            owner.sendall(wire.pack(simulator.answer(request)))
    simulator.close()


def _die_with(lifeline: int) -> None:
    """Has the kernel kill this process and its children when the owner's end of the pipe closes.

    Not by a thread, which would wait for ever beside native code that hangs with the interpreter's lock.
    """
    fcntl.fcntl(lifeline, fcntl.F_SETOWN, -os.getpgrp())
    fcntl.fcntl(lifeline, _F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(lifeline, fcntl.F_SETFL, fcntl.fcntl(lifeline, fcntl.F_GETFL) | os.O_ASYNC)


class _Simulator:
    """The benchmark, the present state's pictures, and what is being done, for the message of an error."""

    def __init__(self, memory: int):
        self._memory = memory
        self._shared: SharedPictures | None = None
        self._pictures: dict[str, NDArray[np.uint8]] | None = None
        self._rendering = False
        self._benchmark: Benchmark | None = None

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Carries out a call; an error is an answer too."""
        self._rendering = False
        call = request.pop("call")
        try:
            if call == "open":
                return self._open(**request)
            result: dict[str, Any] = getattr(self, f"_{call}")(self._opened, **request)
            return result
        except SimulatorError as error:
            return {"unavailable": str(error), "module": None}
        except SimulatorFault as error:
            return {"fault": error.kind, "message": error.message}
        except MemoryError as error:
            return {"fault": "memory", "message": one_line(error)}
        except Exception as error:  # noqa: BLE001 (a simulator's errors are of any type)
            place = traceback.extract_tb(error.__traceback__)[-1]
            return {
                "fault": "render" if self._rendering else "error",
                "message": f"{type(error).__name__}: {_words(error)} "
                f"({os.path.basename(place.filename)}, line {place.lineno}, in {place.name})",
            }

    def close(self) -> None:
        if self._benchmark is not None:
            self._benchmark.close()

    @property
    def _opened(self) -> Benchmark:
        assert self._benchmark is not None
        return self._benchmark

    def _open(self, benchmark: str, view: list[Any], options: dict[str, Any]) -> dict[str, Any]:
        cameras, height, width, sizes = view
        self._view = View(tuple(cameras), height, width, {name: tuple(size) for name, size in sizes.items()})
        self._shared = SharedPictures(self._memory, self._view)
        try:
            self._benchmark = benchmark_class(benchmark)(self._view, options)
        except (ImportError, ConfigError) as error:
            cause = error.__cause__ if isinstance(error, ConfigError) else error
            return {
                "unavailable": one_line(error),
                "module": cause.name if isinstance(cause, ModuleNotFoundError) else "",
            }
        protocol = self._benchmark.protocol()
        try:
            json.dumps(protocol)
        except (TypeError, ValueError) as error:
            return {
                "unavailable": f"{benchmark}: protocol() gives what JSON cannot hold ({one_line(error)}).",
                "module": None,
            }
        return {"protocol": protocol}

    def _reset(self, benchmark: Benchmark, task: str, seed: int) -> dict[str, Any]:
        self._pictures = None
        state = _state(benchmark, benchmark.reset(task, seed))
        parts = benchmark.chain(task, seed)
        if not parts:
            raise ValueError(f"chain('{task}', {seed}) is empty: an episode has one subtask or more")
        if any(part.horizon < 1 for part in parts):
            raise ValueError(f"chain('{task}', {seed}) has a subtask whose horizon is no step")
        positions = {name: float(value) for name, value in benchmark.initial_positions().items()}
        if wrong := [part.decided for part in parts if part.decided not in (FIRST, LAST)]:
            raise ValueError(f"chain('{task}', {seed}) has a subtask decided by the '{wrong[0]}' state")
        chain = [[part.name, part.instruction, part.horizon, part.decided] for part in parts]
        return {"chain": chain, "state": state, "positions": positions}

    def _begin(self, benchmark: Benchmark, index: int) -> dict[str, Any]:
        benchmark.begin(index)
        return {}

    def _observe(self, benchmark: Benchmark) -> dict[str, Any]:
        self._show(benchmark, 0)
        return {}

    def _advance(
        self,
        benchmark: Benchmark,
        actions: NDArray[np.floating] | None,
        noise: NDArray[np.floating] | None,
        count: int,
        first_step: int,
        frame_every: int,
        through: bool,
    ) -> dict[str, Any]:
        """Steps with given actions, or with the expert's where there are none."""
        assert self._shared is not None
        steps: list[Step] = []
        states, proposed, executed = [], [], []
        frames = 0
        given = None if actions is None else benchmark.action.prepared(_sum(actions, noise))
        for index in range(count):
            if frame_every and (first_step + index) % frame_every == 0:
                self._show(benchmark, frames)
                frames += 1
            if actions is None or given is None:
                proposed.append(_vector(benchmark.expert_action()))
                noisy = _sum(proposed[-1], None if noise is None else noise[index])
                executed.append(benchmark.action.prepared(noisy[None])[0])
            else:
                proposed.append(_vector(actions[index]))
                executed.append(given[index])
            steps.append(benchmark.step(executed[-1]))
            states.append(_state(benchmark, steps[-1].state))
            self._pictures = None
            self._shared.advance()
            if steps[-1].ends_chunk(through):
                break
        return {
            "frames": frames,
            "proposed": np.stack(proposed),
            "executed": np.stack(executed),
            "states": np.stack(states),
            "success": np.array([step.success for step in steps], bool),
            "reward": np.array([step.reward for step in steps], np.float64),
            "done": np.array([step.done for step in steps], bool),
            "instruction": steps[-1].instruction,
        }

    def _show(self, benchmark: Benchmark, slot: int) -> None:
        """Copies the present state's pictures into a slot of the shared memory; renders at most once per state."""
        assert self._shared is not None
        if self._pictures is None:
            self._rendering = True
            self._pictures = benchmark.render()
            self._rendering = False
        try:
            self._shared.put(slot, self._pictures)
        except ValueError as error:
            raise SimulatorFault("render", str(error)) from error
        for camera in self._view.cameras:
            if not self._pictures[camera].any():
                raise SimulatorFault(
                    "render", f"camera {camera} gives zeros only: its rendering context is lost"
                )
        self._shared.advance()


def _sum(actions: NDArray[np.floating], noise: NDArray[np.floating] | None) -> NDArray[np.floating]:
    return actions if noise is None else actions + noise


def _words(error: Exception) -> str:
    """The error's message; PyOpenGL's have none that can be printed once the context is lost."""
    try:
        return one_line(error)
    except Exception:  # noqa: BLE001
        return "no message"


def _state(benchmark: Benchmark, values: Any) -> NDArray[np.float32]:
    """A state as it is sent, whatever the benchmark writes into its own array later."""
    state = _vector(values)
    if state.shape != (width := (len(benchmark.state_names),)):
        raise ValueError(f"the state has shape {state.shape} in the place of {width}, see state_names")
    if not np.isfinite(state).all():
        names = [
            name for name, value in zip(benchmark.state_names, state, strict=True) if not np.isfinite(value)
        ]
        raise ValueError(f"the state is not finite: {', '.join(names)}")
    return state


def _vector(values: Any) -> NDArray[np.float32]:
    return np.array(values, np.float32)
