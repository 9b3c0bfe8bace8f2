"""The process that decodes, seen from inside: `python -m defi_platform.data.decode.worker_process`.

It reads pickled jobs from one pipe, writes pickled answers to another and puts frames into a shared memory
file. Little else of the platform is imported here: it has to start fast and be cheap to kill.
"""

from __future__ import annotations

import mmap
import os
import resource
import sys
from typing import Any

import numpy as np

from defi_platform.data.decode.messages import DecodeJob, ProbeJob, read_message, write_message
from defi_platform.data.rejection import BadVideo


def _limit_memory(memory_bytes: int) -> None:
    """Caps the address space at what the process has now plus `memory_bytes`."""
    with open("/proc/self/statm", encoding="ascii") as file:
        used = int(file.read().split()[0]) * mmap.PAGESIZE
    resource.setrlimit(resource.RLIMIT_AS, (used + memory_bytes, used + memory_bytes))
    # A crash is an expected end here; a core file of gigabytes for each is not wanted.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def main(jobs_fd: int, answers_fd: int, frames_fd: int, memory_bytes: int) -> None:
    """Answers jobs until the pipe closes.

    Args:
        jobs_fd: pipe of the job handler's class, then of (number, job, offset of its frames).
        answers_fd: pipe for (number, answer, files opened so far); the answer is a `Probe`, a `BadVideo`, or None
            where the frames are in the shared memory.
        frames_fd: the shared memory, as long as the frames of the largest job.
        memory_bytes: that jobs may use, on top of what the process has when it is ready.
    """
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
                answer = handler.probe(job)
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
    main(*(int(value) for value in sys.argv[1:5]))
