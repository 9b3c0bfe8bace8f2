"""Distractors: changes to pairs of frames that have nothing to do with the robot, for the linear probe.

A latent action that follows the robot keeps its meaning under them; one that follows the scene reports them instead.

- `background`: every pixel that does not move between the two frames, and lies far from those that do, becomes part of a
  random coloured texture, the same in both frames. It needs no mask of the robot; of a robot that stands still nothing
  is left, and of a pair from a moving camera everything.
- `lighting`: a random colour and brightness of the light, from a random side, drawn for each of the two frames.
- `object`: a textured disc a quarter of the picture wide, which moves in a random direction between the frames.

B pairs, H x W pixels, M numbers that describe what the distractor did.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

MOVED = 12
"""Levels of 255 by which a pixel of a channel has to change to count as moving."""
_MARGIN = 1 / 16
"""Distance to a moving pixel, as a share of the shorter side, within which nothing is replaced."""
_DISC = 0.25
_SHORTEST, _LONGEST = 0.15, 0.4
"""Way of the disc between the frames, as shares of the shorter side."""


class Distracted(NamedTuple):
    """Pairs with a distractor."""

    frames: Tensor
    """uint8 (B, 2, H, W, 3)."""
    did: Tensor
    """float32 (B, M): change of the light's brightness (log), or way of the disc (x, y as shares of the shorter side);
    M is 0 for a background."""
    changed: Tensor
    """float32 (B,): share of the pixels that are not as they were."""


def distract(frames: Tensor, kind: str, generators: Sequence[torch.Generator]) -> Distracted:
    """Composites a distractor into pairs of frames.

    Args:
        frames: uint8 (B, 2, H, W, 3), on CPU.
        kind: one of `KINDS`.
        generators: B of them, so that the distractor of a pair does not depend on its batch.
    """
    made = [KINDS[kind](pair.float(), generator) for pair, generator in zip(frames, generators, strict=True)]
    pictures = torch.stack([pair for pair, _ in made]).round().clamp(0, 255).to(torch.uint8)
    changed = (pictures != frames).any(dim=-1).float().mean(dim=(1, 2, 3))
    return Distracted(pictures, torch.stack([did for _, did in made]), changed)


def _background(pair: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    height, width = pair.shape[1:3]
    moving = (pair[0] - pair[1]).abs().amax(dim=-1) > MOVED
    reach = max(1, round(_MARGIN * min(height, width)))
    near = F.max_pool2d(moving[None, None].float(), 2 * reach + 1, stride=1, padding=reach)[0, 0] > 0
    return torch.where(near[None, :, :, None], pair, _texture(height, width, generator)), torch.zeros(0)


def _lighting(pair: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    height, width = pair.shape[1:3]
    y, x = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    lit, brightness = [], []
    for frame in pair:
        draw = torch.rand(5, generator=generator)
        level = float(draw[0] - 0.5)  # 0.6 to 1.65 times as bright
        colour = 0.8 + 0.4 * draw[1:4]
        angle = 2 * math.pi * float(draw[4])
        side = 1 + 0.3 * (x * math.cos(angle) + y * math.sin(angle))
        lit.append(frame * math.exp(level) * colour * side[..., None])
        brightness.append(level)
    return torch.stack(lit), torch.tensor([brightness[1] - brightness[0]])


def _object(pair: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    height, width = pair.shape[1:3]
    shorter = min(height, width)
    size = torch.tensor([width, height], dtype=torch.float32)
    texture = _texture(height, width, generator)
    draw = torch.rand(4, generator=generator)
    start = size * (0.15 + 0.7 * draw[:2])
    length = _SHORTEST + (_LONGEST - _SHORTEST) * float(draw[2])
    angle = 2 * math.pi * float(draw[3])
    end = start + shorter * length * torch.tensor([math.cos(angle), math.sin(angle)])
    # What would leave the picture turns back at its edge.
    end = torch.where((end < 0) | (end > size), 2 * start - end, end).clamp(min=torch.zeros(2), max=size)
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    shown = []
    for frame, centre in zip(pair, (start, end), strict=True):
        inside = ((x - centre[0]) ** 2 + (y - centre[1]) ** 2).sqrt() <= _DISC / 2 * shorter
        # The texture is the disc's own: it moves with it.
        moved = torch.roll(texture, (int(centre[1] - start[1]), int(centre[0] - start[0])), dims=(0, 1))
        shown.append(torch.where(inside[..., None], moved, frame))
    return torch.stack(shown), (end - start) / shorter


def _texture(height: int, width: int, generator: torch.Generator) -> Tensor:
    """Coloured blotches, float (H, W, 3) from 0 to 255."""
    coarse = torch.rand(1, 3, 8, 8, generator=generator)
    fine = F.interpolate(coarse, (height, width), mode="bilinear", align_corners=False)[0]
    return 255 * fine.permute(1, 2, 0)


KINDS: dict[str, Callable[[Tensor, torch.Generator], tuple[Tensor, Tensor]]] = {
    "background": _background,
    "lighting": _lighting,
    "object": _object,
}
"""Kinds of distractors by name."""
