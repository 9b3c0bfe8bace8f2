"""A handler of decode jobs that does what broken videos make decoders do. Loaded inside real decoder processes."""

from __future__ import annotations

import ctypes
import os
import time

import numpy as np

from defi_platform.data.decode.messages import DecodeJob, Probe, ProbeJob
from defi_platform.data.decode.probe import Report
from defi_platform.data.decode.worker_jobs import JobHandler
from defi_platform.data.rejection import BadVideo


class HostileJobHandler(JobHandler):
    """Behaves by the name of the file: hang, locked, abort, exit, allocate, leak, storage, away until there is a
    file `back` beside it, where it leaves a file `asked`, or fill every frame with 7."""

    def __init__(self, memory_bytes: int) -> None:
        super().__init__(memory_bytes)
        self._kept: list[np.ndarray] = []

    def decode(self, job: DecodeJob, out: np.ndarray) -> None:
        self.files_opened += 1
        name = os.path.basename(job.uri)
        if name.startswith("hang"):
            time.sleep(3600)
        if name.startswith("locked"):
            # A library that never lets other Python code run.
            ctypes.PyDLL(None).sleep(3600)
        if name.startswith("abort"):
            os.abort()
        if name.startswith("exit"):
            os._exit(3)
        if name.startswith("once"):
            # Dies the first time only, as when an operator or the kernel killed the process.
            with open(job.uri, "a+b") as file:
                first = file.tell() == 0
                file.write(b"x")
            if first:
                os.kill(os.getpid(), 9)
        while name.startswith("allocate"):
            self._kept.append(np.ones(32 << 20, np.uint8))
        if name.startswith("leak"):
            self._kept.append(np.ones(48 << 20, np.uint8))
        away = name.startswith("away") and not os.path.exists(os.path.join(os.path.dirname(job.uri), "back"))
        if away:
            with open(os.path.join(os.path.dirname(job.uri), "asked"), "w"):
                pass
        if name.startswith("storage") or away:
            raise BadVideo("storage", "503 Slow Down")
        if name.startswith("pid"):
            out[...] = np.frombuffer(np.uint32(os.getpid()).tobytes(), np.uint8)[:4].reshape(
                (*out.shape[:1], 4, 1, 1)
            )
            return
        out[...] = 7

    def probe(self, job: ProbeJob, report: Report) -> Probe:
        """As if the file declared an hour: `slow` decodes for a while, `stuck` stops after its first picture."""
        report(3600.0)
        for _ in range(4):
            time.sleep(3600 if job.uri == "stuck" else 0.75)
            report(3600.0)
        return Probe(2, 1.0, 4, 4, "none", 1, "pyav", False)
