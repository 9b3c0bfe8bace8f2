"""Exponential moving average of the weights: each rank averages the part of the fp32 masters that it owns."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

import torch
import torch.distributed as distributed
from torch import Tensor


class Masters(Protocol):
    """What is averaged: (parameter name, first element, values 1-D) of this rank's share, always in one order."""

    def masters(self) -> Iterator[tuple[str, int, Tensor]]: ...

    @property
    def device(self) -> torch.device: ...


class WeightAverage:
    """`average <- rate * average + (1 - rate) * weights` after each update, rate = min(decay, (1 + n) / (10 + n)).

    Without communication, whatever the ZeRO stage: only reading the whole average is a collective call.
    """

    def __init__(self, engine: Masters, decay: float):
        self.updates = 0
        """n: updates averaged so far."""
        self._engine, self._decay = engine, decay
        self._starts: dict[str, int] = {}
        self._own: dict[str, Tensor] = {}
        for name, start, values in engine.masters():
            self._starts[name], self._own[name] = start, values.detach().clone()

    @torch.no_grad()
    def update(self) -> None:
        """Takes in the weights as they are after an update."""
        rate = min(self._decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        masters = [values for _, _, values in self._engine.masters()]
        if masters:
            torch._foreach_lerp_(list(self._own.values()), masters, 1 - rate)

    def own(self, name: str) -> Tensor:
        """This rank's piece of the average of one parameter, 1-D."""
        return self._own[name]

    def whole(self, name: str, shape: torch.Size) -> Tensor:
        """The average of one parameter on every rank, float32 (a collective call)."""
        full = torch.zeros(shape.numel(), device=self._engine.device)
        if name in self._own:
            start = self._starts[name]
            full[start : start + len(self._own[name])] = self._own[name]
        if distributed.get_world_size() > 1:
            distributed.all_reduce(full)
        return full.view(shape)

    @torch.no_grad()
    def overwrite(self, name: str, value: Tensor) -> None:
        """Follows weights that were set by hand: where `value` differs from them, the average starts there anew."""
        for own, start, values in self._engine.masters():
            if own == name:
                piece = value.detach().flatten()[start : start + len(values)].to(values)
                self._own[name].copy_(torch.where(piece == values, self._own[name], piece))

    @torch.no_grad()
    def restore(self, updates: int, read: Callable[[str], Tensor]) -> None:
        """
        Args:
            read: parameter name -> the whole average.
        """
        self.updates = updates
        for name, start in self._starts.items():
            own = self._own[name]
            own.copy_(read(name).flatten()[start : start + len(own)])
