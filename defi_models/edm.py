"""Denoising in the EDM form (Karras et al. 2022), as GFDM and the action head use it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from defi_models.rng import Generators, uniform


class Preconditioning(NamedTuple):
    """Per-sample factors around a network, each shaped like `sigma`."""

    skip: Tensor
    out: Tensor
    scale_in: Tensor


def velocity_preconditioning(sigma: Tensor) -> Preconditioning:
    """GFDM's: unit data variance and a network that predicts the velocity (so c_out is negative)."""
    root = (sigma**2 + 1).sqrt()
    return Preconditioning(1 / (sigma**2 + 1), -sigma / root, 1 / root)


def karras_preconditioning(sigma: Tensor, sigma_data: float) -> Preconditioning:
    """The action head's: data of standard deviation `sigma_data`."""
    total = sigma**2 + sigma_data**2
    return Preconditioning(sigma_data**2 / total, sigma * sigma_data / total.sqrt(), 1 / total.sqrt())


def log_logistic(
    batch: int,
    generator: Generators,
    device: torch.device,
    *,
    location: float,
    scale: float,
    low: float,
    high: float,
) -> Tensor:
    """(batch,) noise levels, log-logistic, truncated to [low, high]; location is that of ln(sigma)."""
    draw = uniform((batch,), generator, device).double()
    low_cdf = 1 / (1 + math.exp(-(math.log(low) - location) / scale))
    high_cdf = 1 / (1 + math.exp(-(math.log(high) - location) / scale))
    quantile = low_cdf + draw * (high_cdf - low_cdf)
    return (quantile.logit() * scale + location).exp().float()


def log_spaced_sigmas(steps: int, low: float, high: float, device: torch.device) -> Tensor:
    """(steps + 1,) noise levels from high to low, evenly in the logarithm, then 0."""
    levels = torch.linspace(math.log(high), math.log(low), steps, device=device).exp()
    return torch.cat([levels, levels.new_zeros(1)])


def ddim(denoise: Callable[[Tensor, Tensor], Tensor], x: Tensor, sigmas: Tensor) -> Tensor:
    """Deterministic sampling from `x`, already of standard deviation sigmas[0].

    Args:
        denoise: (x (B, ...), sigma (B,)) -> the denoised x.
        sigmas: (steps + 1,), falling, the last one 0.
    """
    for now, after in itertools.pairwise(sigmas):
        denoised = denoise(x, now.expand(len(x)))
        # exp(-h) with h = ln(now) - ln(after) is after / now, 0 on the last step, which returns `denoised`.
        ratio = after / now
        x = ratio * x + (1 - ratio) * denoised
    return x
