"""A backbone that never trains."""

from __future__ import annotations

from typing import Self

import torch
from torch import nn


class Frozen(nn.Module):
    """A module whose parameters stay out of the optimiser and whose layers stay in eval mode."""

    def train(self, mode: bool = True) -> Self:
        """Stays in eval mode, whatever `mode` is."""
        return super().train(False)

    def freeze(self) -> None:
        """Freezes the parameters; to be called once they exist."""
        self.requires_grad_(False)
        self.eval()

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the parameters."""
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return next(self.parameters()).device
