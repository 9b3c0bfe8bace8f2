"""Collective operations on small values: sum, mean, broadcast, barrier and shared errors over the ranks of a run."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as distributed
from torch import Tensor

from defi_platform.errors import UserError

Value = TypeVar("Value")


class Communicator:
    """This rank among all ranks of torch's default process group. Methods marked collective are called by all."""

    def __init__(self, use_gpu: bool):
        self.rank, self.world_size = distributed.get_rank(), distributed.get_world_size()
        self.device = torch.device("cuda", torch.cuda.current_device()) if use_gpu else torch.device("cpu")

    @property
    def is_rank_zero(self) -> bool:
        """True on the rank that writes files and messages."""
        return self.rank == 0

    def sum(self, value: Tensor) -> Tensor:
        """The sum over all ranks, on the device of `value` (collective)."""
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

    def broadcast(self, value: Value) -> Value:
        """Rank 0's value on every rank (collective)."""
        values = [value]
        distributed.broadcast_object_list(values, src=0, device=self.device)
        return values[0]

    def gather(self, value: Value) -> list[Value]:
        """The values of all ranks on every rank, in their order (collective)."""
        values = [value] * self.world_size
        distributed.all_gather_object(values, value)
        return values

    def together(self, request: Callable[[], Value]) -> Value:
        """The answer of a request that every rank makes, once all have one (collective).

        Raises: the UserError of the first rank that has one, on all ranks: with one alone the others would wait for it
            for ever. Any other error at once, since it ends the rank, and with it the attempt.
        """
        answer: list[Value] = []
        message = None
        try:
            answer.append(request())
        except UserError as error:
            message = (type(error), str(error), socket.gethostname())
        messages = self.gather(message)
        failed = [one for one in messages if one]
        if failed:
            kind, text, host = failed[0]
            raise kind(text if len(failed) == len(messages) else f"on {host}: {text}")
        return answer[0]

    def barrier(self) -> None:
        """Returns when every rank has called it (collective)."""
        distributed.barrier()
