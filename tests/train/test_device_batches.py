"""Batches that are copied to the device ahead of their use: order, errors and the end, with a copy that needs no GPU."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from defi_platform.train.engine.seeds import sample_generators
from defi_platform.train.validation.loss import to_device
from defi_platform.train.worker.device_batches import Batch, DeviceBatches

CPU = torch.device("cpu")


class Copies:
    """A copy that notes what was copied, and what was used after it was waited for."""

    def __init__(self) -> None:
        self.copied: list[int] = []
        self.waited_for: list[int] = []

    def __call__(self, batch: Batch) -> tuple[Batch, Callable[[], None]]:
        self.copied.append(batch["k"])
        return {"k": batch["k"], "there": True}, lambda: self.waited_for.append(batch["k"])


def numbered(count: int) -> Iterator[dict[str, Any]]:
    yield from ({"k": k} for k in range(count))


def eventually(holds: Callable[[], bool]) -> bool:
    end = time.monotonic() + 60
    while not holds() and time.monotonic() < end:
        time.sleep(0.01)
    return holds()


def test_batches_keep_their_order_and_are_copied_ahead_but_not_without_end() -> None:
    copies = Copies()
    batches = DeviceBatches(numbered(10), CPU, copies)
    assert eventually(lambda: copies.copied == [0, 1]), "one is ready, one waits for its place"
    assert next(batches) == {"k": 0, "there": True}
    assert copies.waited_for == [0]
    assert eventually(lambda: copies.copied == [0, 1, 2])
    assert [batch["k"] for batch in batches] == list(range(1, 10))
    assert copies.waited_for == list(range(10))
    assert next(batches, None) is None, "the end stays the end"


def test_an_error_of_the_stream_comes_after_the_batches_before_it() -> None:
    def broken() -> Iterator[Batch]:
        yield {"k": 0}
        raise ValueError("video 7 is damaged")

    batches = DeviceBatches(broken(), CPU, Copies())
    assert next(batches)["k"] == 0
    with pytest.raises(ValueError, match="video 7 is damaged"):
        next(batches)


def test_a_run_that_stops_early_leaves_no_thread_behind() -> None:
    batches = DeviceBatches(numbered(10**9), CPU, Copies())
    next(batches)
    batches.close()
    assert eventually(lambda: not any(one.name == "device-batches" for one in threading.enumerate()))


def test_on_a_cpu_batches_are_read_when_they_are_asked_for() -> None:
    read = []

    def stream() -> Iterator[Batch]:
        for k in range(3):
            read.append(k)
            yield {"k": k}

    before = set(threading.enumerate())
    batches = DeviceBatches(stream(), CPU)
    assert next(batches) == {"k": 0} and read == [0]
    assert not any(one.name == "device-batches" for one in {*threading.enumerate()} - before)


def test_numbers_of_samples_and_texts_stay_with_the_host() -> None:
    moved = to_device(
        {"frames": torch.zeros(2), "sample": torch.tensor([3, 4]), "text": ["a"]}, torch.device("meta")
    )
    assert moved["frames"].is_meta and moved["sample"].tolist() == [3, 4] and moved["text"] == ["a"]


def test_generators_of_samples_are_the_same_whichever_others_there_are() -> None:
    one, two = sample_generators(0, "noise", [5, 9], CPU), sample_generators(0, "noise", [9])
    assert torch.equal(torch.randn(3, generator=one[1]), torch.randn(3, generator=two[0]))
