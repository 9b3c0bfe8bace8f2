"""Greedy batching: the observations queued during one forward pass are the next batch."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from numpy.typing import NDArray

from defi_platform.serve.observation import Answer, Observation


@dataclass
class _Pending:
    observation: Observation
    answer: asyncio.Future[Answer]
    since: float = field(default_factory=time.perf_counter)


class GreedyBatcher:
    """Runs a policy over batches of whatever is queued, in one thread.

    A lone observation starts at once, and batches grow by themselves when observations come faster than they
    are answered. `serve.batch` does not do this (Ray 2.60): it either waits `batch_wait_timeout_s` for company
    or, at 0, cuts the queue into batches of one before the previous batch has finished.
    """

    def __init__(
        self, infer: Callable[[list[Observation]], Sequence[NDArray[Any]]], max_batch_size: int
    ) -> None:
        """Prepares a batcher; its thread starts with the first observation.

        Args:
            infer: maps n observations to n arrays of actions, in order; never called twice at a time.
            max_batch_size: observations per call of `infer`, at most.
        """
        self._infer = infer
        self._max_batch_size = max_batch_size
        self._queue: deque[_Pending] = deque()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="forward")
        self._worker: asyncio.Task[None] | None = None

    async def submit(self, observation: Observation) -> Answer:
        """Queues an observation and waits for its answer.

        Raises:
            Exception: whatever `infer` raises for this observation.
        """
        pending = _Pending(observation, asyncio.get_running_loop().create_future())
        self._queue.append(pending)
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._work())
        return await pending.answer

    async def _work(self) -> None:
        while self._queue:
            batch: list[_Pending] = []
            while self._queue and len(batch) < self._max_batch_size:
                pending = self._queue.popleft()
                if not pending.answer.done():  # its client may have gone
                    batch.append(pending)
            if batch:
                await self._answer(batch)

    async def _answer(self, batch: list[_Pending]) -> None:
        started = time.perf_counter()
        loop = asyncio.get_running_loop()
        try:
            results = await loop.run_in_executor(self._thread, self._infer, [p.observation for p in batch])
            if len(results) != len(batch):
                raise RuntimeError(f"the batched function gave {len(results)} results for {len(batch)} items")
        except Exception as error:  # noqa: BLE001 - whatever the model raises belongs to whoever sent the observation
            if len(batch) > 1:
                # One observation may have brought the others down: alone, only the culprit fails.
                for pending in batch:
                    await self._answer([pending])
            elif not batch[0].answer.done():
                batch[0].answer.set_exception(error)
            return
        infer_ms = (time.perf_counter() - started) * 1e3
        for pending, actions in zip(batch, results, strict=True):
            if not pending.answer.done():
                queue_ms = (started - pending.since) * 1e3
                pending.answer.set_result(Answer(actions, queue_ms, infer_ms, len(batch)))
