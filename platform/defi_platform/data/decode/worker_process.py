"""The process that decodes, seen from inside: `python -m defi_platform.data.decode.worker_process`.

It reads pickled jobs from one pipe, writes pickled answers to another and puts frames into a shared memory
file. Little else of the platform is imported here: it has to start fast and be cheap to kill.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import resource
import sys
import time
from typing import Any

import numpy as np

from defi_platform.data.decode.messages import (
    DecodeJob,
    ListingJob,
    ProbeJob,
    ProbeProgress,
    SignalsJob,
    read_message,
    write_message,
)
from defi_platform.data.rejection import BadVideo

REPORT_S = 1.0
"""Seconds between two reports that a probe goes on."""


def _limit_memory(memory_bytes: int) -> None:
    """Caps the address space at what the process has now plus `memory_bytes`."""
    with open("/proc/self/statm", encoding="ascii") as file:
        used = int(file.read().split()[0]) * mmap.PAGESIZE
    resource.setrlimit(resource.RLIMIT_AS, (used + memory_bytes, used + memory_bytes))
    # A crash is an expected end here; a core file of gigabytes for each is not wanted.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _end_with(owner_fd: int) -> None:
    """Has the kernel end this process when the owner is gone, in whatever code it is stuck.

    The owner's end of this pipe is never written to; the kernel closes it with the owner, and sends SIGIO, which
    ends a process by default. PR_SET_PDEATHSIG would follow the thread that started the process, not the owner.
    """
    fcntl.fcntl(owner_fd, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(owner_fd, fcntl.F_SETFL, fcntl.fcntl(owner_fd, fcntl.F_GETFL) | os.O_ASYNC | os.O_NONBLOCK)
    try:
        if os.read(owner_fd, 1) == b"":
            # It was gone before.
            sys.exit(1)
    except BlockingIOError:
        pass


class _Reporter:
    """Sends word that a probe goes on, once a second at most unless the declared length changes."""

    def __init__(self, answers_fd: int, number: int) -> None:
        self._fd, self._number = answers_fd, number
        self._declared_s, self._next = -1.0, 0.0

    def __call__(self, declared_s: float) -> None:
        now = time.monotonic()
        if declared_s != self._declared_s or now > self._next:
            self._declared_s, self._next = declared_s, now + REPORT_S
            write_message(self._fd, (self._number, ProbeProgress(declared_s), 0))


def main(jobs_fd: int, answers_fd: int, frames_fd: int, owner_fd: int, memory_bytes: int) -> None:
    """Answers jobs until the pipe closes.

    Args:
        jobs_fd: pipe of the job handler's class, then of (number, job, offset of its frames).
        answers_fd: pipe for (number, answer, files opened so far); the answer is a `Probe`, `EpisodeSignals`, a `BadVideo`, or None
            where the frames are in the shared memory. `ProbeProgress` goes ahead of a probe's.
        frames_fd: the shared memory, as long as the frames of the largest job.
        owner_fd: pipe that ends with the process that owns this one.
        memory_bytes: that jobs may use, on top of what the process has when it is ready.
    """
    _end_with(owner_fd)
    job_handler = read_message(jobs_fd)
    if job_handler is None:
        return
    handler = job_handler(memory_bytes)
    frames = mmap.mmap(frames_fd, os.fstat(frames_fd).st_size)
    _limit_memory(memory_bytes)
    while (message := read_message(jobs_fd)) is not None:
        number, job, offset = message
        answer: Any
        try:
            if isinstance(job, ProbeJob):
                answer = handler.probe(job, _Reporter(answers_fd, number))
            elif isinstance(job, SignalsJob):
                answer = handler.read_signals(job)
            elif isinstance(job, ListingJob):
                answer = handler.list_page(job, _Reporter(answers_fd, number))
            else:
                assert isinstance(job, DecodeJob)
                count = int(np.prod(job.shape))
                out = np.frombuffer(frames, np.uint8, count, offset).reshape(job.shape)
                handler.decode(job, out)
                answer = None
        except BadVideo as error:
            answer = error
        except MemoryError:
            answer = BadVideo("memory", f"more than {memory_bytes >> 20} MB")
        except Exception as error:  # noqa: BLE001  a codec library raises its own; the video is to blame
            answer = BadVideo("corrupt", f"{type(error).__name__}: {error}"[:500])
        write_message(answers_fd, (number, answer, handler.files_opened))


if __name__ == "__main__":
    main(*(int(value) for value in sys.argv[1:6]))
