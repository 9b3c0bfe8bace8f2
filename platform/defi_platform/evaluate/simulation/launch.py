"""Start and end of a simulator's process, what it shares with its owner, and its last lines of output."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections import deque
from pathlib import Path

from defi_platform.evaluate.benchmarks.interface import View
from defi_platform.evaluate.benchmarks.registry import REGISTERED
from defi_platform.evaluate.simulation.pictures import SharedPictures

_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_OUTPUT_S = 2.0
"""Seconds for the last of a dead process's output."""


class Launched:
    """A running process with its connection and memory; the kernel kills it when its owner ends."""

    def __init__(self, python: str, benchmark: str, view: View):
        """Starts it.

        Args:
            python: the interpreter.
            benchmark: its name, or module:Class.
            view: cameras and sizes.

        Raises:
            OSError: there is no such interpreter.
        """
        self._open = contextlib.ExitStack()
        self._output: deque[str] = deque(maxlen=200)
        self.socket, theirs = socket.socketpair()
        """Connection to the process."""
        self._open.callback(self.socket.close)
        lifeline, held = os.pipe()
        self._open.callback(os.close, held)
        memory = os.memfd_create("simulator")
        os.ftruncate(memory, SharedPictures.length(view))
        self.pictures = SharedPictures(memory, view)
        output, written = os.pipe()
        passed = {"socket": theirs.fileno(), "lifeline": lifeline, "memory": memory}
        given = {**passed, "packages": _packages(benchmark), "path": []}
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        if python == sys.executable:
            given["path"] = [entry for entry in sys.path if entry]
        else:  # those of this Python are none of its business
            environment.pop("PYTHONPATH", None)
            environment.pop("PYTHONHOME", None)
        try:
            self.process = subprocess.Popen(
                [python, str(Path(__file__).with_name("start.py")), json.dumps(given)],
                stdin=subprocess.DEVNULL,
                stdout=written,
                stderr=written,
                pass_fds=list(passed.values()),
                env=environment,
                start_new_session=True,  # a group of its own, which is killed as a whole
            )
        except OSError:
            os.close(output)
            self._open.close()
            raise
        finally:
            theirs.close()
            for descriptor in (lifeline, memory, written):
                os.close(descriptor)
        # Kept open: it is read after every call, and opening it costs ten times as much.
        self._statm = os.open(f"/proc/{self.process.pid}/statm", os.O_RDONLY)
        self._open.callback(os.close, self._statm)
        reader = threading.Thread(target=self._read_output, args=(output,), daemon=True)
        reader.start()
        self._open.callback(reader.join, timeout=_OUTPUT_S)
        self._open.callback(self._kill)

    def end(self) -> None:
        """Kills the process and its children, and frees what they held."""
        self._open.close()

    def resident_bytes(self) -> int:
        """Memory in use, the shared pictures included; 0 for a process that has ended."""
        try:
            return int(os.pread(self._statm, 100, 0).split()[1]) * _PAGE_BYTES
        except (OSError, IndexError):
            return 0

    def output(self) -> list[str]:
        """Its last lines on stdout and stderr."""
        return list(self._output)

    def stack(self) -> tuple[list[str], list[str]]:
        """Frames of Python when the process was aborted, innermost first, and the lines of output before them."""
        lines = self.output()
        starts = [n for n, line in enumerate(lines) if "most recent call first" in line]
        if not starts:
            return [], lines
        frames = [line.strip() for line in lines[starts[-1] :] if line.startswith("  File ")]
        return frames, [line for line in lines[: starts[-1]] if "Fatal Python error" not in line]

    def _kill(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def _read_output(self, descriptor: int) -> None:
        """Keeps the last lines of what the process writes, so that it never waits for a reader."""
        with open(descriptor, errors="replace") as lines:
            while line := lines.readline(1000):
                if line.strip():
                    self._output.append(line.rstrip())


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
