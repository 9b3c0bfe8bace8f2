"""Blocks of the GIDM's spatio-temporal transformers."""

# B batch, T frames, N tokens of a frame (queries, patches, text), D width

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from defi_models.layers.attention import Attention


def sinusoidal_position(length: int, dim: int, device: torch.device) -> Tensor:
    """Fixed positions, float32 (length, dim): sine on even channels, cosine on odd ones, base 10000.

    Args:
        length: number of positions.
        dim: number of channels.
        device: where the result lies.
    """
    position = torch.arange(length, device=device, dtype=torch.float32)[:, None]
    frequency = torch.exp(
        torch.arange(0, dim, 2, device=device, dtype=torch.float32) * (-math.log(10000.0) / dim)
    )
    angles = position * frequency
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)[:, :dim]


class Stem(nn.Sequential):
    """LayerNorm(in) -> Linear(in, D) -> LayerNorm(D), then a fixed sinusoidal position over the tokens."""

    def __init__(self, in_dim: int, dim: int) -> None:
        super().__init__(nn.LayerNorm(in_dim), nn.Linear(in_dim, dim), nn.LayerNorm(dim))

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens (B, N, in) -> (B, N, D)."""
        for layer in self:
            tokens = layer(tokens)
        return tokens + sinusoidal_position(tokens.shape[1], tokens.shape[2], tokens.device).to(tokens.dtype)


def feed_forward(dim: int, dropout: float) -> nn.Sequential:
    """Feed-forward layers: Linear(D, 4D), GELU, Dropout, Linear(4D, D)."""
    return nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Dropout(dropout), nn.Linear(4 * dim, dim))


class SpaceTimeBlock(nn.Module):
    """Attention over the tokens of a frame, then over the frames of a token (causal), then feed-forward."""

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.spatial_norm = nn.LayerNorm(dim)
        self.spatial = Attention(dim, heads)
        self.temporal_norm = nn.LayerNorm(dim)
        self.temporal = Attention(dim, heads)
        self.ffn_norm = nn.LayerNorm(dim)
        self.ffn = feed_forward(dim, dropout)

    def forward(self, x: Tensor, key_mask: Tensor | None, wanted: int | None = None) -> Tensor:
        """Tokens after the block.

        Args:
            x: (B, T, N, D).
            key_mask: bool (B * T, N), rows in (b t) order; of the spatial attention only: padded text passes through
                the rest, as released.
            wanted: how many of a frame's first tokens are read afterwards; None: all.

        Returns:
            (B, T, wanted, D).
        """
        batch, frames = x.shape[:2]
        flat = self.spatial_norm(x).flatten(0, 1)
        attended = self.spatial(flat[:, :wanted], flat, key_mask)
        x = x[:, :, :wanted] + attended.unflatten(0, (batch, frames))
        per_token = self.temporal_norm(x).transpose(1, 2).flatten(0, 1)  # (B * N, T, D)
        attended = self.temporal(per_token, causal=True).unflatten(0, (batch, -1))
        x = x + attended.transpose(1, 2)
        x = x + self.ffn(self.ffn_norm(x))
        return x


class SpaceBlock(nn.Module):
    """Attention over the tokens of one frame, then feed-forward."""

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.spatial_norm = nn.LayerNorm(dim)
        self.spatial = Attention(dim, heads)
        self.ffn_norm = nn.LayerNorm(dim)
        self.ffn = feed_forward(dim, dropout)

    def forward(self, x: Tensor, key_mask: Tensor | None) -> Tensor:
        """Tokens x (B, N, D), key_mask bool (B, N) -> (B, N, D)."""
        x = x + self.spatial(self.spatial_norm(x), key_mask=key_mask)
        x = x + self.ffn(self.ffn_norm(x))
        return x
