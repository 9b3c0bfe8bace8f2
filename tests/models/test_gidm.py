from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from model_samples import TEXTS, pixels, select

from defi_models import presets
from defi_models.gidm import GIDM

NANO_FEATURES = (2, 64, 36)


def batch(size: int = 3) -> dict:
    return {"frames": pixels(size, 2), "text": [TEXTS[index % 3] for index in range(size)]}


def encoder_inputs(size: int, words: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(size, *NANO_FEATURES, generator=generator)
    text = torch.randn(size, words, 32, generator=generator)
    mask = torch.rand(size, words, generator=generator) > 0.4
    return features, text, mask


def test_the_loss_is_made_of_its_parts(gidm: GIDM) -> None:
    found = gidm(batch())
    total = found["reconstruction_loss"] + found["codebook_loss"] + 0.25 * found["commitment_loss"]
    assert torch.allclose(found["loss"], total)
    assert found["indices"].shape == (3, 4) and found["copy_loss"] > 0


def test_the_loss_does_not_depend_on_the_order_of_the_batch(gidm: GIDM) -> None:
    samples = batch(4)
    assert torch.allclose(gidm(samples)["loss"], gidm(select(samples, [2, 0, 3, 1]))["loss"], atol=1e-6)


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 10_000))
def test_the_encoder_is_causal_in_time(gidm: GIDM, seed: int) -> None:
    features, text, mask = encoder_inputs(2, 5, seed)
    seen: list[torch.Tensor] = []
    hook = gidm.encoder.blocks[-1].register_forward_hook(lambda _m, _a, out: seen.append(out.detach()))
    gidm.encoder.encode(features, text, mask)
    features[:, 1] = torch.randn_like(features[:, 1])
    gidm.encoder.encode(features, text, mask)
    hook.remove()
    assert torch.equal(seen[0][:, 0], seen[1][:, 0])
    assert not torch.allclose(seen[0][:, 1], seen[1][:, 1])


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 10_000), size=st.integers(1, 3))
def test_masked_text_is_ignored(gidm: GIDM, seed: int, size: int) -> None:
    features, text, mask = encoder_inputs(size, 5, seed)
    first = gidm.encoder.encode(features, text, mask)
    other = torch.where(mask[..., None], text, torch.randn_like(text) * 100)
    assert torch.allclose(gidm.encoder.encode(features, other, mask), first, atol=1e-5)


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 10_000), extra=st.integers(1, 6))
def test_padding_text_changes_nothing(gidm: GIDM, seed: int, extra: int) -> None:
    features, text, mask = encoder_inputs(2, 5, seed)
    padded = torch.cat([text, torch.randn(2, extra, 32)], dim=1)
    padded_mask = torch.cat([mask, torch.zeros(2, extra, dtype=torch.bool)], dim=1)
    short, long = (gidm.loss(features, *given).loss for given in ((text, mask), (padded, padded_mask)))
    assert torch.allclose(short, long, atol=1e-5)


def test_with_the_tiled_mask_a_sample_is_masked_with_its_neighbours_text() -> None:
    encoder = {"dim": 32, "latent_dim": 8, "tiled_text_mask": True}
    quirky = GIDM(presets.gidm("nano", encoder=encoder)).eval()
    features, text, _ = encoder_inputs(2, 5, 0)
    mask = torch.tensor([[True] * 5, [True] + [False] * 4])
    together = quirky.encoder.encode(features, text, mask)
    alone = quirky.encoder.encode(features[:1], text[:1], mask[:1])
    assert not torch.allclose(together[:1], alone, atol=1e-4)


def test_labelling_video_gives_tokens_and_codes(gidm: GIDM) -> None:
    samples = batch(2)
    actions = gidm.encode(samples["frames"], samples["text"])
    assert actions.tokens.shape == (2, 4, 8) and actions.indices.shape == (2, 4)
    assert torch.allclose(actions.tokens, gidm.codebook.look_up(actions.indices), atol=1e-6)


def test_a_continuous_latent_has_no_codebook_and_no_codebook_loss() -> None:
    model = GIDM(presets.gidm("nano", encoder={"continuous": True}))
    found = model(batch(2))
    found["loss"].backward()
    assert model.codebook is None and "indices" not in found
    assert torch.equal(found["loss"].detach(), found["reconstruction_loss"])


@pytest.mark.parametrize(("tokens", "codes"), [(2, 8), (8, 32)])
def test_the_numbers_of_tokens_and_codes_are_configuration(tokens: int, codes: int) -> None:
    config = presets.gidm("nano", encoder={"tokens": tokens, "codebook": {"size": codes}})
    found = GIDM(config)(batch(2))
    assert found["indices"].shape == (2, tokens) and found["indices"].max() < codes


def test_recomputed_activations_give_the_same_gradients(gidm: GIDM) -> None:
    gradients = []
    for recompute in (False, True):
        gidm.train().zero_grad()
        gidm.set_recompute(recompute)
        gidm(batch(2))["loss"].backward()
        gradients.append([p.grad.clone() for p in gidm.parameters() if p.grad is not None])
    assert len(gradients[0]) > 20
    assert all(torch.equal(plain, again) for plain, again in zip(*gradients, strict=True))


def test_a_short_training_lowers_the_loss_and_keeps_several_codes_in_use() -> None:
    model = GIDM(presets.gidm("nano", encoder={"dim": 32}, decoder={"blocks": 1}))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    samples = batch(8)
    losses = []
    for _ in range(25):
        loss = model(samples)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
