"""PSNR and SSIM of predicted frames, without learned weights. Frames are uint8 (..., H, W, 3)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

WINDOW, SIGMA = 11, 1.5
"""Of SSIM's Gaussian, in pixels (Wang et al. 2004); a smaller picture takes the largest odd window that fits."""
STABILISERS = (0.01**2, 0.03**2)


def psnr(predicted: Tensor, truth: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of each picture: (..., ). Identical pictures have 100."""
    error = (predicted.double() - truth.double()).div(255).square().mean(dim=(-3, -2, -1))
    return (-10 * error.clamp_min(1e-10).log10()).float()


def ssim(predicted: Tensor, truth: Tensor) -> Tensor:
    """Structural similarity of each picture, the mean over its pixels and channels: (...), 1 for identical ones."""
    shape = predicted.shape[:-3]
    x, y = (_channels_first(one) for one in (predicted, truth))
    size = min(WINDOW, *(side - 1 + side % 2 for side in x.shape[-2:]))
    kernel = _gaussian(size).to(x)

    def blurred(picture: Tensor) -> Tensor:
        across = F.conv2d(picture, kernel.view(1, 1, 1, -1))
        return F.conv2d(across, kernel.view(1, 1, -1, 1))

    mean_x, mean_y = blurred(x), blurred(y)
    var_x, var_y = blurred(x * x) - mean_x**2, blurred(y * y) - mean_y**2
    both = blurred(x * y) - mean_x * mean_y
    c1, c2 = STABILISERS
    score = ((2 * mean_x * mean_y + c1) * (2 * both + c2)) / (
        (mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2)
    )
    return score.mean(dim=(-3, -2, -1)).view(-1, 3).mean(dim=1).view(shape).float()


def _channels_first(pictures: Tensor) -> Tensor:
    """Each channel a picture of its own, in [0, 1]: (N * 3, 1, H, W), float64 because variances are differences."""
    flat = pictures.reshape(-1, *pictures.shape[-3:]).permute(0, 3, 1, 2).double() / 255
    return flat.reshape(-1, 1, *flat.shape[-2:])


def _gaussian(size: int) -> Tensor:
    place = torch.arange(size, dtype=torch.float64) - size // 2
    weight = torch.exp(-(place**2) / (2 * SIGMA**2))
    return weight / weight.sum()
