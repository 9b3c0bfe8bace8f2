"""Blocks of diffusers' spatio-temporal UNet, computed from their own weights with less work.

Everything is the same function of the same weights; what differs is the order of sums, so the last digits:

- A text is read once per sample, not once per frame (spatial attention) or position (temporal attention). Its keys are
  multiplied into the query projection and its values into the output projection: 20 tokens are fewer than the channels.
- The noise level is embedded once, not once per frame: it is the same for all samples of a feature pass.
- A nearest-neighbour upsampling before a 3 x 3 convolution is four 2 x 2 convolutions of the small picture.
- A blend of x and x + h is x plus a share of h.
"""

# N samples (of all views), T frames, C channels, L positions of a frame, S text tokens, h w grid

from __future__ import annotations

from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

# A type checker sees empty placeholders for the classes of diffusers.
Block: TypeAlias = Any


def resnet(block: Block, x: Tensor, level: Tensor, frames: int) -> Tensor:
    """`SpatioTemporalResBlock`: convolutions of each frame, then of each position over the frames.

    Args:
        block: diffusers' module.
        x: (N * T, C_in, h, w).
        level: (1, D) embedding of the noise level, already through SiLU.
        frames: T.

    Returns:
        (N * T, C, h, w).
    """
    spatial, temporal = block.spatial_res_block, block.temporal_res_block
    hidden = spatial.conv1(F.silu(spatial.norm1(x))) + spatial.time_emb_proj(level)[:, :, None, None]
    hidden = spatial.conv2(F.silu(spatial.norm2(hidden)))
    x = hidden + (x if spatial.conv_shortcut is None else spatial.conv_shortcut(x))
    clip = torch.unflatten(x, 0, (-1, frames))  # (N, T, C, h, w)
    hidden = temporal.conv1(F.silu(temporal.norm1(clip.transpose(1, 2))))
    hidden = hidden + temporal.time_emb_proj(level)[:, :, None, None, None]
    hidden = temporal.conv2(F.silu(temporal.norm2(hidden)))
    share = 1 - torch.sigmoid(block.time_mixer.mix_factor)
    return torch.addcmul(clip, hidden.transpose(1, 2), share).flatten(0, 1)


def transformer(block: Block, x: Tensor, text: Tensor, frames: int) -> Tensor:
    """`TransformerSpatioTemporalModel`: attention within each frame, then of each position over the frames.

    Args:
        block: diffusers' module.
        x: (N * T, C, h, w).
        text: (R, S, D) token states; N / R neighbouring samples share a row.
        frames: T.

    Returns:
        (N * T, C, h, w).
    """
    height, width = x.shape[-2:]
    tokens = block.proj_in(block.norm(x).flatten(2).transpose(1, 2))  # (N * T, L, C)
    numbers = torch.arange(frames, device=x.device)
    when = block.time_pos_embed(block.time_proj(numbers).to(tokens.dtype))  # (T, C)
    for within, across in zip(block.transformer_blocks, block.temporal_transformer_blocks, strict=True):
        tokens = tokens + within.attn1(within.norm1(tokens))
        tokens = tokens + text_attention(within.attn2, within.norm2(tokens), text)
        tokens = tokens + within.ff(within.norm3(tokens))
        clip = torch.unflatten(tokens, 0, (-1, frames))  # (N, T, L, C)
        mixed = (clip + when[:, None]).transpose(1, 2).flatten(0, 1)  # (N * L, T, C)
        mixed = mixed + across.ff_in(across.norm_in(mixed))
        mixed = mixed + across.attn1(across.norm1(mixed))
        mixed = mixed + text_attention(across.attn2, across.norm2(mixed), text)
        mixed = mixed + across.ff(across.norm3(mixed))
        mixed = torch.unflatten(mixed, 0, (-1, clip.shape[2])).transpose(1, 2)
        share = torch.sigmoid(block.time_mixer.mix_factor)
        tokens = torch.lerp(mixed, clip, share).flatten(0, 1)
    change: Tensor = block.proj_out(tokens).transpose(1, 2)
    return x + torch.unflatten(change, 2, (height, width))


def text_attention(attention: Block, x: Tensor, text: Tensor) -> Tensor:
    """Cross-attention to the few tokens of a text, all of which may be seen.

    Args:
        attention: diffusers' module.
        x: (rows, n, C) tokens, all of a sample next to each other.
        text: (R, S, D) token states; rows / R neighbouring rows of `x` share a text.

    Returns:
        (rows, n, C).
    """
    heads, (samples, length) = attention.heads, text.shape[:2]
    keys = torch.unflatten(attention.to_k(text), 2, (heads, -1)).permute(0, 2, 3, 1)  # (R, heads, d, S)
    values = torch.unflatten(attention.to_v(text), 2, (heads, -1)).transpose(1, 2)  # (R, heads, S, d)
    query = attention.to_q.weight.unflatten(0, (heads, -1)).transpose(1, 2)  # (heads, C, d)
    out = attention.to_out[0]
    reading = torch.matmul(query * attention.scale, keys)  # (R, heads, C, S)
    writing = torch.matmul(values, out.weight.T.unflatten(0, (heads, -1)))  # (R, heads, S, C)
    tokens = x.reshape(samples, -1, x.shape[-1])
    logits = tokens @ reading.transpose(1, 2).flatten(2)  # (R, rows / R * n, heads * S)
    weights = torch.unflatten(logits, 2, (heads, length)).softmax(-1).flatten(2)
    return torch.baddbmm(out.bias, weights, writing.flatten(1, 2)).view_as(x)


def upsampling(block: Block, x: Tensor, size: tuple[int, int] | None) -> Tensor:
    """`Upsample2D`: nearest neighbour, then a 3 x 3 convolution.

    Args:
        block: diffusers' module.
        x: (N, C, h, w).
        size: of the result where it is not twice that of `x`.

    Returns:
        (N, C, 2h, 2w), or of `size`.
    """
    height, width = x.shape[-2:]
    if size is not None and tuple(size) != (2 * height, 2 * width):
        found: Tensor = block(x, size)
        return found
    # Rows 2i and 2i + 1 of the large picture see rows (i - 1, i, i) and (i, i, i + 1) of the small one.
    weight = block.conv.weight.float()
    rows = (_merged(weight, 2, last=True), _merged(weight, 2, last=False))
    padded = F.pad(x, (1, 1, 1, 1))
    parts = []
    for top, by_row in enumerate(rows):
        for left in (0, 1):
            kernel = _merged(by_row, 3, last=not left).to(x.dtype)
            seen = padded[:, :, top : top + height + 1, left : left + width + 1]
            parts.append(F.conv2d(seen, kernel, block.conv.bias))
    # (N, C, h, w, 2, 2) -> (N, C, h, 2, w, 2)
    whole = torch.unflatten(torch.stack(parts, dim=-1), -1, (2, 2)).transpose(3, 4)
    return whole.flatten(4).flatten(2, 3)


def _merged(weight: Tensor, dim: int, *, last: bool) -> Tensor:
    """Three taps as two: the last two or the first two of them read the same pixel."""
    first, middle, third = torch.split(weight, 1, dim)
    pair = (first, middle + third) if last else (first + middle, third)
    return torch.cat(pair, dim)
