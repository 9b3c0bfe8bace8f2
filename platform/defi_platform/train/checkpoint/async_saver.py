"""Asynchronous checkpoints: written to local disk within the step, uploaded to the run folder behind training."""

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
from defi_platform.storage.outage import retry_storage
from defi_platform.storage.scratch import scratch_folder
from defi_platform.train.checkpoint import format as checkpoints
from defi_platform.train.checkpoint.format import Position
from defi_platform.train.engine.collectives import Communicator
from defi_platform.train.engine.sharded_state import ParameterFragment
from defi_platform.train.run_folder import TIMEOUT_KEY

Result = TypeVar("Result")

MAX_PENDING = 2
"""Checkpoints on local disk that are not yet in the run folder. With so many the next one waits for the first of them."""
MAX_WAIT_S = 5.0
"""Age of a checkpoint on local disk above which its store counts as slow or away, and training does not wait for it."""


class CheckpointSaver:
    """One rank's side of a run's checkpoints.

    A thread and not Ray Train's asynchronous report: there a failed upload ends the workers, here it is retried for
    as long as the config allows.

    Args:
        name: of the run, for messages.
        run: run folder.
        communicator: of this rank.
        keep: number of the newest checkpoints that are kept.
        keep_best: keep the one with the lowest validation loss too.
        timeout_s: longest outage of the store, or time of a full disk, before the run fails.
        before_commit: called in the upload's thread before this rank's share of a checkpoint counts.
    """

    def __init__(
        self,
        name: str,
        run: str,
        communicator: Communicator,
        *,
        keep: int,
        keep_best: bool,
        timeout_s: float,
        before_commit: Callable[[], None] = lambda: None,
    ) -> None:
        self._name, self._run, self._communicator = name, run, communicator
        self._keep, self._keep_best, self._timeout_s = keep, keep_best, timeout_s
        self._before_commit = before_commit
        self._attempt = communicator.broadcast(checkpoints.new_attempt())
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoints")
        self._pending: list[tuple[float, Future[None]]] = []
        """When each was written to local disk, and its upload; oldest first."""
        self._skipped = False
        self.committed_step: int | None = None
        """Step of the newest checkpoint that this rank has uploaded."""
        self.pinned_step: int | None = None
        """Step of a checkpoint that is being read, which pruning keeps; set on rank 0."""

    def save(
        self,
        fragments: Iterable[ParameterFragment],
        buffers: dict[str, Tensor],
        position: Position,
        *,
        required: bool = False,
    ) -> None:
        """Writes the present state to local disk and starts its upload.

        Args:
            fragments: this rank's share of the training state.
            buffers: of the model; rank 0's.
            position: of the run.
            required: the run cannot end without this one. Any other is skipped when the local disk is full.

        Raises: StorageError when this or an earlier one could not be written in time.
        """
        while len(self._pending) >= MAX_PENDING:
            self._pop_oldest().result()
        self._raise_failures()
        state = list(fragments)

        def write() -> Path:
            folder = scratch_folder("shard")
            try:
                return checkpoints.write_shard(
                    folder, self._communicator.rank, self._communicator.world_size, state, buffers
                )
            except BaseException:
                shutil.rmtree(folder, ignore_errors=True)
                raise

        disk = f"local disk ({tempfile.gettempdir()})"
        try:
            shard = write() if not required else self._retry(write, disk)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            print(
                f"{self._name}: no room on {disk} for the checkpoint of step {position.step}; training goes on "
                "to the next one",
                flush=True,
            )
            self._skipped = True
            return
        self._pending.append((time.monotonic(), self._thread.submit(self._commit, shard, position)))

    def take_skipped(self) -> bool:
        """True once after a checkpoint was skipped because this rank's local disk was full."""
        skipped, self._skipped = self._skipped, False
        return skipped

    def is_full(self) -> bool:
        """True when another checkpoint would have to wait for an earlier one; asked after every step.

        Raises: StorageError when an earlier one could not be written in time.
        """
        self._raise_failures()
        return len(self._pending) >= MAX_PENDING

    def wait_for_capacity(self) -> bool:
        """Waits for an earlier checkpoint, until it is MAX_WAIT_S old (collective).

        Returns: True when no rank would have to wait any longer to write another one.
        """
        if self.is_full():
            written, oldest = self._pending[0]
            concurrent.futures.wait([oldest], max(0.0, written + MAX_WAIT_S - time.monotonic()))
        return not self._communicator.sum(torch.tensor(float(self.is_full())))

    def wait(self) -> None:
        """Returns when all checkpoints of all ranks are in the run folder (collective)."""
        while self._pending:
            self._pop_oldest().result()
        self._communicator.barrier()
        if self._communicator.is_rank_zero:
            self._prune()

    def finish_uploads(self, timeout_s: float) -> None:
        """Waits until no checkpoint of this rank is under way, or for so many seconds; for a rank that ends by an error."""
        concurrent.futures.wait([upload for _, upload in self._pending], timeout_s)

    def _raise_failures(self) -> None:
        """Raises the errors of uploads that have ended."""
        while self._pending and self._pending[0][1].done():
            self._pop_oldest().result()

    def _pop_oldest(self) -> Future[None]:
        return self._pending.pop(0)[1]

    def _commit(self, shard: Path, position: Position) -> None:
        target = storage.join(
            self._run, checkpoints.FOLDER, checkpoints.folder_name(position.step, self._attempt)
        )
        try:
            self._before_commit()
            self._retry(lambda: checkpoints.commit_shard(shard, target, position), target)
        finally:
            shutil.rmtree(shard.parent, ignore_errors=True)
        self.committed_step = position.step
        if self._communicator.is_rank_zero:
            self._prune()

    def _prune(self) -> None:
        self._retry(
            lambda: checkpoints.prune(
                self._run,
                self._keep,
                unfinished=False,
                keep_best=self._keep_best,
                pinned_step=self.pinned_step,
            ),
            storage.join(self._run, checkpoints.FOLDER),
        )

    def _retry(self, request: Callable[[], Result], path: str) -> Result:
        return retry_storage(
            request,
            path,
            name=self._name,
            timeout_s=self._timeout_s,
            timeout_key=TIMEOUT_KEY,
            before_retry=self._free_disk,
        )

    def _free_disk(self, error: Exception) -> None:
        """Deletes all checkpoints but the newest where the disk of the run folder is full."""
        full = self._communicator.is_rank_zero and getattr(error, "errno", None) == errno.ENOSPC
        if full and not storage.is_remote(self._run):
            checkpoints.prune(self._run, 1, unfinished=False)
