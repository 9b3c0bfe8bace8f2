from __future__ import annotations

import pytest
import torch

from defi_platform.train.validation.linear_probe import ridge_r2


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
