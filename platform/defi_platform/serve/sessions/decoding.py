"""Decoding of messages: small ones at once, large ones in threads so that no other socket waits.

A hop to a thread and back costs some 0.1 ms of CPU, more than a small image takes; a large one would hold up the loop.
"""

from __future__ import annotations

import asyncio
import functools
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, TypeVar

import numpy as np

from defi_platform.serve.observation_keys import find

UNPACK_AT_ONCE: Final = 4 * 2**20
"""Bytes of a message that is unpacked at once: one copy of its bytes."""
RESIZE_AT_ONCE: Final = 256 * 2**10
"""Bytes of raw images that are resized at once."""

Result = TypeVar("Result")


@functools.cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max(1, min(4, os.cpu_count() or 1)), thread_name_prefix="decode")


async def in_thread(work: Callable[[], Result]) -> Result:
    """The result of some work, done in one of a few threads."""
    return await asyncio.get_running_loop().run_in_executor(_threads(), work)


async def unpacked(unpack: Callable[[bytes], Result], data: bytes) -> Result:
    """An unpacked message.

    Args:
        unpack: of the protocol.
        data: the message.
    """
    return unpack(data) if len(data) <= UNPACK_AT_ONCE else await in_thread(lambda: unpack(data))


def is_work(message: Mapping[Any, Any], images: Sequence[str]) -> bool:
    """Whether the images of a message take long enough to be read in a thread: encoded, or large.

    Args:
        message: from a client.
        images: keys of its images.
    """
    size = 0
    for key in images:
        image = find(message, key)
        if isinstance(image, bytes) or (isinstance(image, np.ndarray) and image.ndim == 1):
            return True
        if isinstance(image, np.ndarray):
            size += image.nbytes
    return size > RESIZE_AT_ONCE
