"""The encoder half of GIDM: two frames of patch features and a text -> discrete latent action tokens."""

# B batch, T frames (2), L patches, K latent action tokens, S text tokens, D width

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from defi_models.layers.activation_checkpointing import run
from defi_models.layers.codebook import Codebook, Quantised
from defi_models.layers.spacetime import SpaceTimeBlock, Stem
from defi_models.layers.unet_features import COMPILED_SHAPES


class LatentActions(NamedTuple):
    """Latent actions of a batch of frame pairs."""

    tokens: Tensor
    """(B, K, latent_dim), quantised (straight-through), or continuous where the codebook is off."""
    indices: Tensor | None
    """(B, K) int64 codes; None where the codebook is off."""
    latents: Tensor
    """(B, K, latent_dim) before the codebook."""
    codebook_loss: Tensor
    """Scalar: pulls codes to the latents; 0 where the codebook is off."""
    commitment_loss: Tensor
    """Scalar: pulls latents to the codes; 0 where the codebook is off."""
    vq_loss: Tensor
    """codebook_loss + commitment_weight * commitment_loss; 0 where the codebook is off."""


class LatentActionEncoder(nn.Module):
    """Spatio-temporal transformer with learnable action queries, and the codebook behind it.

    Source: arXiv 2604.16391, GIDM; names and quirks of the released latent action model.
    """

    @dataclass(kw_only=True, frozen=True)
    class Config:
        """Sizes of the encoder; the defaults are the paper's."""

        dim: int = 768
        """Width of the transformer."""
        blocks: int = 12
        """Transformer blocks."""
        heads: int = 12
        """Attention heads."""
        dropout: float = 0.0
        """In the feed-forward layers; the release has none."""
        latent_dim: int = 128
        """Width of a latent action token."""
        tokens: int = 4
        """Latent action tokens per pair of frames."""
        codebook: Codebook.Config = field(default_factory=Codebook.Config)
        """Vector quantisation of the tokens."""
        continuous: bool = False
        """Skip the codebook: the paper's continuous-latent ablation."""
        tiled_text_mask: bool = False
        """Reproduce the reference's mask order: frames are flattened (b t) but the key mask is tiled (t b),
        so row b * T + t is masked with the text of sample (b * T + t) mod B. It shows only for B > 1 with
        texts of unequal length; sensible only to reproduce the reference's numbers."""

    def __init__(self, config: Config, feature_dim: int, text_dim: int) -> None:
        super().__init__()
        self.config = config
        self.recompute = False
        self.queries = nn.Parameter(torch.empty(config.tokens, feature_dim).uniform_(-1, 1))
        self.text_projection = nn.Linear(text_dim, config.dim)
        self.stem = Stem(feature_dim, config.dim)
        self.blocks = nn.ModuleList(
            SpaceTimeBlock(config.dim, config.heads, config.dropout) for _ in range(config.blocks)
        )
        self.to_latent = nn.Linear(config.dim, config.latent_dim)
        self.codebook = None if config.continuous else Codebook(config.codebook, config.latent_dim)
        self.from_latent = nn.Linear(config.latent_dim, config.dim)

    def forward(self, features: Tensor, text: Tensor, text_mask: Tensor | None) -> LatentActions:
        """Latent actions of frame pairs.

        Args:
            features: (B, T, L, feature_dim) patch features.
            text: (B, S, text_dim) token states.
            text_mask: bool (B, S), True = a token of the text; None where all are.

        Returns:
            Quantised tokens (B, K, latent_dim), their indices and the losses of the codebook.
        """
        latents = self.encode(features, text, text_mask)
        if self.codebook is None:
            zero = latents.new_zeros((), dtype=torch.float32)
            return LatentActions(latents, None, latents, zero, zero, zero)
        quantised: Quantised = self.codebook(latents)
        weight = self.codebook.config.commitment_weight
        return LatentActions(
            tokens=quantised.tokens,
            indices=quantised.indices,
            latents=latents,
            codebook_loss=quantised.codebook_loss,
            commitment_loss=quantised.commitment_loss,
            vq_loss=quantised.codebook_loss + weight * quantised.commitment_loss,
        )

    def encode(self, features: Tensor, text: Tensor, text_mask: Tensor | None) -> Tensor:
        """Latents before the codebook: the queries of the last frame.

        Args:
            features: (B, T, L, feature_dim) patch features.
            text: (B, S, text_dim) token states.
            text_mask: bool (B, S), True = a token of the text; None where all are.

        Returns:
            (B, K, latent_dim).
        """
        batch, frames = features.shape[:2]
        queries = self.queries.to(features.dtype).expand(batch, frames, -1, -1)
        tokens = self.stem(torch.cat([queries, features], dim=2).flatten(0, 1))
        tokens = torch.unflatten(tokens, 0, (batch, frames))
        words = self.text_projection(text)[:, None].expand(-1, frames, -1, -1)
        x = torch.cat([tokens, words], dim=2)
        key_mask = self._key_mask(text_mask, frames, tokens.shape[2])
        for number, block in enumerate(self.blocks, start=1):
            # of the last block, nothing but the queries is read
            wanted = self.config.tokens if number == len(self.blocks) else None
            x = run(block, x, key_mask, wanted, recompute=self.recompute)
        latents: Tensor = self.to_latent(x[:, -1, : self.config.tokens])
        return latents

    def compile_blocks(self, **options: Any) -> None:
        """`torch.compile` of each block, in place; the codebook's bookkeeping stays outside."""
        options = {"recompile_limit": COMPILED_SHAPES} | options
        for block in self.blocks:
            block.compile(**options)

    def mask_each_text(self) -> None:
        """Has each sample read its own text, as a batch of independent ones must, also where `tiled_text_mask` is set."""
        self.config = replace(self.config, tiled_text_mask=False)

    def embed(self, tokens: Tensor) -> Tensor:
        """Quantised tokens (B, K, latent_dim) -> (B, K, D), as the decoder and the policy read them."""
        embedded: Tensor = self.from_latent(tokens)
        return embedded

    def _key_mask(self, text_mask: Tensor | None, frames: int, seen: int) -> Tensor | None:
        if text_mask is None:
            return None
        mask = torch.cat([text_mask.new_ones(len(text_mask), seen), text_mask], dim=1)
        return mask.repeat(frames, 1) if self.config.tiled_text_mask else mask.repeat_interleave(frames, 0)
