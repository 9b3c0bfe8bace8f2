"""Process groups without Ray."""

from __future__ import annotations

import multiprocessing
import os
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path

import torch.distributed as distributed

from defi_platform.train.engine.deepspeed_engine import prepare_process


class Ranks:
    """Processes that stay, because starting them takes longer than what tests have them do.

    Args:
        folder: empty one, for the files by which they find each other.
        count: how many.
    """

    def __init__(self, folder: Path, count: int = 2):
        self._folder, self._count, self._started = folder, count, 0
        self._processes: list[multiprocessing.process.BaseProcess] = []
        self._pipes: list[Connection] = []

    def run(self, work: Callable[[], None]) -> None:
        """Calls `work`, which can be pickled, on all at once.

        Raises: AssertionError with the traceback of a rank that raises, or for one that died; all are given up then,
            and the next call starts others.
        """
        if not self._processes:
            self._start()
        for pipe in self._pipes:
            pipe.send(work)
        waiting = list(self._pipes)
        while waiting:
            for pipe in wait(waiting):
                assert isinstance(pipe, Connection)
                waiting.remove(pipe)
                try:
                    error = pipe.recv()
                except EOFError:
                    error = "a rank died"
                if error:
                    self.close()
                    raise AssertionError(error)

    def close(self) -> None:
        """Ends them."""
        for process in self._processes:
            process.kill()
            process.join()
        self._processes, self._pipes = [], []

    def _start(self) -> None:
        self._started += 1
        store = self._folder / f"store_{self._started}"
        # They are forked from a process that has imported what takes seconds, once.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["defi_platform.train.worker.entry"])
        for rank in range(self._count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, self._count, theirs, store), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)


def _serve(rank: int, count: int, pipe: Connection, store: Path) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_RANK": str(rank)}
    prepare_process(use_gpu=False, threads=1)
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=count)
    while True:
        try:
            pipe.recv()()
            pipe.send("")
        except EOFError:
            # Not sys.exit: gloo's threads live on, and one that lets go of a tensor while Python shuts down aborts the
            # process (pytorch/pytorch#38228).
            os._exit(0)
        except BaseException:  # noqa: BLE001 - handed to the test
            pipe.send(traceback.format_exc())
