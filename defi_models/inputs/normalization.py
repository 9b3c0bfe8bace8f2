"""Normalisation of actions and proprioception, part of the policy so that no server re-implements it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from defi_models.errors import ConfigurationError, InputError
from defi_models.inputs.checks import check_finite
from defi_models.precision import Float32Constants

MODES = ("mean_std", "min_max", "none")
_SMALLEST_SCALE = 1e-6


@dataclass(kw_only=True, frozen=True)
class FieldStatistics:
    """Per-dimension statistics of one field over the training split, in its raw units."""

    mean: Sequence[float]
    """Mean of each dimension."""
    std: Sequence[float]
    """Standard deviation of each dimension."""
    min: Sequence[float]
    """Smallest value of each dimension."""
    max: Sequence[float]
    """Largest value of each dimension."""


@dataclass(kw_only=True, frozen=True)
class Statistics:
    """Statistics of a labelled corpus."""

    action: FieldStatistics
    """Of the actions."""
    proprio: FieldStatistics | None = None
    """Of proprioception; None where the corpus has none."""


class Normalizer(Float32Constants):
    """Affine map between raw units and what the network sees: (x - offset) / scale.

    `mean_std` gives zero mean and unit deviation, `min_max` the range [-1, 1], `none` leaves values alone. A
    dimension that never changes is shifted but not scaled.
    """

    offset: Tensor
    """(dim,) float32, whatever the policy's dtype."""
    scale: Tensor
    """(dim,) float32, never 0."""

    def __init__(self, dim: int, mode: str) -> None:
        super().__init__()
        if mode not in MODES:
            raise ConfigurationError(f"normalization '{mode}' does not exist; there is: {', '.join(MODES)}.")
        self.mode = mode
        self.register_buffer("offset", torch.zeros(dim))
        self.register_buffer("scale", torch.ones(dim))

    def set_statistics(self, statistics: FieldStatistics) -> None:
        """Sets offset and scale from the statistics of a corpus.

        Raises:
            InputError: When the number of dimensions is not the policy's, or what the mode uses is not finite.
        """
        mean, std, low, high = (
            torch.as_tensor(values, dtype=torch.float32).flatten()
            for values in (statistics.mean, statistics.std, statistics.min, statistics.max)
        )
        if not len(mean) == len(std) == len(low) == len(high) == len(self.offset):
            raise InputError(
                f"statistics: got {len(mean)} dimensions; expected the policy's {len(self.offset)}."
            )
        if self.mode == "mean_std":
            offset, scale = mean, std
        elif self.mode == "min_max":
            offset, scale = (high + low) / 2, (high - low) / 2
        else:
            offset, scale = torch.zeros_like(mean), torch.ones_like(mean)
        check_finite("statistics", torch.stack([offset, scale]))
        self.offset.copy_(offset)
        self.scale.copy_(torch.where(scale.abs() < _SMALLEST_SCALE, torch.ones_like(scale), scale))

    def normalize(self, raw: Tensor) -> Tensor:
        """Raw units (..., dim) -> float32 network units."""
        return (raw.to(self.offset.device).float() - self.offset) / self.scale

    def denormalize(self, values: Tensor) -> Tensor:
        """Network units (..., dim) -> float32 raw units."""
        return values.float() * self.scale + self.offset
