"""Many remote reads at once, their answers in order: each one only waits, and a listing may need a million."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

READERS = 16

Item = TypeVar("Item")
Answer = TypeVar("Answer")


def side_by_side(
    read: Callable[[Item], Answer],
    items: Iterable[Item],
    remote: bool,
    size: Callable[[Item], int] = lambda _: 0,
    most: float = math.inf,
) -> Iterator[tuple[Item, Answer]]:
    """Yields (item, read(item)) for each item, in order; one by one where the files are local.

    Args:
        read: called in several threads at once where the files are remote.
        items: taken from a little ahead of the caller.
        remote: whether reading waits for a network.
        size: bytes of an item's answer.
        most: bytes of all answers that are being read or wait for the caller, the one that it has among them; a larger
            one is read alone.

    Raises: what `read` raises, at its item.
    """
    if not remote:
        for item in items:
            yield item, read(item)
        return
    pool = ThreadPoolExecutor(READERS, thread_name_prefix="side-by-side")
    try:
        ahead: deque[tuple[Item, Future[Answer]]] = deque()
        held = 0
        for item in items:
            while ahead and (len(ahead) == 2 * READERS or held + size(item) > most):
                yield _first(ahead)
                held -= size(ahead.popleft()[0])
            ahead.append((item, pool.submit(read, item)))
            held += size(item)
        while ahead:
            yield _first(ahead)
            ahead.popleft()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _first(ahead: deque[tuple[Item, Future[Answer]]]) -> tuple[Item, Answer]:
    item, answer = ahead[0]
    return item, answer.result()
