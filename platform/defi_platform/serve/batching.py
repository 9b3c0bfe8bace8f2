"""Greedy batching: what queued while the previous forward pass ran is the next batch."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Batched(Generic[Result]):
    """One item's result and what it cost."""

    result: Result
    queue_ms: float
    """From `submit` to the start of the item's forward pass."""
    infer_ms: float
    """The forward pass of the whole batch."""
    batch_size: int


@dataclass
class _Waiting(Generic[Item, Result]):
    item: Item
    done: asyncio.Future[Batched[Result]]
    since: float = field(default_factory=time.perf_counter)


class GreedyBatcher(Generic[Item, Result]):
    """Runs a function over batches of whatever is waiting, in one thread.

    A lone item starts at once, and batches grow by themselves when items come faster than they are answered.
    `serve.batch` does not do this (Ray 2.60): it either waits `batch_wait_timeout_s` for company or, at 0,
    cuts the queue into batches of one before the previous batch has finished.
    """

    def __init__(self, run: Callable[[list[Item]], Sequence[Result]], max_batch_size: int) -> None:
        """`run` maps n items to n results, in order; it is never called twice at a time."""
        self._run = run
        self._max_batch_size = max_batch_size
        self._queue: deque[_Waiting[Item, Result]] = deque()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="forward")
        self._worker: asyncio.Task[None] | None = None

    async def submit(self, item: Item) -> Batched[Result]:
        """Waits for the item's turn and result. Raises: what `run` raises for this item."""
        waiting: _Waiting[Item, Result] = _Waiting(item, asyncio.get_running_loop().create_future())
        self._queue.append(waiting)
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._work())
        return await waiting.done

    async def _work(self) -> None:
        while self._queue:
            batch: list[_Waiting[Item, Result]] = []
            while self._queue and len(batch) < self._max_batch_size:
                waiting = self._queue.popleft()
                if not waiting.done.done():  # its client may have gone
                    batch.append(waiting)
            if batch:
                await self._answer(batch)

    async def _answer(self, batch: list[_Waiting[Item, Result]]) -> None:
        started = time.perf_counter()
        loop = asyncio.get_running_loop()
        try:
            results = await loop.run_in_executor(self._thread, self._run, [w.item for w in batch])
            if len(results) != len(batch):
                raise RuntimeError(f"the batched function gave {len(results)} results for {len(batch)} items")
        except Exception as error:  # noqa: BLE001 - whatever the model raises belongs to whoever sent the item
            if len(batch) > 1:
                # One item may have brought the others down: alone, only the culprit fails.
                for waiting in batch:
                    await self._answer([waiting])
            elif not batch[0].done.done():
                batch[0].done.set_exception(error)
            return
        infer_ms = (time.perf_counter() - started) * 1e3
        for waiting, result in zip(batch, results, strict=True):
            if not waiting.done.done():
                queue_ms = (started - waiting.since) * 1e3
                waiting.done.set_result(Batched(result, queue_ms, infer_ms, len(batch)))
