"""Random draws whose numbers do not depend on the device, and, where asked for, not on the batch either."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

Generators: TypeAlias = torch.Generator | Sequence[torch.Generator] | None
"""None: torch's own generator. One CPU generator: one stream for the batch. A list of one per sample: a
sample's draws come from its own generator alone, whatever else is in the batch."""


def normal(shape: Sequence[int], generator: Generators, device: torch.device) -> Tensor:
    """Standard normal float32 draws of `shape`; dimension 0 is the batch."""
    return _draw(torch.randn, shape, generator, device)


def uniform(shape: Sequence[int], generator: Generators, device: torch.device) -> Tensor:
    """Uniform float32 draws in [0, 1) of `shape`; dimension 0 is the batch."""
    return _draw(torch.rand, shape, generator, device)


def _draw(
    source: Callable[..., Tensor], shape: Sequence[int], generator: Generators, device: torch.device
) -> Tensor:
    if generator is None:
        return source(tuple(shape), device=device, dtype=torch.float32)
    if isinstance(generator, torch.Generator):
        drawn = source(tuple(shape), generator=generator, device=generator.device, dtype=torch.float32)
        return drawn.to(device)
    if len(generator) != shape[0]:
        raise ValueError(
            f"{len(generator)} generators were given for a batch of {shape[0]}; one each is needed."
        )
    drawn = torch.stack(
        [source(tuple(shape[1:]), generator=own, device=own.device, dtype=torch.float32) for own in generator]
    )
    return drawn.to(device)
