"""Video-Former: GFDM's features of all frames and views, resampled to a few tokens per frame."""

# B batch, T frames, L tokens of a frame (all views), Q queries per frame, C feature channels, D width

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from defi_models.layers.activation_checkpointing import run
from defi_models.layers.attention import Attention


class VideoFormerLayer(nn.Module):
    """Per-frame perceiver cross-attention, attention across frames per query, feed-forward; residual each."""

    def __init__(self, dim: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.feature_norm = nn.LayerNorm(dim)
        self.query_norm = nn.LayerNorm(dim)
        self.resample = Attention(dim, heads, head_dim=head_dim, out_bias=False)
        # The reference adds 1 to every logit of the temporal attention (a float mask of ones); the softmax
        # removes it, so it is left out. There is no norm before it, as released.
        self.temporal = Attention(dim, heads, qkv_bias=True)
        self.ffn = nn.Sequential(
            nn.LayerNorm(dim),
            nn.Linear(dim, 4 * dim, bias=False),
            nn.GELU(),
            nn.Linear(4 * dim, dim, bias=False),
        )

    def forward(self, features: Tensor, queries: Tensor) -> Tensor:
        """Queries (B, T, Q, D) after reading features (B, T, L, D)."""
        batch, frames = queries.shape[:2]
        normed = self.query_norm(queries)
        seen = torch.cat([self.feature_norm(features), normed], dim=2)
        read = self.resample(normed.flatten(0, 1), seen.flatten(0, 1))
        queries = queries + torch.unflatten(read, 0, (batch, frames))
        per_query = queries.transpose(1, 2).flatten(0, 1)  # (B * Q, T, D)
        mixed = torch.unflatten(self.temporal(per_query), 0, (batch, -1)).transpose(1, 2)
        queries = queries + mixed
        queries = queries + self.ffn(queries)
        return queries


class VideoFormer(nn.Module):
    """Perceiver resampler over the frames of a predicted clip.

    Source: arXiv 2604.16391, section 3.3 and the released CALVIN configuration.
    """

    @dataclass(kw_only=True, frozen=True)
    class Config:
        """Sizes of the resampler; the defaults are the paper's."""

        dim: int = 384
        """Width of the tokens."""
        depth: int = 6
        """Number of layers."""
        heads: int = 8
        """Attention heads."""
        head_dim: int = 64
        """Width of a head of the resampling attention; the temporal attention's is dim / heads."""
        frames: int = 16
        """Frames of the predicted clip."""
        queries_per_frame: int = 14
        """Learnable queries, so tokens, per frame."""
        embedding_std: float = 1.0
        """Standard deviation of fresh time embeddings and queries."""
        spatial_positions: bool = False
        """A learnable position per token of a frame (all views); released weights have none."""

    def __init__(self, config: Config, *, feature_dim: int, tokens_per_frame: int) -> None:
        super().__init__()
        self.config = config
        self.recompute = False
        dim = config.dim
        self.projection = nn.Sequential(nn.Linear(feature_dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))
        self.time_embedding = nn.Parameter(torch.randn(config.frames, 1, dim) * config.embedding_std)
        self.position_embedding = None
        if config.spatial_positions:
            self.position_embedding = nn.Parameter(torch.randn(tokens_per_frame, dim) * 0.02)
        queries = torch.randn(config.frames, config.queries_per_frame, dim)
        self.queries = nn.Parameter(queries * config.embedding_std)
        self.layers = nn.ModuleList(
            VideoFormerLayer(dim, config.heads, config.head_dim) for _ in range(config.depth)
        )
        self.norm = nn.LayerNorm(dim)

    def forward(self, features: Tensor) -> Tensor:
        """Features (B, T, L, C), views one after the other on L -> tokens (B, T * Q, D), frame-major."""
        x = self.projection(features) + self.time_embedding
        if self.position_embedding is not None:
            x = x + self.position_embedding
        queries = self.queries.expand(len(features), -1, -1, -1)
        for layer in self.layers:
            queries = run(layer, x, queries, recompute=self.recompute)
        tokens: Tensor = self.norm(queries)
        return tokens.flatten(1, 2)
