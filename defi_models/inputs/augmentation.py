"""Image augmentation of GIDM's training pairs: one draw per sample, the same for all of its frames."""

# B batch, T frames, H W pixels

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from defi_models.rng import Generators, uniform

_DRAWS = 6


@dataclass(kw_only=True, frozen=True)
class Augmentation:
    """Random changes of a picture that do not change the events in it: crop, brightness, contrast, saturation, hue.

    Source: the released latent action configuration; operations in the order and with the meaning that
    Open X-Embodiment's data loaders gave them. Pixels are clamped to their range after each.
    """

    crop_area: float = 0.9
    """Share of the picture that a crop at a random position keeps; the crop is scaled back to the full size."""
    brightness: float = 0.2
    """Largest change added to pixels in 0..1."""
    contrast: float = 0.2
    """Largest relative change of the distance from each channel's mean."""
    saturation: float = 0.2
    """Largest relative change."""
    hue: float = 0.05
    """Largest turn, as a share of the colour circle."""

    def __call__(self, frames: Tensor, generator: Generators = None) -> Tensor:
        """Augmented frames of the same shape and type.

        Args:
            frames: uint8 (B, T, H, W, 3).
            generator: see `Generators`; each sample draws six uniform numbers.

        Returns:
            uint8 (B, T, H, W, 3).
        """
        batch, time = frames.shape[:2]
        drawn = 2 * uniform((batch, _DRAWS), generator, frames.device) - 1
        right, down, brightness, contrast, saturation, hue = (
            drawn.repeat_interleave(time, dim=0).T[:, :, None, None, None].unbind()
        )
        images = frames.flatten(0, 1).movedim(-1, 1).float() / 255
        images = self._cropped(images, right, down)
        images = (images + self.brightness * brightness).clamp(0, 1)
        mean = images.mean(dim=(2, 3), keepdim=True)
        images = (mean + (images - mean) * (1 + self.contrast * contrast)).clamp(0, 1)
        own_hue, own_saturation, value = _to_hsv(images)
        turned = (own_hue + self.hue * hue[:, 0]) % 1.0
        stretched = (own_saturation * (1 + self.saturation * saturation[:, 0])).clamp(0, 1)
        images = _from_hsv(turned, stretched, value)
        return (images * 255).round().to(torch.uint8).movedim(1, -1).reshape(frames.shape)

    def _cropped(self, images: Tensor, right: Tensor, down: Tensor) -> Tensor:
        side = self.crop_area**0.5
        zero = torch.zeros_like(right).flatten()
        room = 1 - side
        rows = torch.stack(
            [zero + side, zero, right.flatten() * room, zero, zero + side, down.flatten() * room], dim=1
        )
        grid = F.affine_grid(rows.view(-1, 2, 3), list(images.shape), align_corners=False)
        return F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)


def _to_hsv(images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(N, 3, H, W) in [0, 1] -> hue, saturation and value, each (N, H, W) in [0, 1]."""
    red, green, blue = images.unbind(1)
    value, brightest = images.max(dim=1)
    spread = value - images.min(dim=1).values
    divisor = torch.where(spread == 0, torch.ones_like(spread), spread)
    sixths = torch.stack(
        [(green - blue) / divisor % 6, (blue - red) / divisor + 2, (red - green) / divisor + 4]
    )
    hue = sixths.gather(0, brightest[None])[0] / 6
    saturation = spread / torch.where(value == 0, torch.ones_like(value), value)
    return hue, saturation, value


def _from_hsv(hue: Tensor, saturation: Tensor, value: Tensor) -> Tensor:
    """The inverse of `_to_hsv`: (N, 3, H, W)."""
    channels = []
    for offset in (5.0, 3.0, 1.0):  # red, green, blue
        sextant = (offset + hue * 6) % 6
        share = torch.minimum(sextant, 4 - sextant).clamp(0, 1)
        channels.append(value - value * saturation * share)
    return torch.stack(channels, dim=1)
