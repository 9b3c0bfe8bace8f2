"""Gradient checkpointing of our own blocks."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def run(block: nn.Module, *inputs: Any, recompute: bool) -> Any:
    """`block(*inputs)`; with `recompute`, its activations are computed again in the backward pass.

    Nothing is gained where no gradient is taken, so nothing is done there.
    """
    if recompute and torch.is_grad_enabled():
        return checkpoint(block, *inputs, use_reentrant=False)
    return block(*inputs)


def set_recompute(model: nn.Module, enabled: bool) -> None:
    """Turns gradient checkpointing on or off in every part that has it, diffusers' UNet included."""
    part: Any
    for part in model.modules():
        if hasattr(part, "recompute"):
            part.recompute = enabled
        if hasattr(part, "enable_gradient_checkpointing"):
            if enabled:
                part.enable_gradient_checkpointing()
            else:
                part.disable_gradient_checkpointing()
