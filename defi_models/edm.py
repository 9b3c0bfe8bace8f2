"""Denoising in the EDM form (Karras et al. 2022), as GFDM and the action head use it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from defi_models.rng import Generators, uniform


class Preconditioning(NamedTuple):
    """Per-sample factors around a network, each shaped like `sigma`; c_skip, c_out and c_in of Karras et al."""

    skip: Tensor
    """Factor of the noisy input in the denoised output."""
    out: Tensor
    """Factor of the network's output."""
    scale_in: Tensor
    """Factor of the network's input."""


def velocity_preconditioning(sigma: Tensor) -> Preconditioning:
    """Preconditioning of GFDM: unit data variance and a network that predicts the velocity (so c_out is negative)."""
    root = (sigma**2 + 1).sqrt()
    return Preconditioning(1 / (sigma**2 + 1), -sigma / root, 1 / root)


def karras_preconditioning(sigma: Tensor, sigma_data: float) -> Preconditioning:
    """Preconditioning of the action head: data of standard deviation `sigma_data` (Karras et al. 2022, table 1)."""
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
    """Noise levels of training, log-logistic and truncated.

    Args:
        batch: number of samples.
        generator: see `Generators`; one uniform number per sample.
        device: where the result lies.
        location: median of ln(sigma) before the truncation.
        scale: scale of ln(sigma).
        low: smallest level.
        high: largest level.

    Returns:
        float32 (batch,), each in [low, high].
    """
    draw = uniform((batch,), generator, device).double()
    low_cdf = 1 / (1 + math.exp(-(math.log(low) - location) / scale))
    high_cdf = 1 / (1 + math.exp(-(math.log(high) - location) / scale))
    quantile = low_cdf + draw * (high_cdf - low_cdf)
    return (quantile.logit() * scale + location).exp().float()


def log_spaced_sigmas(steps: int, low: float, high: float, device: torch.device) -> Tensor:
    """Noise levels of sampling, evenly spaced in the logarithm.

    Args:
        steps: number of denoising steps.
        low: level of the last step.
        high: level of the first step.
        device: where the result lies.

    Returns:
        float32 (steps + 1,), falling from high to low, then 0.
    """
    levels = torch.linspace(math.log(high), math.log(low), steps, device=device).exp()
    return torch.cat([levels, levels.new_zeros(1)])


def ddim(
    network: Callable[[int, Tensor], Tensor], x: Tensor, sigmas: Tensor, preconditioning: Preconditioning
) -> Tensor:
    """Deterministic sampling (DDIM, a first-order exponential integrator).

    Args:
        network: (number of the step, scaled x (B, ...)) -> its output, like x.
        x: (B, ...) noise of standard deviation sigmas[0].
        sigmas: (steps + 1,), falling, the last one 0.
        preconditioning: of `sigmas` without the last one, (steps,) each.

    Returns:
        The sample, like x.
    """
    # exp(-h) with h = ln(now) - ln(after) is after / now, 0 on the last step, which returns the denoised x:
    # x' = ratio * x + (1 - ratio) * (c_out * output + c_skip * x)
    ratio = sigmas[1:] / sigmas[:-1]
    keep = ratio + (1 - ratio) * preconditioning.skip
    follow = (1 - ratio) * preconditioning.out
    for step in range(len(ratio)):
        output = network(step, preconditioning.scale_in[step] * x)
        x = torch.addcmul(keep[step] * x, output, follow[step])
    return x
