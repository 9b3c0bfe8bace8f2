"""Greedy batching: nobody waits for company, and company comes by itself under load."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Sequence

import numpy as np
import pytest

from defi_platform.serve.batching import GreedyBatcher
from defi_platform.serve.observation import Answer, Observation


def numbered(number: int) -> Observation:
    return Observation(np.zeros((1, 2, 2, 3), np.uint8), state=None, prompt="", seed=number)


class Doubling:
    """A policy that doubles seeds and remembers the batches; can be held, and refuses negative seeds."""

    def __init__(self, held: bool = False) -> None:
        self.batches: list[list[int]] = []
        self.go = threading.Event()
        if not held:
            self.go.set()

    def __call__(self, observations: list[Observation]) -> Sequence[np.ndarray]:
        items = [observation.seed for observation in observations]
        self.batches.append(items)
        assert self.go.wait(10)
        if min(items) < 0:
            raise ValueError(f"negative: {min(items)}")
        return [np.array([[2 * item]], np.float32) for item in items]


def test_a_lone_item_starts_at_once() -> None:
    batcher = GreedyBatcher(Doubling(), max_batch_size=8)

    async def one() -> tuple[float, Answer]:
        started = time.perf_counter()
        answer = await batcher.submit(numbered(21))
        return time.perf_counter() - started, answer

    async def several() -> list[tuple[float, Answer]]:
        await batcher.submit(numbered(1))  # starts the thread
        return [await one() for _ in range(5)]

    answers = asyncio.run(several())
    assert all((answer.actions.item(), answer.batch_size) == (42, 1) for _, answer in answers)
    # The quickest: a busy machine may keep one from its core for long, a batcher that waits keeps them all.
    assert min(seconds for seconds, _ in answers) < 0.1
    assert min(answer.queue_ms for _, answer in answers) < 50


def test_what_queues_while_a_forward_runs_is_the_next_batch() -> None:
    run = Doubling(held=True)
    batcher = GreedyBatcher(run, max_batch_size=4)

    async def many() -> list[Answer]:
        first = asyncio.create_task(batcher.submit(numbered(0)))
        while not run.batches:
            await asyncio.sleep(0.001)
        rest = [asyncio.create_task(batcher.submit(numbered(n))) for n in range(1, 8)]
        await asyncio.sleep(0.01)
        run.go.set()
        return [await task for task in [first, *rest]]

    answers = asyncio.run(many())
    assert run.batches == [[0], [1, 2, 3, 4], [5, 6, 7]]
    assert [a.actions.item() for a in answers] == [2 * n for n in range(8)]
    assert [a.batch_size for a in answers] == [1, 4, 4, 4, 4, 3, 3, 3]


def test_an_item_that_fails_does_not_fail_its_batch() -> None:
    run = Doubling(held=True)
    batcher = GreedyBatcher(run, max_batch_size=4)

    async def many() -> list[Answer | BaseException]:
        tasks = [asyncio.create_task(batcher.submit(numbered(n))) for n in (1, -2, 3)]
        await asyncio.sleep(0)
        run.go.set()
        return await asyncio.gather(*tasks, return_exceptions=True)

    good, bad, also_good = asyncio.run(many())
    assert isinstance(good, Answer) and isinstance(also_good, Answer) and also_good.actions.item() == 6
    assert isinstance(bad, ValueError) and str(bad) == "negative: -2"


def test_an_item_whose_client_has_gone_is_not_computed() -> None:
    run = Doubling(held=True)
    batcher = GreedyBatcher(run, max_batch_size=1)

    async def leave() -> None:
        first = asyncio.create_task(batcher.submit(numbered(1)))
        gone = asyncio.create_task(batcher.submit(numbered(2)))
        last = asyncio.create_task(batcher.submit(numbered(3)))
        await asyncio.sleep(0.01)
        gone.cancel()
        run.go.set()
        await asyncio.gather(first, last)

    asyncio.run(leave())
    assert run.batches == [[1], [3]]


def test_a_function_that_loses_results_is_an_error_and_not_a_hang() -> None:
    batcher = GreedyBatcher(lambda items: [], max_batch_size=4)
    with pytest.raises(RuntimeError, match="0 results for 1 items"):
        asyncio.run(batcher.submit(numbered(1)))
