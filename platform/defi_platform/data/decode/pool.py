"""Decoder processes that can be killed: time limit, memory limit, crash containment, recycling.

A video that hangs, aborts or eats memory takes its own process down and nothing else; the pool answers with
a `BadVideo` and starts a fresh process. Frames are copied between processes once, as uint8 in shared memory.
"""

from __future__ import annotations

import mmap
import os
import selectors
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from defi_platform.config import DecodeConfig
from defi_platform.data.decode import worker_process
from defi_platform.data.decode.messages import (
    DecodeJob,
    EpisodeSignals,
    ListingJob,
    Probe,
    ProbeJob,
    ProbeProgress,
    SignalsJob,
    read_message,
    write_message,
)
from defi_platform.data.decode.worker_jobs import JobHandler
from defi_platform.data.rejection import BadVideo

if TYPE_CHECKING:
    from defi_platform.data.sources.listing_steps import ListingPage

Job = DecodeJob | ProbeJob | SignalsJob | ListingJob
Answer: TypeAlias = "np.ndarray | Probe | EpisodeSignals | ListingPage | BadVideo"

POLL_S = 0.25
"""Seconds between two looks of a waiting pool at the clock and at the memory of its processes."""

START_S = 60.0
"""Extra time for the first job of a process, which includes its start on a busy machine."""

SECONDS_PER_TIMEOUT = 60.0
"""Every so many seconds of video that a container declares grant its probe another `timeout_s`."""

LONGEST_S = 24 * 3600.0
"""Length up to which a container is believed."""


@dataclass
class _Running:
    number: int
    job: Job
    retried: bool


class _Process:
    """One decoder process and the shared memory its frames arrive in."""

    def __init__(self, memory_mb: int, frame_bytes: int, job_handler: type[JobHandler]) -> None:
        self.frame_bytes = frame_bytes
        frames_fd = os.memfd_create("decoded-frames")
        os.ftruncate(frames_fd, frame_bytes)
        self.frames = mmap.mmap(frames_fd, frame_bytes)
        jobs_out, self.jobs = os.pipe()
        self.answers, answers_in = os.pipe()
        owner_out, self.owner = os.pipe()
        fds = (jobs_out, answers_in, frames_fd, owner_out)
        # stdout and stderr are closed to codec chatter.
        self._process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                worker_process.__name__,
                *(str(fd) for fd in fds),
                str(memory_mb << 20),
            ],
            pass_fds=fds,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=_environment(),
        )
        # Before the pipe's other end is closed here: a process that has died by now is found by the first job.
        write_message(self.jobs, job_handler)
        for fd in fds:
            os.close(fd)
        self.memory_limit = memory_mb << 20
        self.running: _Running | None = None
        self.deadline = 0.0
        """When an answer, or word that a probe goes on, is overdue."""
        self.latest = 0.0
        """When the answer is overdue, whatever goes on."""
        self.files_opened = 0
        self.started = False

    def send(self, running: _Running, timeout_s: float) -> None:
        self.running = running
        self.deadline = self.latest = time.monotonic() + timeout_s + (0.0 if self.started else START_S)
        self.since, self.declared_s = self.deadline, 0.0
        write_message(self.jobs, (running.number, running.job, 0))

    def goes_on(self, declared_s: float, timeout_s: float) -> None:
        """Grants a probe the time that the length of its video asks for, as long as it goes on."""
        self.declared_s = max(self.declared_s, min(declared_s, LONGEST_S))
        self.latest = self.since + timeout_s * self.declared_s / SECONDS_PER_TIMEOUT
        self.deadline = min(time.monotonic() + timeout_s, self.latest)

    def rss_bytes(self) -> int:
        try:
            with open(f"/proc/{self._process.pid}/statm", encoding="ascii") as file:
                return int(file.read().split()[1]) * mmap.PAGESIZE
        except (FileNotFoundError, ProcessLookupError):
            return 0

    def end(self) -> str:
        """Kills the process, whatever it does, and says how it ended if it had ended by itself."""
        code = self._process.poll()
        if code is None:
            self._process.kill()
            self._process.wait()
        os.close(self.jobs)
        os.close(self.answers)
        os.close(self.owner)
        self.frames.close()
        if code is None:
            return "killed"
        return f"signal {-code}" if code < 0 else f"exit code {code}"


class DecoderPool:
    """Runs jobs in processes that it starts and ends.

    Args:
        limits: number of processes, time and memory limits, recycling.
        job_handler: class whose instances, one per process, answer the jobs; importable there by its name.
    """

    def __init__(self, limits: DecodeConfig, job_handler: type[JobHandler] = JobHandler) -> None:
        self._limits = limits
        self._job_handler = job_handler
        self._processes: list[_Process] = []
        self._selector = selectors.DefaultSelector()

    def __enter__(self) -> DecoderPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends every process."""
        for process in list(self._processes):
            self._drop(process)
        self._selector.close()

    def start(self) -> None:
        """Starts the processes ahead of the first job."""
        while len(self._processes) < self._limits.processes:
            self._new_process(1 << 20)

    def run(self, jobs: Iterable[Job], out: list[np.ndarray] | None = None) -> Iterator[Answer]:
        """Yields one answer per job, in order: what the job asks for (frames (T, H, W, 3) uint8), or a `BadVideo`.

        Args:
            jobs: taken from as processes become free.
            out: arrays to copy the frames of job i into; fresh ones without it.
        """
        waiting: deque[_Running] = deque()
        answers: dict[int, Answer] = {}
        source = enumerate(jobs)
        exhausted = False
        wanted = 0
        # Answers wait for their turn, so the distance between the first and the last job under way is bounded.
        window = 4 * self._limits.processes
        try:
            while True:
                while not exhausted and len(waiting) < self._limits.processes:
                    item = next(source, None)
                    if item is None:
                        exhausted = True
                    else:
                        waiting.append(_Running(item[0], item[1], retried=False))
                self._feed(waiting, wanted + window)
                if wanted in answers:
                    yield answers.pop(wanted)
                    wanted += 1
                    continue
                if exhausted and not waiting and not any(p.running for p in self._processes):
                    return
                self._collect(answers, waiting, out)
        finally:
            # The caller may stop early: a process that still works on a job would answer the next run.
            for process in [p for p in self._processes if p.running]:
                self._drop(process)

    # ----------------------------------------------------------------------- inside

    def _new_process(self, frame_bytes: int) -> _Process:
        process = _Process(self._limits.memory_mb, frame_bytes, self._job_handler)
        self._processes.append(process)
        self._selector.register(process.answers, selectors.EVENT_READ, process)
        return process

    def _drop(self, process: _Process) -> str:
        self._selector.unregister(process.answers)
        self._processes.remove(process)
        return process.end()

    def _feed(self, waiting: deque[_Running], before: int) -> None:
        while waiting and waiting[0].number < before:
            need = _frame_bytes(waiting[0].job)
            idle = next((p for p in self._processes if p.running is None), None)
            if idle is not None and idle.frame_bytes < need:
                self._drop(idle)
                idle = None
            if idle is None:
                if len(self._processes) >= self._limits.processes:
                    return
                idle = self._new_process(max(need, 1 << 20))
            try:
                idle.send(waiting[0], self._limits.timeout_s)
            except BrokenPipeError:
                # It died between two jobs, which is not this job's fault.
                self._drop(idle)
                continue
            waiting.popleft()

    def _collect(
        self, answers: dict[int, Answer], waiting: deque[_Running], out: list[np.ndarray] | None
    ) -> None:
        for key, _ in self._selector.select(POLL_S):
            process: _Process = key.data
            message = read_message(process.answers)
            running = process.running
            if message is None:
                how = self._drop(process)
                if running is not None:
                    self._ended(running, how, answers, waiting)
                continue
            assert running is not None
            number, answer, files_opened = message
            if isinstance(answer, ProbeProgress):
                process.goes_on(answer.declared_s, self._limits.timeout_s)
                continue
            used, process.files_opened = process.files_opened > 0, files_opened
            process.running, process.started = None, True
            if isinstance(answer, BadVideo) and answer.reason == "memory":
                self._drop(process)
                self._out_of_memory(running, used, answer, answers, waiting)
                continue
            if answer is None:
                answer = _copied(process, running.job, None if out is None else out[number])
            answers[number] = answer
            if process.files_opened >= self._limits.recycle_after:
                self._drop(process)
        self._watch(answers, waiting)

    def _ended(
        self, running: _Running, how: str, answers: dict[int, Answer], waiting: deque[_Running]
    ) -> None:
        if running.retried:
            answers[running.number] = BadVideo("crash", f"its decoder process ended twice, last by {how}")
        else:
            # Once may be the machine (an out-of-memory killer, an operator); twice is the video.
            waiting.appendleft(_Running(running.number, running.job, retried=True))

    def _out_of_memory(
        self,
        running: _Running,
        used: bool,
        problem: BadVideo,
        answers: dict[int, Answer],
        waiting: deque[_Running],
    ) -> None:
        if used and not running.retried:
            # What earlier files left behind may have filled the process; a fresh one shows whether it did.
            waiting.appendleft(_Running(running.number, running.job, retried=True))
        else:
            answers[running.number] = problem

    def _watch(self, answers: dict[int, Answer], waiting: deque[_Running]) -> None:
        now = time.monotonic()
        for process in [p for p in self._processes if p.running]:
            running = process.running
            assert running is not None
            if now > process.deadline:
                self._drop(process)
                length = f", for a video of {process.declared_s:.0f} s" if process.declared_s else ""
                answers[running.number] = BadVideo(
                    "timeout", f"no answer within decode.timeout_s={self._limits.timeout_s:g}{length}"
                )
            elif process.rss_bytes() > process.memory_limit:
                self._drop(process)
                problem = BadVideo("memory", f"more than decode.memory_mb={self._limits.memory_mb} resident")
                self._out_of_memory(running, process.files_opened > 0, problem, answers, waiting)


def _frame_bytes(job: Job) -> int:
    return int(np.prod(job.shape)) if isinstance(job, DecodeJob) else 0


def _copied(process: _Process, job: Job, target: np.ndarray | None) -> np.ndarray:
    assert isinstance(job, DecodeJob)
    view = np.frombuffer(process.frames, np.uint8, _frame_bytes(job)).reshape(job.shape)
    if target is None:
        target = np.empty(job.shape, np.uint8)
    np.copyto(target, view)
    del view
    return target


def _environment() -> dict[str, Any]:
    inherited = dict(os.environ)
    # Thread pools of numeric libraries would reserve address space that the limit then lacks.
    inherited |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"}
    inherited["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    return inherited
