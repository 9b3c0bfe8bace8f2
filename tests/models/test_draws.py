from __future__ import annotations

import pytest
import torch
from model_samples import generators

from defi_models.edm import log_logistic
from defi_models.rng import normal, uniform

CPU = torch.device("cpu")


@pytest.mark.parametrize("draw", [normal, uniform])
def test_a_samples_draws_do_not_depend_on_the_rest_of_the_batch(draw) -> None:
    together = draw((3, 5), generators(3), CPU)
    alone = draw((1, 5), [torch.Generator().manual_seed(2)], CPU)
    assert torch.equal(together[2:], alone)


def test_one_generator_gives_one_stream() -> None:
    first = normal((4, 2), torch.Generator().manual_seed(3), CPU)
    assert torch.equal(first, torch.randn(4, 2, generator=torch.Generator().manual_seed(3)))


def test_too_few_generators_are_refused_with_both_numbers() -> None:
    with pytest.raises(ValueError, match=r"2 generators.*batch of 3"):
        normal((3, 1), generators(2), CPU)


def test_training_noise_levels_stay_in_their_range_with_the_right_median() -> None:
    sigma = log_logistic(
        20_000, torch.Generator().manual_seed(0), CPU, location=-0.69, scale=0.5, low=0.001, high=80.0
    )
    assert sigma.min() >= 0.001 and sigma.max() <= 80.0
    assert abs(sigma.median().log().item() + 0.69) < 0.03
