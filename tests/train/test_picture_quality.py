"""Figures that say how near a predicted picture is."""

from __future__ import annotations

import pytest
import torch
from torchmetrics.functional.image import structural_similarity_index_measure

from defi_platform.train.validation.image_metrics import gmsd, psnr, ssim


def test_psnr_and_ssim_tell_near_pictures_from_far_ones() -> None:
    torch.manual_seed(0)
    truth = torch.randint(0, 256, (2, 3, 32, 32, 3), dtype=torch.uint8)
    near = (truth.int() + torch.randint(-8, 9, truth.shape)).clamp(0, 255).byte()
    assert psnr(truth, truth).shape == ssim(truth, truth).shape == (2, 3)
    assert torch.allclose(ssim(truth, truth), torch.ones(2, 3)) and psnr(truth, truth).min() == 100
    assert ssim(near, truth).min() > 0.95 and ssim(255 - truth, truth).max() < 0
    constant = torch.zeros(1, 16, 16, 3, dtype=torch.uint8)
    assert psnr(constant + 51, constant).item() == pytest.approx(20 * torch.log10(torch.tensor(5.0)).item())
    # Two flat pictures: structure and contrast are alike, only the means differ.
    c1, a, b = 0.01**2, 0.2, 0.4
    assert ssim(constant + 51, constant + 102).item() == pytest.approx(
        (2 * a * b + c1) / (a * a + b * b + c1), rel=1e-5
    )


@pytest.mark.parametrize("size", [(8, 7), (32, 20)])
def test_ssim_is_that_of_torchmetrics(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    truth = torch.randint(0, 256, (2, 3, *size, 3), dtype=torch.uint8)
    near = (truth.int() + torch.randint(-30, 31, truth.shape)).clamp(0, 255).byte()
    x, y = (frames.flatten(0, 1).permute(0, 3, 1, 2).double() / 255 for frames in (near, truth))
    _, scores = structural_similarity_index_measure(
        x, y, sigma=1.5, data_range=1.0, reduction="none", return_full_image=True
    )
    top, left = (min(5, (side - 1) // 2) for side in size)
    wanted = scores[..., top : size[0] - top, left : size[1] - left].mean(dim=(1, 2, 3)).view(2, 3)
    assert torch.allclose(ssim(near, truth).double(), wanted, atol=1e-6)


def test_gmsd_is_blind_to_brightness_and_sees_a_blurred_half() -> None:
    torch.manual_seed(0)
    truth = torch.randint(0, 200, (1, 2, 32, 32, 3), dtype=torch.uint8)
    assert gmsd(truth, truth).shape == (1, 2)
    assert gmsd(truth, truth).max() < 1e-12 and gmsd(truth + 50, truth).max() < 1e-12
    blurred = truth.clone()
    blurred[..., :16, :] = truth[..., :16, :].float().mean(dim=(-3, -2), keepdim=True).byte()
    noisy = (truth.int() + torch.randint(-8, 9, truth.shape)).clamp(0, 255).byte()
    assert gmsd(noisy, truth).max() < 0.1 < gmsd(blurred, truth).min()


def test_gmsd_of_a_step_against_a_flat_picture_is_that_of_the_formula() -> None:
    # Luma 0 | 1 at half size 4 x 4: Prewitt's answer is 1 in the two middle columns, 0 elsewhere, against 0.
    step = torch.zeros(8, 8, 3, dtype=torch.uint8)
    step[:, 4:] = 255
    c = 170 / 255**2
    likeness = torch.tensor([1.0, c / (1 + c), c / (1 + c), 1.0])
    assert gmsd(step, torch.zeros_like(step)).item() == pytest.approx(
        likeness.std(correction=0).item(), rel=1e-4
    )
