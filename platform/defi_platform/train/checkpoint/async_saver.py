"""Writing checkpoints: to local disk within the step, from there to the run folder behind the steps that follow."""

from __future__ import annotations

import concurrent.futures
import errno
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from defi_platform import storage
from defi_platform.retry import patiently
from defi_platform.storage.scratch import scratch_folder
from defi_platform.train.checkpoint import format as checkpoints
from defi_platform.train.checkpoint.format import Position
from defi_platform.train.engine.collectives import Ranks
from defi_platform.train.engine.deepspeed_engine import Piece

Result = TypeVar("Result")

MOST_WAITING = 2
"""Checkpoints on local disk that are not yet in the run folder. With so many the next one waits for the first of them."""
LONGEST_WAIT_S = 5.0
"""Age of a checkpoint on local disk from which on its store is slow or away, and training does not wait for it."""


class CheckpointSaver:
    """One rank's side of a run's checkpoints.

    A thread of its own and not Ray Train's asynchronous report: there a failed upload ends the workers, while here
    it is tried again for as long as the run is told to wait.

    Args:
        name: of the run, for messages.
        run: run folder.
        patience_s: how long a store that does not answer, or a full disk, is waited for.
    """

    def __init__(
        self, name: str, run: str, ranks: Ranks, *, keep: int, keep_best: bool, patience_s: float
    ) -> None:
        self._name, self._run, self._ranks = name, run, ranks
        self._keep, self._keep_best, self._patience_s = keep, keep_best, patience_s
        self._attempt = ranks.from_first(checkpoints.new_attempt())
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoints")
        self._waiting: list[tuple[float, Future[None]]] = []
        """When each was taken, oldest first."""
        self._missed = False
        self.committed_step: int | None = None
        """Of the newest checkpoint that this rank has brought to the run folder."""
        self.spared_step: int | None = None
        """Of a checkpoint that somebody is reading; set on rank 0."""

    def save(
        self, pieces: Iterable[Piece], buffers: dict[str, Tensor], position: Position, *, needed: bool = False
    ) -> None:
        """Takes the state as it is now; it reaches the run folder later.

        Args:
            needed: the run cannot go on or end without this one. Any other is left out when the local disk is full.
        Raises: StorageError when this or an earlier one could not be written in time.
        """
        while len(self._waiting) >= MOST_WAITING:
            self._oldest().result()
        self._check()
        held = list(pieces)

        def write() -> Path:
            folder = scratch_folder("shard")
            try:
                return checkpoints.write_shard(
                    folder, self._ranks.rank, self._ranks.world_size, held, buffers
                )
            except BaseException:
                shutil.rmtree(folder, ignore_errors=True)
                raise

        disk = f"local disk ({tempfile.gettempdir()})"
        try:
            shard = write() if not needed else self._patiently(write, disk)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            print(
                f"{self._name}: no room on {disk} for the checkpoint of step {position.step}; training goes on "
                "to the next one",
                flush=True,
            )
            self._missed = True
            return
        self._waiting.append((time.monotonic(), self._thread.submit(self._commit, shard, position)))

    def missed(self) -> bool:
        """Whether a checkpoint was left out for want of room on this rank's disk; told once."""
        told, self._missed = self._missed, False
        return told

    def _check(self) -> None:
        """Raises what has gone wrong behind the steps."""
        while self._waiting and self._waiting[0][1].done():
            self._oldest().result()

    def full(self) -> bool:
        """Whether one more checkpoint would have to wait for an earlier one; asked after every step.

        Raises: StorageError when an earlier one could not be written in time.
        """
        self._check()
        return len(self._waiting) >= MOST_WAITING

    def makes_room(self) -> bool:
        """Waits a little for earlier checkpoints. Returns: whether no rank would have to wait for them any longer
        (collective)."""
        if self.full():
            taken, oldest = self._waiting[0]
            concurrent.futures.wait([oldest], max(0.0, taken + LONGEST_WAIT_S - time.monotonic()))
        return not self._ranks.sum(torch.tensor(float(self.full())))

    def wait(self) -> None:
        """Returns when all checkpoints of all ranks are in the run folder (collective)."""
        while self._waiting:
            self._oldest().result()
        self._ranks.barrier()
        if self._ranks.first:
            self._prune()

    def _oldest(self) -> Future[None]:
        """Takes it off the list."""
        return self._waiting.pop(0)[1]

    def _commit(self, shard: Path, position: Position) -> None:
        target = storage.join(
            self._run, checkpoints.FOLDER, checkpoints.folder_name(position.step, self._attempt)
        )
        try:
            self._patiently(lambda: checkpoints.commit_shard(shard, target, position), target)
        finally:
            shutil.rmtree(shard.parent, ignore_errors=True)
        self.committed_step = position.step
        if self._ranks.first:
            self._prune()

    def _prune(self) -> None:
        self._patiently(
            lambda: checkpoints.prune(
                self._run,
                self._keep,
                unfinished=False,
                keep_best=self._keep_best,
                spared=self.spared_step,
            ),
            storage.join(self._run, checkpoints.FOLDER),
        )

    def _patiently(self, write: Callable[[], Result], place: str) -> Result:
        return patiently(
            write, place, name=self._name, patience_s=self._patience_s, after_failure=self._make_room
        )

    def _make_room(self, error: Exception) -> None:
        """A full disk may be full of checkpoints: all but the newest can be done without."""
        full = self._ranks.first and getattr(error, "errno", None) == errno.ENOSPC
        if full and not storage.is_remote(self._run):
            checkpoints.prune(self._run, 1, unfinished=False)
