"""The process that decodes, seen from inside: `python -m defi_platform.data.decode.worker_process`.

It reads pickled jobs from one pipe, writes pickled answers to another and puts frames into a shared memory
file. Nothing else of the platform is imported here: it has to start fast and be cheap to kill.
"""

from __future__ import annotations

import importlib
import mmap
import os
import pickle
import resource
import struct
import sys
from typing import Any

import numpy as np

from defi_platform.data.decode.video_readers import DecodeJob, ProbeJob
from defi_platform.data.rejection import BadVideo

HEADER = struct.Struct("<I")


def read_message(fd: int) -> Any:
    """One pickled message of a pipe; None at its end."""
    head = _read(fd, HEADER.size)
    if head is None:
        return None
    body = _read(fd, HEADER.unpack(head)[0])
    return None if body is None else pickle.loads(body)


def write_message(fd: int, message: Any) -> None:
    """Writes one pickled message to a pipe."""
    body = pickle.dumps(message)
    view = memoryview(HEADER.pack(len(body)) + body)
    while view:
        view = view[os.write(fd, view) :]


def _read(fd: int, count: int) -> bytes | None:
    parts = b""
    while len(parts) < count:
        part = os.read(fd, count - len(parts))
        if not part:
            return None
        parts += part
    return parts


def _limit_memory(memory_bytes: int) -> None:
    """Caps the address space at what the process has now plus `memory_bytes`."""
    with open("/proc/self/statm", encoding="ascii") as file:
        used = int(file.read().split()[0]) * mmap.PAGESIZE
    resource.setrlimit(resource.RLIMIT_AS, (used + memory_bytes, used + memory_bytes))
    # A crash is an expected end here; a core file of gigabytes for each is not wanted.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def main(jobs_fd: int, answers_fd: int, frames_fd: int, memory_bytes: int, carrier: str) -> None:
    """Answers jobs until the pipe closes.

    Args:
        carrier: `module:Class` of what carries jobs out; `reading:Jobs` but for survival tests.
    """
    module, _, name = carrier.partition(":")
    jobs = getattr(importlib.import_module(module), name)(memory_bytes)
    frames = mmap.mmap(frames_fd, os.fstat(frames_fd).st_size)
    _limit_memory(memory_bytes)
    while (message := read_message(jobs_fd)) is not None:
        number, job, offset = message
        answer: Any
        try:
            if isinstance(job, ProbeJob):
                answer = jobs.probe(job)
            else:
                assert isinstance(job, DecodeJob)
                count = int(np.prod(job.shape))
                out = np.frombuffer(frames, np.uint8, count, offset).reshape(job.shape)
                jobs.decode(job, out)
                answer = None
        except BadVideo as error:
            answer = error
        except MemoryError:
            answer = BadVideo("memory", f"more than {memory_bytes >> 20} MB")
        except Exception as error:  # noqa: BLE001  a codec library raises its own; the video is to blame
            answer = BadVideo("corrupt", f"{type(error).__name__}: {error}"[:500])
        write_message(answers_fd, (number, answer, jobs.files_opened))


if __name__ == "__main__":
    jobs_fd, answers_fd, frames_fd, memory_bytes = (int(value) for value in sys.argv[1:5])
    main(jobs_fd, answers_fd, frames_fd, memory_bytes, sys.argv[5])
