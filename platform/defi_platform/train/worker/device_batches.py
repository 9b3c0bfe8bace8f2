"""Batches on the device, the next one copied while the present one is computed."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from defi_platform.train.validation.loss import to_device

Batch = dict[str, Any]


class DeviceBatches(Iterator[Batch]):
    """An iterator over batches on a device, in their order; one is prepared ahead by a thread of its own.

    On a CPU there is nothing to copy, so there is no thread, and batches are read when they are asked for.

    Args:
        batches: on the host, such as a recipe's stream; only one thread reads them.
        device: of the model.
        copy: batch -> (the batch on the device, what to do before it is used); None: by the device.
    """

    def __init__(
        self,
        batches: Iterable[Batch],
        device: torch.device,
        copy: Callable[[Batch], tuple[Batch, Callable[[], None]]] | None = None,
    ):
        self._batches = iter(batches)
        self._copy = copy or (_side_stream_copy(device) if device.type == "cuda" else None)
        # One place: with the batch that is computed and the one that is being copied, three are in memory.
        self._ready: queue.Queue[Any] = queue.Queue(maxsize=1)
        self._closed = threading.Event()
        self._ended = False
        if self._copy:
            threading.Thread(target=self._fill, name="device-batches", daemon=True).start()

    def __next__(self) -> Batch:
        """The next batch. Raises: what reading or copying it raised; StopIteration after the last."""
        if not self._copy:
            return next(self._batches)
        if self._ended:
            raise StopIteration
        batch, before_use, error = self._ready.get()
        if error is not None:
            self._ended = True
            raise error
        before_use()
        found: Batch = batch
        return found

    def close(self) -> None:
        """Ends the thread after the batch that it is at."""
        self._closed.set()

    def _fill(self) -> None:
        assert self._copy
        try:
            for batch in self._batches:
                if not self._put((*self._copy(batch), None)):
                    return
            self._put((None, None, StopIteration()))
        except BaseException as error:  # noqa: BLE001 - raised again in the loop's thread
            self._put((None, None, error))

    def _put(self, item: Any) -> bool:
        """Returns: False when nobody wants it any more."""
        while not self._closed.is_set():
            try:
                self._ready.put(item, timeout=0.5)
                return True
            except queue.Full:
                continue
        return False


def _side_stream_copy(device: torch.device) -> Callable[[Batch], tuple[Batch, Callable[[], None]]]:
    """Copies from page-locked memory on a stream of its own, so that the host waits for nothing."""
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def copy(batch: Batch) -> tuple[Batch, Callable[[], None]]:
        pinned = {k: v.pin_memory() if isinstance(v, Tensor) else v for k, v in batch.items()}
        with torch.cuda.stream(stream):
            moved = to_device(pinned, device)
            copied = stream.record_event()

        def before_use() -> None:
            current = torch.cuda.current_stream(device)
            current.wait_event(copied)
            for value in moved.values():
                if isinstance(value, Tensor) and value.is_cuda:
                    value.record_stream(current)  # else its memory would be used again while it is read

        return moved, before_use

    return copy
