"""Random tensors that do not depend on the device and, with a generator per sample, not on the batch either."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from defi_models.errors import InputError

Generators: TypeAlias = torch.Generator | Sequence[torch.Generator] | None
"""Source of random numbers. None: torch's global generator. One CPU generator: one stream for the batch. A list of
one per sample: a sample's numbers come from its generator alone, whatever else is in the batch."""


def normal(shape: Sequence[int], generator: Generators, device: torch.device) -> Tensor:
    """Standard normal numbers.

    Args:
        shape: dimension 0 is the batch.
        generator: see `Generators`.
        device: where the result lies; the numbers are the same on every device where a CPU generator is given.

    Returns:
        float32, of `shape`.
    """
    return _draw(torch.randn, shape, generator, device)


def uniform(shape: Sequence[int], generator: Generators, device: torch.device) -> Tensor:
    """Uniform numbers in [0, 1).

    Args:
        shape: dimension 0 is the batch.
        generator: see `Generators`.
        device: where the result lies.

    Returns:
        float32, of `shape`.
    """
    return _draw(torch.rand, shape, generator, device)


def repeated(generator: Generators, times: int) -> Generators:
    """Source of random numbers where every sample has `times` rows, all from its own generator."""
    if isinstance(generator, Sequence):
        return [each for each in generator for _ in range(times)]
    return generator


def check_generators(generator: Generators, batch: int) -> None:
    """Compares the number of generators with that of the samples.

    Raises:
        InputError: With both numbers, or naming another type than `Generators` has.
    """
    if generator is None or isinstance(generator, torch.Generator):
        return
    if not isinstance(generator, Sequence) or not all(isinstance(own, torch.Generator) for own in generator):
        raise InputError(
            f"generator: got {type(generator).__name__}; expected None, a torch.Generator or a list of one per sample."
        )
    if len(generator) != batch:
        raise InputError(
            f"generator: got {len(generator)} generators; expected one per sample of a batch of {batch}."
        )


def _draw(
    source: Callable[..., Tensor], shape: Sequence[int], generator: Generators, device: torch.device
) -> Tensor:
    if generator is None:
        return source(tuple(shape), device=device, dtype=torch.float32)
    if isinstance(generator, torch.Generator):
        drawn = source(tuple(shape), generator=generator, device=generator.device, dtype=torch.float32)
        return _moved(drawn, device)
    check_generators(generator, shape[0])
    drawn = torch.stack(
        [source(tuple(shape[1:]), generator=own, device=own.device, dtype=torch.float32) for own in generator]
    )
    return _moved(drawn, device)


def _moved(drawn: Tensor, device: torch.device) -> Tensor:
    if device.type == "cuda" and drawn.device.type == "cpu":
        # From ordinary memory the host would wait for all that the device has still to do.
        return drawn.pin_memory().to(device, non_blocking=True)
    return drawn.to(device)
