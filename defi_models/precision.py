"""Constants that stay in float32 when the model around them is cast to bf16 or fp16."""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn


class Float32Constants(nn.Module):
    """A module whose own buffers follow moves between devices but are never rounded.

    Action statistics, transform bases and whitening constants are read in float32 arithmetic; as bf16 they
    would carry three digits.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        kept = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch has no types for it
        for name, before in kept.items():
            after = self._buffers[name]
            if after is not None and after.dtype != before.dtype:
                self._buffers[name] = before.to(after.device)
        return self


def to_signed_unit(pixels: Tensor) -> Tensor:
    """Pixels for the encoders: uint8 (..., H, W, 3) in 0..255 -> float32 (..., 3, H, W) in [-1, 1]."""
    return pixels.movedim(-1, -3).to(torch.float32) / 127.5 - 1.0


def to_uint8(images: Tensor) -> Tensor:
    """Pixels for people: float (..., 3, H, W) in [-1, 1] -> uint8 (..., H, W, 3), clamped."""
    return ((images.float().clamp(-1.0, 1.0) + 1.0) * 127.5).round().to(torch.uint8).movedim(-3, -1)
