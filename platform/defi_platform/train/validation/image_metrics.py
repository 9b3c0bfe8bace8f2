"""PSNR, SSIM and GMSD of predicted frames, without learned weights. Frames are uint8 (..., H, W, 3)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

WINDOW, SIGMA = 11, 1.5
"""Of SSIM's Gaussian, in pixels (Wang et al. 2004); a smaller picture takes the largest odd window that fits."""
STABILISERS = (0.01**2, 0.03**2)
GRADIENT_STABILISER = 170 / 255**2
"""GMSD's c for luma in [0, 1] (Xue et al. 2014 give it for 0..255)."""
LUMA = (0.299, 0.587, 0.114)


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


def gmsd(predicted: Tensor, truth: Tensor) -> Tensor:
    """Gradient magnitude similarity deviation of each picture (Xue et al. 2014): (...), 0 for identical ones.

    A perceptual distance: it tells how unevenly edges are lost over the picture, to which PSNR is blind.
    """
    steep, right = _gradient_magnitude(predicted), _gradient_magnitude(truth)
    likeness = (2 * steep * right + GRADIENT_STABILISER) / (steep**2 + right**2 + GRADIENT_STABILISER)
    return likeness.flatten(1).std(dim=1, correction=0).view(predicted.shape[:-3]).float()


def _gradient_magnitude(pictures: Tensor) -> Tensor:
    """Of the luma at half the size, by Prewitt's operator: (N, 1, H / 2, W / 2)."""
    colours = pictures.reshape(-1, *pictures.shape[-3:]).double() / 255
    luma = F.avg_pool2d((colours * colours.new_tensor(LUMA)).sum(dim=-1)[:, None], 2)
    across = luma.new_tensor([[1, 0, -1]] * 3).div(3).view(1, 1, 3, 3)
    padded = F.pad(luma, (1, 1, 1, 1), mode="replicate")
    dx, dy = F.conv2d(padded, across), F.conv2d(padded, across.transpose(2, 3))
    return (dx**2 + dy**2).sqrt()


def _channels_first(pictures: Tensor) -> Tensor:
    """Each channel a picture of its own, in [0, 1]: (N * 3, 1, H, W), float64 because variances are differences."""
    flat = pictures.reshape(-1, *pictures.shape[-3:]).permute(0, 3, 1, 2).double() / 255
    return flat.reshape(-1, 1, *flat.shape[-2:])


def _gaussian(size: int) -> Tensor:
    place = torch.arange(size, dtype=torch.float64) - size // 2
    weight = torch.exp(-(place**2) / (2 * SIGMA**2))
    return weight / weight.sum()
