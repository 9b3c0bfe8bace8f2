"""A backbone that never trains."""

from __future__ import annotations

from typing import Self

import torch
from torch import nn


class Frozen(nn.Module):
    """Keeps its parameters out of the optimiser and its layers in eval mode, whatever the model around does."""

    def train(self, mode: bool = True) -> Self:
        return super().train(False)

    def freeze(self) -> None:
        """Called once the parameters exist."""
        self.requires_grad_(False)
        self.eval()

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device
