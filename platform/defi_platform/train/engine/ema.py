"""Exponential moving average (EMA) of the weights; each rank averages the part of the fp32 masters that it owns."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
import torch.distributed as distributed
from torch import Tensor


class ShardedWeights(Protocol):
    """Master weights of a model, sharded over the ranks."""

    def master_fragments(self) -> Iterator[tuple[str, int, Tensor]]:
        """(parameter name, first element, values 1-D) of this rank's share, always in one order."""
        ...

    @property
    def device(self) -> torch.device:
        """Device of the values."""
        ...


class EMA:
    """`ema <- rate * ema + (1 - rate) * weights` after each update, rate = min(decay, (1 + n) / (10 + n)).

    Without communication, whatever the ZeRO stage: only reading a whole parameter's average is a collective call.

    Args:
        weights: to average; the average starts at their present values.
        decay: upper bound of the rate.
    """

    def __init__(self, weights: ShardedWeights, decay: float):
        self.updates = 0
        """n: updates averaged so far."""
        self._weights, self._decay = weights, decay
        self._starts: dict[str, int] = {}
        self._fragments: dict[str, Tensor] = {}
        self.start()

    def start(self) -> None:
        """Starts the average at the present weights."""
        for name, start, values in self._weights.master_fragments():
            self._starts[name], self._fragments[name] = start, values.detach().clone()

    @torch.no_grad()
    def update(self) -> None:
        """Averages in the weights as they are after an update."""
        rate = min(self._decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        masters = [values for _, _, values in self._weights.master_fragments()]
        if masters:
            torch._foreach_lerp_(list(self._fragments.values()), masters, 1 - rate)

    def fragment(self, name: str) -> Tensor:
        """This rank's part of one parameter's average, 1-D."""
        return self._fragments[name]

    def full(self, name: str, shape: torch.Size) -> Tensor:
        """The average of one parameter on every rank, float32 of `shape` (collective)."""
        full = torch.zeros(shape.numel(), device=self._weights.device)
        if name in self._fragments:
            start = self._starts[name]
            full[start : start + len(self._fragments[name])] = self._fragments[name]
        if distributed.get_world_size() > 1:
            distributed.all_reduce(full)
        return full.view(shape)

    @torch.no_grad()
    def overwrite(self, name: str, value: Tensor) -> None:
        """Follows weights that were set by hand: where `value` differs from them, the average starts there anew."""
        for parameter, start, values in self._weights.master_fragments():
            if parameter == name:
                fragment = value.detach().flatten()[start : start + len(values)].to(values)
                self._fragments[name].copy_(torch.where(fragment == values, self._fragments[name], fragment))

    def set(self, name: str, start: int, values: Tensor) -> None:
        """Overwrites elements of this rank's part of one parameter's average.

        Args:
            name: of the parameter.
            start: first element, of the whole parameter.
            values: 1-D.
        """
        first = start - self._starts[name]
        self._fragments[name][first : first + len(values)].copy_(values)
