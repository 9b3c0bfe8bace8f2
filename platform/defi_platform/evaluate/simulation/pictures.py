"""Memory that a simulator's process shares with its owner: a counter of progress, and slots of pictures."""

from __future__ import annotations

import mmap
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from defi_platform.evaluate.benchmarks.interface import View

_FIRST = 64
"""Offset of the first slot; the counter is before it."""
_SLOTS_BYTES = 32 << 20
"""Of all slots together; the system gives memory as it is written to."""


class SharedPictures:
    """Slots for one picture of every camera of a view each, and the number of steps and pictures made so far."""

    def __init__(self, memory: int, view: View):
        """Maps the memory.

        Args:
            memory: file descriptor; its file is made as long as is needed.
            view: cameras and sizes, the same on both sides.
        """
        self._shapes = {camera: (*view.size(camera), 3) for camera in view.cameras}
        self._slot_bytes = sum(int(np.prod(shape)) for shape in self._shapes.values())
        self.slots = max(1, _SLOTS_BYTES // self._slot_bytes)
        """Their number."""
        self._map = mmap.mmap(memory, _FIRST + self.slots * self._slot_bytes)
        self._progress: NDArray[np.uint64] = np.frombuffer(self._map, np.uint64, 1)

    @staticmethod
    def length(view: View) -> int:
        """Bytes of memory that a view needs."""
        slot = sum(int(np.prod(view.size(camera))) * 3 for camera in view.cameras)
        return _FIRST + max(1, _SLOTS_BYTES // slot) * slot

    @property
    def progress(self) -> int:
        """Steps and pictures made so far."""
        return int(self._progress[0])

    def advance(self) -> None:
        """Counts one step or picture."""
        self._progress[0] += 1

    def put(self, slot: int, pictures: Mapping[str, NDArray[np.uint8]]) -> None:
        """Copies pictures by camera into a slot.

        Raises:
            ValueError: a picture is absent or of another size or type than the view says.
        """
        for camera, place in self._places(slot).items():
            picture = pictures.get(camera)
            if (
                not isinstance(picture, np.ndarray)
                or picture.shape != place.shape
                or picture.dtype != np.uint8
            ):
                found = (
                    f"{picture.dtype} {picture.shape}"
                    if isinstance(picture, np.ndarray)
                    else f"{picture!r:.40}"
                )
                raise ValueError(f"camera {camera} gives {found} in the place of uint8 {place.shape}")
            place[:] = picture

    def get(self, slot: int) -> dict[str, NDArray[np.uint8]]:
        """Copies of the pictures in a slot."""
        return {camera: place.copy() for camera, place in self._places(slot).items()}

    def _places(self, slot: int) -> dict[str, NDArray[np.uint8]]:
        offset, found = _FIRST + slot * self._slot_bytes, {}
        for camera, shape in self._shapes.items():
            size = int(np.prod(shape))
            found[camera] = np.frombuffer(self._map, np.uint8, size, offset).reshape(shape)
            offset += size
        return found
