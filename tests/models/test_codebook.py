from __future__ import annotations

import pytest
import torch

from defi_models.layers.codebook import Codebook, fraction_used, perplexity


@pytest.fixture
def codebook() -> Codebook:
    return Codebook(Codebook.Config(size=6), dim=3)


def test_the_nearest_code_is_chosen_and_the_gradient_passes_straight_through(codebook: Codebook) -> None:
    latents = torch.randn(4, 2, 3, requires_grad=True)
    found = codebook(latents)
    distances = torch.cdist(latents.detach().flatten(0, 1), codebook.weight.detach())
    found.tokens.sum().backward()
    assert torch.equal(found.indices.flatten(), distances.argmin(1))
    assert torch.equal(latents.grad, torch.ones_like(latents))


def test_usage_is_counted_in_training_only(codebook: Codebook) -> None:
    codebook.eval()
    codebook(torch.randn(4, 2, 3))
    assert codebook.usage.sum() == 0
    codebook.train()
    codebook(torch.randn(4, 2, 3))
    assert codebook.usage.sum() == 8


def test_counts_of_two_workers_add_up_to_those_of_one(codebook: Codebook) -> None:
    latents = torch.randn(8, 2, 3)
    counts = []
    for part in (latents, latents[:4], latents[4:]):
        codebook.train().reset_usage()
        codebook(part)
        counts.append(codebook.usage.clone())
    assert torch.equal(counts[0], counts[1] + counts[2])


def test_restart_replaces_dead_codes_only_and_writes_nothing(codebook: Codebook) -> None:
    before = codebook.weight.detach().clone()
    counts = torch.tensor([5, 0, 1, 0, 0, 2])
    renewed = codebook.restart(counts, torch.Generator().manual_seed(0))
    again = codebook.restart(counts, torch.Generator().manual_seed(0))
    assert torch.equal(codebook.weight, before)
    assert torch.equal(renewed, again)
    assert torch.equal(renewed[counts > 0], before[counts > 0])
    assert (renewed[counts == 0] != before[counts == 0]).any(1).all()


def test_restart_without_noise_copies_living_codes_as_released() -> None:
    codebook = Codebook(Codebook.Config(size=4, restart_noise=0.0), dim=3)
    renewed = codebook.restart(torch.tensor([0, 3, 0, 0]), torch.Generator().manual_seed(0))
    assert torch.equal(renewed, codebook.weight[1].expand(4, -1))


@pytest.mark.parametrize("counts", [[1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0]])
def test_restart_has_nothing_to_do_when_all_or_no_codes_are_used(
    codebook: Codebook, counts: list[int]
) -> None:
    assert codebook.restart(torch.tensor(counts), torch.Generator()) is None


def test_fraction_used_and_perplexity_describe_the_counts() -> None:
    counts = torch.tensor([4, 4, 0, 0, 0, 0])
    assert fraction_used(counts) == pytest.approx(2 / 6)
    assert perplexity(counts) == pytest.approx(2.0)
    assert perplexity(torch.zeros(6)) == 0.0
