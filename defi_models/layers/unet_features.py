"""Intermediate features of diffusers' spatio-temporal UNet, computed no further than they are read."""

# B batch, T frames, C channels, h w latent grid

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from defi_models.layers.unet_blocks import resnet, transformer, upsampling
from defi_models.layers.video_unet import DiffusersUNet


class BlockFunctions(NamedTuple):
    """The functions that a pass consists of."""

    resnet: Callable[..., Tensor] = resnet
    transformer: Callable[..., Tensor] = transformer
    upsampling: Callable[..., Tensor] = upsampling

    @classmethod
    def compiled(cls, **options: Any) -> Self:
        """Each function compiled as a whole, once per shape of its weights and inputs; never in parts, never not.

        Args:
            options: of `torch.compile`.
        """
        options = {"fullgraph": True, "dynamic": False, "recompile_limit": COMPILED_SHAPES} | options
        return cls(*(torch.compile(function, **options) for function in cls()))


COMPILED_SHAPES = 64
"""A block of each size, batch size and precision is compiled once; PyTorch's own limit is 8."""


def up_block_features(
    unet: DiffusersUNet,
    sample: Tensor,
    timestep: Tensor,
    text: Tensor,
    added_time_ids: Tensor,
    blocks: Sequence[int],
    functions: BlockFunctions | None = None,
) -> Tensor:
    """Outputs of the up-blocks `blocks`, concatenated on the channels, at the size of the last one.

    Runs the UNet's blocks in its own order and stops after the last one that is read.

    Args:
        unet: diffusers' `UNetSpatioTemporalConditionModel`.
        sample: (B, T, C_in, h, w) scaled noisy latents and condition.
        timestep: float (1,), ln(sigma) / 4 of all samples.
        text: (R, S, cross_attention_dim) token states; B / R neighbouring samples (views) share a row.
        added_time_ids: float (1, 3): fps, motion bucket, noise augmentation.
        blocks: rising indices of up-blocks; a block's own upsampler counts to its output.
        functions: compiled ones; None: as they are.

    Returns:
        (B, T, sum of channels, h', w').
    """
    resnet, transformer, upsampling = functions or BlockFunctions()
    frames = sample.shape[1]
    level = F.silu(_time_embedding(unet, sample, timestep, added_time_ids))

    def step(kind: Callable[..., Tensor], block: Any, owner: Any, x: Tensor, condition: Tensor) -> Tensor:
        if owner.gradient_checkpointing and torch.is_grad_enabled():
            return cast(Tensor, checkpoint(kind, block, x, condition, frames, use_reentrant=False))
        return kind(block, x, condition, frames)

    def pair(owner: Any, index: int, x: Tensor) -> Tensor:
        x = step(resnet, owner.resnets[index], owner, x, level)
        if getattr(owner, "has_cross_attention", False):
            x = step(transformer, owner.attentions[index], owner, x, text)
        return x

    hidden = unet.conv_in(sample.flatten(0, 1))
    skips = [hidden]
    for down in unet.down_blocks:
        for index in range(len(down.resnets)):
            hidden = pair(down, index, hidden)
            skips.append(hidden)
        for downsampler in down.downsamplers or ():
            hidden = downsampler(hidden)
            skips.append(hidden)
    middle = unet.mid_block
    hidden = step(resnet, middle.resnets[0], middle, hidden, level)
    for attention, after in zip(middle.attentions, middle.resnets[1:], strict=True):
        hidden = step(transformer, attention, middle, hidden, text)
        hidden = step(resnet, after, middle, hidden, level)
    # on grids that the UNet's strides do not divide, upsamplers need the size of the next skip
    factor = 2**unet.num_upsamplers
    uneven = any(size % factor for size in sample.shape[-2:])
    read = []
    for number, up in enumerate(unet.up_blocks):
        for index in range(len(up.resnets)):
            hidden = pair(up, index, torch.cat([hidden, skips.pop()], dim=1))
        for upsampler in up.upsamplers or ():
            hidden = upsampling(upsampler, hidden, skips[-1].shape[2:] if uneven and skips else None)
        if number in blocks:
            read.append(hidden)
        if number == max(blocks):
            break
    grid = read[-1].shape[-2:]
    resized = [x if x.shape[-2:] == grid else F.interpolate(x, size=grid, mode="nearest") for x in read]
    return torch.unflatten(torch.cat(resized, dim=1), 0, (-1, frames))


def time_ids(batch: int, conditions: Sequence[float], device: torch.device) -> Tensor:
    """SVD's micro-conditioning, float (batch, 3): fps, motion bucket, noise augmentation.

    They are filled in where they lie: numbers that come from the host cannot be part of a CUDA graph.

    Args:
        batch: number of samples.
        conditions: the three numbers.
        device: where the result lies.
    """
    return torch.stack([torch.full((batch,), each, device=device) for each in conditions], dim=1)


def feature_channels(block_out_channels: Sequence[int], blocks: Sequence[int]) -> int:
    """Number of channels that `up_block_features` returns."""
    per_block = list(reversed(block_out_channels))
    return sum(per_block[index] for index in blocks)


def _time_embedding(unet: DiffusersUNet, sample: Tensor, timestep: Tensor, added_time_ids: Tensor) -> Tensor:
    embedding = unet.time_embedding(unet.time_proj(timestep).to(sample.dtype))
    added = unet.add_time_proj(added_time_ids.flatten()).reshape(1, -1)
    whole: Tensor = embedding + unet.add_embedding(added.to(embedding.dtype))
    return whole
