"""Vector quantisation of latent actions, with usage counts and restart of dead codes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Quantised(NamedTuple):
    """Quantised latents (B, K, latent_dim), with the losses of the codebook."""

    tokens: Tensor
    """(B, K, latent_dim): the nearest codes, with the straight-through gradient."""
    codes: Tensor
    """(B, K, latent_dim): the nearest codes."""
    indices: Tensor
    """(B, K) int64."""
    codebook_loss: Tensor
    """Scalar: pulls codes to the latents."""
    commitment_loss: Tensor
    """Scalar: pulls latents to the codes; enters the total times `commitment_weight`."""


def fraction_used(counts: Tensor) -> float:
    """Share of the codes, 0..1, that `counts` (codes,) holds at least once."""
    return float((counts > 0).double().mean())


def perplexity(counts: Tensor) -> float:
    """exp(entropy) of how often each code was chosen, (codes,): the effective number of codes, 0 without counts."""
    total = counts.double().sum()
    if total == 0:
        return 0.0
    share = counts.double() / total
    return float(torch.exp(-(share * share.clamp_min(1e-300).log()).sum()))


class Codebook(nn.Module):
    """Nearest of `size` codes by Euclidean distance, straight-through estimator.

    Under data parallelism every worker counts its own usage: sum `usage` over the workers, call `restart`
    with the sum and the same generator seed everywhere, and write the returned weight.
    """

    @dataclass(kw_only=True, frozen=True)
    class Config:
        """Size and training of the codebook."""

        size: int = 16
        """Number of codes."""
        commitment_weight: float = 0.25
        """Weight of the commitment loss in the total."""
        restart_noise: float = 0.1
        """Noise on restarted codes, in standard deviations of the codes in use. With 0, as released, a
        restarted code equals its model exactly and the nearest-code search never picks it."""

    usage: Tensor
    """int64 (size,), how often each code was chosen in training since the last `reset_usage`."""

    def __init__(self, config: Config, dim: int) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.size, dim).uniform_(-1 / config.size, 1 / config.size))
        self.register_buffer("usage", torch.zeros(config.size, dtype=torch.int64))

    def forward(self, latents: Tensor) -> Quantised:
        """Quantises latents (B, K, latent_dim) of any float dtype; distances and losses are float32."""
        weight = self.weight.float()
        exact = latents.float()
        flat = exact.flatten(0, -2)
        distance = flat.square().sum(1, keepdim=True) - 2 * flat @ weight.T + weight.square().sum(1)
        indices = distance.argmin(1).view(latents.shape[:-1])
        if self.training:
            with torch.no_grad():
                # Not bincount, for whose length a GPU's host waits.
                chosen = indices.flatten()
                self.usage.index_add_(0, chosen, torch.ones_like(chosen, dtype=self.usage.dtype))
        codes = F.embedding(indices, weight)
        return Quantised(
            tokens=(exact + (codes - exact).detach()).to(latents.dtype),
            codes=codes,
            indices=indices,
            codebook_loss=(codes - exact.detach()).square().mean(),
            commitment_loss=(exact - codes.detach()).square().mean(),
        )

    def look_up(self, indices: Tensor) -> Tensor:
        """Codes of indices: int64 (B, K) -> (B, K, latent_dim)."""
        return F.embedding(indices, self.weight)

    @torch.no_grad()
    def restart(self, counts: Tensor, generator: torch.Generator) -> Tensor | None:
        """The weight with every dead code replaced by a randomly chosen living one, plus a little noise.

        Pure: writes nothing, since an optimiser may hold a master copy of the weight.

        Args:
            counts: (size,) how often each code was met, summed over the workers.
            generator: CPU generator; the same seed gives the same answer on every worker.

        Returns:
            (size, latent_dim) in the weight's dtype and on its device; None when no code is dead or nothing was
            counted.
        """
        counts = counts.cpu()
        dead, living = (counts == 0).nonzero().flatten(), counts.nonzero().flatten()
        if not len(dead) or not len(living):
            return None
        weight = self.weight.detach().float().cpu().clone()
        chosen = living[torch.randint(len(living), (len(dead),), generator=generator)]
        used = weight[living]
        spread = used.std(0) if len(living) > 1 else used.abs().mean().expand(weight.shape[1])
        noise = torch.randn(len(dead), weight.shape[1], generator=generator)
        weight[dead] = weight[chosen] + self.config.restart_noise * spread * noise
        return weight.to(self.weight)

    def reset_usage(self) -> None:
        """Starts a new count, after a restart."""
        self.usage.zero_()
