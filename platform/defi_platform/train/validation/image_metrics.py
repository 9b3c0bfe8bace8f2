"""PSNR, SSIM and GMSD of predicted frames, without learned weights. Frames are uint8 (..., H, W, 3)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

SIGMA = 1.5
"""Of SSIM's Gaussian, in pixels (Wang et al. 2004)."""
BORDER = 5
"""Pixels from its middle to the end of that window; smaller frames lose less of their border."""
C1, C2 = 0.01**2, 0.03**2
"""SSIM's stabilisers of means and variances, of pixels in [0, 1]."""
MAX_PSNR = 100.0
"""dB; identical frames would have infinity."""
GRADIENT_STABILISER = 170 / 255**2
"""GMSD's c for luma in [0, 1] (Xue et al. 2014 give it for 0..255)."""
LUMA = (0.299, 0.587, 0.114)


def psnr(predicted: Tensor, truth: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each frame in dB, (...), at most MAX_PSNR."""
    # Imported here: it takes seconds, and most runs show no frames.
    from torchmetrics.functional.image import peak_signal_noise_ratio

    x, y = _unit_images(predicted), _unit_images(truth)
    ratio = peak_signal_noise_ratio(x, y, data_range=1.0, reduction="none", dim=(1, 2, 3))
    return ratio.clamp_max(MAX_PSNR).view(predicted.shape[:-3]).float()


def ssim(predicted: Tensor, truth: Tensor) -> Tensor:
    """Structural similarity of each frame, (...), the mean over pixels and channels; 1 for identical frames."""
    x, y = (_unit_images(frames) for frames in (predicted, truth))
    # The Gaussian is applied along one axis after the other: a fifth of the work of its square.
    mean_x, mean_y, square_x, square_y, product = _blurred(torch.cat([x, y, x * x, y * y, x * y])).chunk(5)
    variance_x, variance_y = (square_x - mean_x**2).clamp_min(0), (square_y - mean_y**2).clamp_min(0)
    covariance = product - mean_x * mean_y
    scores = (2 * mean_x * mean_y + C1) * (2 * covariance + C2)
    scores /= (mean_x**2 + mean_y**2 + C1) * (variance_x + variance_y + C2)
    # At the border the window reaches over the edge into mirrored pixels.
    top, left = (min(BORDER, (side - 1) // 2) for side in scores.shape[-2:])
    inner = scores[..., top : scores.shape[-2] - top, left : scores.shape[-1] - left]
    return inner.mean(dim=(-3, -2, -1)).view(predicted.shape[:-3]).float()


def _blurred(images: Tensor) -> Tensor:
    """(N, C, H, W) under the Gaussian window, mirrored beyond their edges."""
    places = torch.arange(-BORDER, BORDER + 1, dtype=images.dtype, device=images.device)
    window = torch.exp(-((places / SIGMA) ** 2) / 2)
    window /= window.sum()
    padded = F.pad(images.flatten(0, 1)[:, None], (BORDER,) * 4, mode="reflect")
    across = F.conv2d(padded, window.view(1, 1, 1, -1))
    return F.conv2d(across, window.view(1, 1, -1, 1)).view(images.shape)


def gmsd(predicted: Tensor, truth: Tensor) -> Tensor:
    """Gradient magnitude similarity deviation of each frame (Xue et al. 2014), (...); 0 for identical frames.

    A perceptual distance: it measures how unevenly edges are lost over the frame, to which PSNR is blind.
    """
    x, y = _gradient_magnitude(predicted), _gradient_magnitude(truth)
    similarity = (2 * x * y + GRADIENT_STABILISER) / (x**2 + y**2 + GRADIENT_STABILISER)
    return similarity.flatten(1).std(dim=1, correction=0).view(predicted.shape[:-3]).float()


def _gradient_magnitude(frames: Tensor) -> Tensor:
    """Of the luma at half the size, by Prewitt's operator: (N, 1, H / 2, W / 2)."""
    colours = frames.reshape(-1, *frames.shape[-3:]).double() / 255
    luma = F.avg_pool2d((colours * colours.new_tensor(LUMA)).sum(dim=-1)[:, None], 2)
    across = luma.new_tensor([[1, 0, -1]] * 3).div(3).view(1, 1, 3, 3)
    padded = F.pad(luma, (1, 1, 1, 1), mode="replicate")
    dx, dy = F.conv2d(padded, across), F.conv2d(padded, across.transpose(2, 3))
    return (dx**2 + dy**2).sqrt()


def _unit_images(frames: Tensor) -> Tensor:
    """(N, 3, H, W) in [0, 1], float64 because SSIM's variances are differences."""
    return frames.reshape(-1, *frames.shape[-3:]).permute(0, 3, 1, 2).double() / 255
