"""Sharding of sample numbers over ranks: arithmetic, so that stopping and world size can change at will."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from defi_platform.data.sampling.shuffle import key_of

FRACTION_OF_SQRT_2 = 0x6A09E667F3BCC908
"""In units of 2**-64. Multiples of it fill the numbers from 0 to 1 evenly, and repeat with no mixture's period."""

FEW_RANKS = 8
"""Up to so many, multiples of one number give every rank every mixture most evenly. Of more ranks some are in step with
some mixture (11 ranks with shares of 2, 1 and 1: one corpus is over by a sixth for ever), hence chance instead."""


@dataclass(frozen=True, kw_only=True)
class Shard:
    """The samples of one rank in a stretch of a plan.

    A step consumes the `global_batch` samples that follow those of the step before. Within it each rank takes one
    contiguous slice of `per_rank` samples, cut into `accumulation` micro-batches. Over all ranks every sample number
    appears exactly once. Which slice is whose changes from step to step: a mixture of corpora repeats itself, and a
    rank that always took the same slice could see some of its corpora alone. It is a function of the sample numbers,
    so a run that goes on from any step cuts as one that never stopped.

    Raises: ValueError when global_batch is not world_size * micro_batch * a whole number, or rank is not one.
    """

    start: int
    stop: int
    """Samples start .. stop - 1; a last step that is not full is cut the same way, so that some ranks may get less
    of it or nothing."""
    rank: int
    world_size: int
    global_batch: int
    """Samples of one step, over all ranks."""
    micro_batch: int
    """Samples that one rank computes at a time."""

    def __post_init__(self) -> None:
        if self.world_size < 1 or not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank {self.rank} is not one of a world of {self.world_size}")
        if (
            self.micro_batch < 1
            or self.global_batch < 1
            or self.global_batch % (self.world_size * self.micro_batch)
        ):
            raise ValueError(
                f"global_batch={self.global_batch} is not world_size={self.world_size} x "
                f"micro_batch={self.micro_batch} x a whole number"
            )

    @classmethod
    def single(cls, start: int, stop: int, batch: int) -> Shard:
        """The shard of a process alone.

        Args:
            start: first sample.
            stop: sample after the last one.
            batch: samples of each batch.
        """
        return cls(start=start, stop=stop, rank=0, world_size=1, global_batch=batch, micro_batch=batch)

    @property
    def per_rank(self) -> int:
        """Samples of one step that fall to each rank."""
        return self.global_batch // self.world_size

    @property
    def accumulation(self) -> int:
        """Micro-batches of one step on each rank."""
        return self.per_rank // self.micro_batch

    def samples(self, first: int, micro: int) -> range:
        """Sample numbers of this rank's micro-batch number `micro` in the step whose first sample is `first`."""
        low = first + self._slice(first) * self.per_rank + micro * self.micro_batch
        return range(low, max(low, min(low + self.micro_batch, self.stop)))

    def _slice(self, first: int) -> int:
        """Number of the slice that this rank takes of the step whose first sample is `first`."""
        step = first // self.global_batch
        turn = step * FRACTION_OF_SQRT_2 % (1 << 64) if self.world_size <= FEW_RANKS else key_of("turn", step)
        return (self.rank + (turn * self.world_size >> 64)) % self.world_size

    def micro_batches(self) -> Iterator[range]:
        """All micro-batches of this rank that hold samples, in order."""
        for first in range(self.start, self.stop, self.global_batch):
            for micro in range(self.accumulation):
                if samples := self.samples(first, micro):
                    yield samples
