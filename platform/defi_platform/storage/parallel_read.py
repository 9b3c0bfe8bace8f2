"""Many remote reads at once, their answers in order: each one only waits, and a listing may need a million."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

READERS = 16

Item = TypeVar("Item")
Answer = TypeVar("Answer")


def side_by_side(
    read: Callable[[Item], Answer], items: Iterable[Item], remote: bool
) -> Iterator[tuple[Item, Answer]]:
    """Yields (item, read(item)) for each item, in order; one by one where the files are local.

    Args:
        read: called in several threads at once where the files are remote.
        items: taken from a little ahead of the caller.
        remote: whether reading waits for a network.

    Raises: what `read` raises, at its item.
    """
    if not remote:
        for item in items:
            yield item, read(item)
        return
    pool = ThreadPoolExecutor(READERS, thread_name_prefix="side-by-side")
    try:
        source = iter(items)
        ahead = deque((item, pool.submit(read, item)) for item in itertools.islice(source, 2 * READERS))
        while ahead:
            item, answer = ahead.popleft()
            yield item, answer.result()
            ahead.extend((more, pool.submit(read, more)) for more in itertools.islice(source, 1))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
