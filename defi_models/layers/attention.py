"""Multi-head attention on `scaled_dot_product_attention`, the only attention our own layers use."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    """Self- or cross-attention with separate query, key and value projections.

    Shapes: x (B, N, dim), context (B, M, context_dim or dim), key_mask bool (B, M), True = may be attended.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        head_dim: int | None = None,
        qkv_bias: bool = False,
        out_bias: bool = True,
        dropout: float = 0.0,
        out_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        inner = heads * head_dim if head_dim else dim
        if inner % heads:
            raise ValueError(f"width {inner} is not a whole number of {heads} heads.")
        self.heads = heads
        self.dropout = dropout
        self.query = nn.Linear(dim, inner, bias=qkv_bias)
        self.key = nn.Linear(dim, inner, bias=qkv_bias)
        self.value = nn.Linear(dim, inner, bias=qkv_bias)
        self.out = nn.Linear(inner, dim, bias=out_bias)
        self.out_dropout = nn.Dropout(out_dropout)

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        key_mask: Tensor | None = None,
        causal: bool = False,
    ) -> Tensor:
        """Attended tokens.

        Args:
            x: (B, N, dim), the queries.
            context: (B, M, context_dim), the keys and values; None takes `x`.
            key_mask: bool (B, M), True = may be attended.
            causal: query i sees keys 0..i (top-left aligned when N != M).

        Returns:
            (B, N, dim).
        """
        return self.attend(x, *self.keys_and_values(x if context is None else context), key_mask, causal)

    def keys_and_values(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of a context (B, M, context_dim), (B, heads, M, head_dim) each."""
        return self._split(self.key(context)), self._split(self.value(context))

    def attend(
        self,
        x: Tensor,
        keys: Tensor,
        values: Tensor,
        key_mask: Tensor | None = None,
        causal: bool = False,
    ) -> Tensor:
        """Attended tokens of a context that is read more than once.

        Args:
            x: (B, N, dim), the queries.
            keys: as `keys_and_values` returns them.
            values: as `keys_and_values` returns them.
            key_mask: bool (B, M), True = may be attended; None: all, which fused kernels do faster.
            causal: query i sees keys 0..i (top-left aligned when N != M).

        Returns:
            (B, N, dim).
        """
        attended = F.scaled_dot_product_attention(
            self._split(self.query(x)),
            keys,
            values,
            attn_mask=None if key_mask is None else key_mask[:, None, None, :],
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=causal,
        )
        out: Tensor = self.out_dropout(self.out(attended.transpose(1, 2).flatten(2)))
        return out

    def _split(self, x: Tensor) -> Tensor:
        return torch.unflatten(x, 2, (self.heads, -1)).transpose(1, 2)  # (B, heads, N, head_dim)
