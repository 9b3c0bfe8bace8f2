"""Intermediate features of diffusers' spatio-temporal UNet, computed no further than they are read."""

# B batch, T frames, C channels, h w latent grid

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from defi_models.layers.video_unet import DiffusersUNet


def up_block_features(
    unet: DiffusersUNet,
    sample: Tensor,
    timestep: Tensor,
    text: Tensor,
    added_time_ids: Tensor,
    blocks: Sequence[int],
) -> Tensor:
    """Outputs of the up-blocks `blocks`, concatenated on the channels, at the size of the last one.

    Runs the UNet's own modules in its own order and stops after the last block that is read.

    Args:
        unet: diffusers' `UNetSpatioTemporalConditionModel`.
        sample: (B, T, C_in, h, w) scaled noisy latents and condition.
        timestep: float (B,), ln(sigma) / 4.
        text: (B, S, cross_attention_dim) token states.
        added_time_ids: float (B, 3): fps, motion bucket, noise augmentation.
        blocks: rising indices of up-blocks; a block's own upsampler counts to its output.

    Returns:
        (B, T, sum of channels, h', w').
    """
    batch, frames = sample.shape[:2]
    embedding = _time_embedding(unet, sample, timestep, added_time_ids).repeat_interleave(frames, dim=0)
    text = text.repeat_interleave(frames, dim=0)
    image_only = torch.zeros(batch, frames, dtype=sample.dtype, device=sample.device)

    hidden = unet.conv_in(sample.flatten(0, 1))
    skips: tuple[Tensor, ...] = (hidden,)
    for down in unet.down_blocks:
        hidden, kept = _call(down, hidden, embedding, text, image_only)
        skips += kept
    hidden = unet.mid_block(
        hidden_states=hidden, temb=embedding, encoder_hidden_states=text, image_only_indicator=image_only
    )
    # on grids that the UNet's strides do not divide, upsamplers need the size of the next skip
    factor = 2**unet.num_upsamplers
    uneven = any(size % factor for size in sample.shape[-2:])
    read = []
    for index, up in enumerate(unet.up_blocks):
        count = len(up.resnets)
        used, skips = skips[-count:], skips[:-count]
        size = {"upsample_size": skips[-1].shape[2:]} if uneven and skips else {}
        hidden = _call(up, hidden, embedding, text, image_only, res_hidden_states_tuple=used, **size)
        if index in blocks:
            read.append(hidden)
        if index == max(blocks):
            break
    grid = read[-1].shape[-2:]
    resized = [x if x.shape[-2:] == grid else F.interpolate(x, size=grid, mode="nearest") for x in read]
    return torch.unflatten(torch.cat(resized, dim=1), 0, (batch, frames))


def feature_channels(block_out_channels: Sequence[int], blocks: Sequence[int]) -> int:
    """Number of channels that `up_block_features` returns."""
    per_block = list(reversed(block_out_channels))
    return sum(per_block[index] for index in blocks)


def _time_embedding(unet: DiffusersUNet, sample: Tensor, timestep: Tensor, added_time_ids: Tensor) -> Tensor:
    embedding = unet.time_embedding(unet.time_proj(timestep).to(sample.dtype))
    added = unet.add_time_proj(added_time_ids.flatten()).reshape(len(sample), -1)
    whole: Tensor = embedding + unet.add_embedding(added.to(embedding.dtype))
    return whole


def _call(
    block: torch.nn.Module,
    hidden: Tensor,
    embedding: Tensor,
    text: Tensor,
    image_only: Tensor,
    **more: Any,
) -> Any:
    if getattr(block, "has_cross_attention", False):
        more["encoder_hidden_states"] = text
    return block(hidden_states=hidden, temb=embedding, image_only_indicator=image_only, **more)
