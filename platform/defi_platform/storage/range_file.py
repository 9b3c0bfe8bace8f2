"""Remote file that is read by range: what nobody reads is not downloaded."""

from __future__ import annotations

import io
import os
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, ClassVar

KEPT_BLOCKS = 8
"""Blocks held in memory: the index of a media file and its data lie far apart and are read in turn."""


class RangeFile(io.RawIOBase):
    """A seekable file over a function that fetches a range.

    Libraries that read through callbacks may take a failed read for the end of the file, or report it as damage.
    So every failure of the process is also kept in `failures`, which must be checked before content is called bad.

    Args:
        fetch: (start, stop) -> the bytes in between; raises when it cannot.
        size: bytes of the file.
        block_bytes: ranges start and end at multiples of this.
    """

    failures: ClassVar[list[Exception]] = []

    def __init__(self, fetch: Callable[[int, int], bytes], size: int, block_bytes: int) -> None:
        super().__init__()
        self._fetch = fetch
        self._size = size
        self._block_bytes = block_bytes
        self._blocks: OrderedDict[int, bytes] = OrderedDict()
        self._position = 0

    def readable(self) -> bool:
        """True."""
        return True

    def seekable(self) -> bool:
        """True."""
        return True

    def tell(self) -> int:
        """Returns the byte offset of the next read."""
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Moves the byte offset of the next read, without reading. Returns: the offset from the start."""
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        if start + offset < 0:
            raise OSError(f"seek to {start + offset}, before the start of the file")
        self._position = start + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Reads into a writable buffer. Returns: the number of bytes, 0 at the end. Raises: what `fetch` raises."""
        view = memoryview(buffer).cast("B")
        stop = min(self._position + len(view), self._size)
        count = max(0, stop - self._position)
        if count:
            view[:count] = self._read(self._position, stop)
            self._position = stop
        return count

    def _read(self, start: int, stop: int) -> bytes:
        size = self._block_bytes
        numbers = range(start // size, (stop - 1) // size + 1)
        absent = [number for number in numbers if number not in self._blocks]
        found = {number: self._blocks[number] for number in numbers if number in self._blocks}
        if absent:
            # One request from the first absent block to the last, even over some that are there.
            first, end = absent[0] * size, min((absent[-1] + 1) * size, self._size)
            content = self._fetched(first, end)
            for number in range(absent[0], absent[-1] + 1):
                found[number] = content[number * size - first : (number + 1) * size - first]
        for number in numbers:
            self._blocks[number] = found[number]
            self._blocks.move_to_end(number)
        while len(self._blocks) > KEPT_BLOCKS:
            self._blocks.popitem(last=False)
        joined = b"".join(found[number] for number in numbers)
        return joined[start - numbers[0] * size : stop - numbers[0] * size]

    def _fetched(self, start: int, stop: int) -> bytes:
        try:
            content = self._fetch(start, stop)
            if len(content) != stop - start:
                raise OSError(
                    f"the store gave {len(content)} bytes of the {stop - start} from {start} on; "
                    "the file may have been replaced"
                )
        except Exception as error:
            self.failures.append(error)
            raise
        return content
