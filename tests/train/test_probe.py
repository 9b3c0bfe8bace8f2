from __future__ import annotations

import pytest
import torch

from defi_platform.train.picture_quality import psnr, ssim
from defi_platform.train.probe import ridge_r2


def test_actions_that_are_a_linear_map_of_the_latents_are_read_off_them() -> None:
    torch.manual_seed(0)
    latents, held = torch.randn(200, 8), torch.randn(100, 8)
    weights = torch.randn(8, 3) * torch.tensor([1.0, 100.0, 0.01])
    actions, held_actions = (x @ weights + 5 for x in (latents, held))
    assert ridge_r2(latents, actions, held, held_actions) > 0.99
    noisy = actions + actions.std(dim=0) * torch.randn_like(actions)
    held_noisy = held_actions + held_actions.std(dim=0) * torch.randn_like(held_actions)
    assert ridge_r2(latents, noisy, held, held_noisy) == pytest.approx(0.5, abs=0.12)


def test_latents_that_know_nothing_of_the_actions_score_zero_at_best() -> None:
    torch.manual_seed(0)
    score = ridge_r2(torch.randn(200, 64), torch.randn(200, 3), torch.randn(100, 64), torch.randn(100, 3))
    assert -0.2 < score < 0.1


def test_an_action_dimension_that_never_moves_is_left_out() -> None:
    torch.manual_seed(0)
    latents, held = torch.randn(100, 4), torch.randn(50, 4)
    still = torch.tensor([1.0, 0.0])
    assert ridge_r2(latents, latents[:, :2] * still, held, held[:, :2] * still) > 0.99


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
