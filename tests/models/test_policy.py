from __future__ import annotations

from pathlib import Path

import pytest
import torch
from model_samples import generators, labelled, observation, select

from defi_models import presets
from defi_models.errors import ConfigurationError
from defi_models.inputs.normalization import FieldStatistics, Statistics
from defi_models.policy import DeFIPolicy


def field(dim: int, low: float, high: float) -> FieldStatistics:
    return FieldStatistics(
        mean=[(low + high) / 2] * dim, std=[(high - low) / 4] * dim, min=[low] * dim, max=[high] * dim
    )


@pytest.fixture
def fitted(policy: DeFIPolicy) -> DeFIPolicy:
    policy.set_statistics(Statistics(action=field(4, -3.0, 5.0), proprio=field(4, 0.0, 1.0)))
    return policy


def test_acting_for_a_batch_equals_acting_one_by_one(fitted: DeFIPolicy) -> None:
    batch = observation(3)
    together = fitted.act(batch, generators(3))
    alone = [fitted.act(select(batch, [index]), generators(1, index)) for index in range(3)]
    assert together.shape == (3, 10, 4)
    # A matrix product sums in another order at another batch size; nothing else may differ.
    assert torch.allclose(together, torch.cat(alone), rtol=0, atol=1e-5)


def test_the_same_seed_gives_the_same_actions_and_another_seed_others(fitted: DeFIPolicy) -> None:
    batch = observation(1)
    assert torch.equal(fitted.act(batch, generators(1)), fitted.act(batch, generators(1)))
    assert not torch.allclose(fitted.act(batch, generators(1)), fitted.act(batch, generators(1, 9)))


def test_a_saved_policy_acts_bit_identically_after_loading(fitted: DeFIPolicy, tmp_path: Path) -> None:
    loaded = DeFIPolicy.from_pretrained(fitted.save_pretrained(tmp_path / "policy"))
    batch = observation(2)
    assert torch.equal(loaded.act(batch, generators(2)), fitted.act(batch, generators(2)))
    assert loaded.statistics == fitted.statistics and loaded.config == fitted.config


def test_the_loss_does_not_depend_on_the_order_of_the_batch(fitted: DeFIPolicy) -> None:
    batch, order = labelled(3), [1, 2, 0]
    shuffled = fitted(select(batch, order), [torch.Generator().manual_seed(index) for index in order])
    assert torch.allclose(fitted(batch, generators(3))["loss"], shuffled["loss"], rtol=1e-4)


def test_actions_past_the_episodes_end_do_not_count(fitted: DeFIPolicy) -> None:
    batch = labelled(2)
    batch["action_mask"] = torch.arange(10).expand(2, -1) < 6
    first = fitted(batch, generators(2))["loss"]
    batch["actions"] = torch.where(batch["action_mask"][..., None], batch["actions"], torch.tensor(4.0))
    assert torch.allclose(fitted(batch, generators(2))["loss"], first, rtol=1e-5)


def test_a_mask_of_ones_changes_nothing(fitted: DeFIPolicy) -> None:
    batch = labelled(2)
    masked = batch | {"action_mask": torch.ones(2, 10, dtype=torch.bool)}
    assert torch.allclose(fitted(batch, generators(2))["loss"], fitted(masked, generators(2))["loss"])


def test_actions_come_out_in_raw_units(policy: DeFIPolicy) -> None:
    batch = observation(1)
    plain = policy.act(batch, generators(1))
    policy.action_normalizer.set_statistics(field(4, 10.0, 14.0))
    assert torch.allclose(policy.act(batch, generators(1)), plain * 2 + 12, atol=1e-4)


@pytest.mark.parametrize("mode", ["mean_std", "min_max", "none"])
def test_normalisation_undoes_itself_and_survives_a_constant_dimension(mode: str) -> None:
    from defi_models.inputs.normalization import Normalizer

    normalizer = Normalizer(2, mode)
    normalizer.set_statistics(
        FieldStatistics(mean=[1.0, 7.0], std=[2.0, 0.0], min=[-3.0, 7.0], max=[5.0, 7.0])
    )
    raw = torch.tensor([[2.5, 7.0], [-1.0, 7.0]])
    values = normalizer.normalize(raw)
    assert torch.isfinite(values).all()
    assert torch.allclose(normalizer.denormalize(values), raw, atol=1e-6)


@pytest.mark.parametrize(
    ("choice", "gidm_trains", "gfdm_trains"),
    [
        ("adapter", False, False),
        ("gidm+adapter", True, False),
        ("gfdm+adapter", False, True),
        ("all", True, True),
    ],
)
def test_what_trains_is_a_named_choice(
    policy: DeFIPolicy, choice: str, gidm_trains: bool, gfdm_trains: bool
) -> None:
    policy.set_trainable(choice)
    policy.train()
    policy(labelled(1), generators(1))["loss"].backward()

    def moved(module: torch.nn.Module) -> bool:
        return any(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters())

    assert (
        moved(policy.adapter.head) and moved(policy.adapter.video_former) and moved(policy.adapter.projector)
    )
    assert moved(policy.adapter.latent_actions) is gidm_trains
    assert moved(policy.gfdm.unet) is gfdm_trains


def test_an_unknown_trainable_part_names_the_nearest(policy: DeFIPolicy) -> None:
    with pytest.raises(ConfigurationError, match=r"Did you mean 'gidm\+adapter'"):
        policy.set_trainable("gdim+adapter")


def test_fusing_copies_the_pretrained_weights(policy: DeFIPolicy, gfdm, gidm) -> None:
    ours = policy.adapter.latent_actions.state_dict()
    assert all(torch.equal(ours[name], tensor) for name, tensor in gidm.encoder.state_dict().items())
    assert torch.equal(policy.gfdm.unet.conv_in.weight, gfdm.unet.conv_in.weight)
    with torch.no_grad():
        gfdm.unet.conv_in.weight.zero_()
    assert policy.gfdm.unet.conv_in.weight.abs().sum() > 0


def test_an_observation_without_proprioception_is_refused(policy: DeFIPolicy) -> None:
    batch = observation(1)
    del batch["proprio"]
    with pytest.raises(ValueError, match="reads proprioception"):
        policy.act(batch)


def test_a_wrong_number_of_views_is_refused(policy: DeFIPolicy) -> None:
    with pytest.raises(ValueError, match="3 camera views were given; this policy reads 2"):
        policy.act(observation(1, views=3))


def test_statistics_of_another_robot_are_refused(policy: DeFIPolicy) -> None:
    with pytest.raises(ValueError, match="7 dimensions"):
        policy.set_statistics(Statistics(action=field(7, -1, 1), proprio=field(4, 0, 1)))


def test_acting_in_training_mode_uses_no_dropout_and_returns_to_it(gfdm, gidm) -> None:
    adapter = {"frame_pair": [0, 2], "head": {"residual_dropout": 0.5}}
    policy = DeFIPolicy.fuse(presets.policy("nano", adapter=adapter), gfdm, gidm).train()
    batch = observation(1, views=1)
    assert torch.equal(policy.act(batch, generators(1)), policy.act(batch, generators(1)))
    assert policy.training and policy.adapter.head.training


def test_without_the_causal_quirk_the_first_action_reads_the_whole_context(policy: DeFIPolicy) -> None:
    head = policy.adapter.head
    context = torch.randn(1, 40, 32)
    noisy, sigma = torch.randn(1, 10, 4), torch.ones(1)
    other = context.clone()
    other[:, 1:] = torch.randn_like(other[:, 1:])
    free = head(noisy, sigma, context)[:, 0], head(noisy, sigma, other)[:, 0]
    for block in head.action_blocks:
        block.causal_cross_attention = True
    bound = head(noisy, sigma, context)[:, 0], head(noisy, sigma, other)[:, 0]
    assert not torch.allclose(*free) and torch.allclose(*bound, atol=1e-6)


def test_the_policy_runs_in_bf16_and_keeps_its_statistics_exact(fitted: DeFIPolicy) -> None:
    scale = fitted.action_normalizer.scale.clone()
    rounded = fitted.to(torch.bfloat16)
    assert torch.isfinite(rounded(labelled(2), generators(2))["loss"])
    assert rounded.act(observation(1), generators(1)).dtype == torch.float32
    assert torch.equal(rounded.action_normalizer.scale, scale)


def test_a_policy_without_proprioception_reads_none(gfdm, gidm) -> None:
    adapter = {"frame_pair": [0, 2], "head": {"proprio_dim": 0, "action_dim": 7, "chunk": 5}}
    policy = DeFIPolicy.fuse(presets.policy("nano", adapter=adapter), gfdm, gidm).eval()
    batch = observation(1, views=1)
    del batch["proprio"]
    assert policy.act(batch).shape == (1, 5, 7)


def test_recomputed_activations_give_the_same_gradients(policy: DeFIPolicy) -> None:
    policy.train()
    gradients = []
    for recompute in (False, True):
        policy.zero_grad()
        policy.set_recompute(recompute)
        policy(labelled(1), generators(1))["loss"].backward()
        gradients.append([p.grad.clone() for p in policy.parameters() if p.grad is not None])
    assert all(torch.allclose(plain, again, atol=1e-6) for plain, again in zip(*gradients, strict=True))


def test_each_text_is_encoded_once(policy: DeFIPolicy) -> None:
    caches = [policy.gfdm.text_encoder.cache, policy.gidm_text.cache]
    for cache in caches:
        cache.clear()
    before = [cache.encoded for cache in caches]
    policy.act(observation(3))
    policy.act(observation(3))
    # GFDM's encoder gives two features of a text, its states and its goal.
    assert [cache.encoded - count for cache, count in zip(caches, before, strict=True)] == [6, 3]
