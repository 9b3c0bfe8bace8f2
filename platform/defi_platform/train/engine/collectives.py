"""What the ranks of a run do together besides training."""

from __future__ import annotations

from typing import TypeVar

import torch
import torch.distributed as distributed
from torch import Tensor

Value = TypeVar("Value")


class Ranks:
    """This rank among all. Every method that says so is a collective call."""

    def __init__(self, use_gpu: bool):
        self.rank, self.world_size = distributed.get_rank(), distributed.get_world_size()
        self.device = torch.device("cuda", torch.cuda.current_device()) if use_gpu else torch.device("cpu")

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes and tells."""
        return self.rank == 0

    def sum(self, value: Tensor) -> Tensor:
        """The sum over all ranks, where `value` was (collective)."""
        if self.world_size == 1:
            return value
        moved = value.to(self.device)
        distributed.all_reduce(moved)
        return moved.to(value.device)

    def mean(self, values: dict[str, Tensor]) -> dict[str, float]:
        """The mean over all ranks of scalars by name (collective)."""
        names = sorted(values)
        total = self.sum(torch.stack([values[name].double() for name in names])).tolist()
        return {name: value / self.world_size for name, value in zip(names, total, strict=True)}

    def from_first(self, value: Value) -> Value:
        """Rank 0's value on every rank (collective)."""
        held = [value]
        distributed.broadcast_object_list(held, src=0, device=self.device)
        return held[0]

    def barrier(self) -> None:
        """Returns when every rank is here (collective)."""
        distributed.barrier()
