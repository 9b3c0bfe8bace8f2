from __future__ import annotations

import pytest
import torch
from model_samples import TEXTS, generators, pixels, select

from defi_models import presets
from defi_models.gfdm import GFDM


def clips(size: int = 3) -> dict:
    return {"frames": pixels(size, 4), "text": [TEXTS[index % 3] for index in range(size)]}


def test_pixels_and_cached_latents_give_the_same_loss(gfdm: GFDM) -> None:
    batch = clips()
    cached = {"latents": gfdm.encode_frames(batch["frames"]), "text": batch["text"]}
    assert torch.equal(gfdm(batch, generators(3))["loss"], gfdm(cached, generators(3))["loss"])


def test_the_loss_does_not_depend_on_the_order_of_the_batch(gfdm: GFDM) -> None:
    batch, order = clips(), [2, 0, 1]
    own = generators(3)
    shuffled = gfdm(select(batch, order), [torch.Generator().manual_seed(index) for index in order])
    assert torch.allclose(gfdm(batch, own)["loss"], shuffled["loss"], rtol=1e-5)


def test_micro_batches_add_up_to_the_whole_batch(gfdm: GFDM) -> None:
    batch = clips(4)
    whole = gfdm(batch, generators(4))["loss"]
    halves = [gfdm(select(batch, part), generators(2, part[0]))["loss"] for part in ([0, 1], [2, 3])]
    assert torch.allclose(whole, sum(halves) / 2, rtol=1e-5)


def test_text_is_dropped_in_training_for_some_samples_and_never_in_evaluation() -> None:
    model = GFDM(presets.gfdm("nano", frames=4, text_dropout=1.0))
    batch, others = clips(2), clips(2) | {"text": ["lift the lid", "wave"]}
    losses = {
        (mode, which): model.train(mode)(samples, generators(2))["loss"]
        for mode in (True, False)
        for which, samples in (("own", batch), ("other", others))
    }
    assert losses[True, "own"] == losses[True, "other"]
    assert losses[False, "own"] != losses[False, "other"]


def test_features_equal_what_the_whole_unet_computes_in_its_up_blocks(gfdm: GFDM) -> None:
    images, text = pixels(2), TEXTS[:2]
    captured = []
    hooks = [
        block.register_forward_hook(lambda _m, _a, out: captured.append(out)) for block in gfdm.unet.up_blocks
    ]
    condition = gfdm.codec.encode(images.movedim(-1, 1) / 127.5 - 1)
    noise = torch.randn(2, 4, 16, 8, 8)
    states = gfdm.encode_text(text)
    step = gfdm.first_step
    x = torch.cat([noise * step.noise_scale * step.input_scale, condition[:, None].expand_as(noise)], dim=2)
    gfdm.unet_output(x, torch.full((2,), step.timestep), states.repeat(1, 1, 2))
    for hook in hooks:
        hook.remove()
    features = gfdm.features_from_latents(condition, states, noise)
    assert features.shape == (2, 4, gfdm.config.feature_dim, *gfdm.config.feature_size)
    assert torch.allclose(features.flatten(0, 1), torch.cat(captured, dim=1), atol=1e-5)


def test_features_stop_at_the_block_that_is_read() -> None:
    model = GFDM(presets.gfdm("nano", frames=4, feature_blocks=[0])).eval()
    called = []
    first = model.unet.up_blocks[1].resnets[0].spatial_res_block.conv1
    first.register_forward_hook(lambda *_: called.append(True))
    features = model.features(pixels(1), TEXTS[:1])
    assert features.shape[2] == model.config.feature_dim == 64 and not called


def test_blocks_of_another_size_are_brought_to_that_of_the_last() -> None:
    unet = {"block_out_channels": [32, 32, 64], "num_attention_heads": [2, 2, 2]}
    unet |= {"attention_down_blocks": [True, True, False]}
    config = presets.gfdm("nano", frames=2, unet=unet, feature_blocks=[0, 1])
    features = GFDM(config).eval().features(pixels(1), TEXTS[:1])
    assert features.shape == (1, 2, 96, 8, 8) and config.feature_size == (8, 8)


def test_a_samples_features_do_not_depend_on_the_batch(gfdm: GFDM) -> None:
    images = pixels(3)
    together = gfdm.features(images, TEXTS, generators(3))
    alone = gfdm.features(images[1:2], TEXTS[1:2], generators(1, 1))
    assert torch.allclose(together[1:2], alone, atol=1e-5)


def test_a_sampled_clip_is_reproducible_and_guidance_changes_it(gfdm: GFDM) -> None:
    first, text = pixels(2), TEXTS[:2]
    clip = gfdm.sample(first, text, steps=3, generator=generators(2))
    again = gfdm.sample(first, text, steps=3, generator=generators(2))
    guided = gfdm.sample(first, text, steps=3, guidance=4.0, generator=generators(2))
    assert clip.shape == (2, 4, 64, 64, 3) and clip.dtype == torch.uint8
    assert torch.equal(clip, again) and not torch.equal(clip, guided)


def test_recomputed_activations_give_the_same_gradients(gfdm: GFDM) -> None:
    gradients = []
    for recompute in (False, True):
        gfdm.train().zero_grad()
        gfdm.set_recompute(recompute)
        gfdm(clips(1), generators(1))["loss"].backward()
        gradients.append([p.grad.clone() for p in gfdm.parameters() if p.grad is not None])
    assert len(gradients[0]) > 50
    assert all(torch.allclose(plain, again, atol=1e-6) for plain, again in zip(*gradients, strict=True))


def test_only_the_unet_trains() -> None:
    model = GFDM(presets.gfdm("nano"))
    assert {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad} == {"unet"}


def test_pictures_of_another_size_are_refused_with_both_sizes(gfdm: GFDM) -> None:
    with pytest.raises(ValueError, match=r"32, 32.*64, 64"):
        gfdm({"frames": torch.zeros(1, 4, 32, 32, 3, dtype=torch.uint8), "text": ["x"]})


def test_the_loss_in_bf16_is_close_to_that_in_float32(gfdm: GFDM) -> None:
    exact = gfdm(clips(2), generators(2))["loss"]
    rounded = gfdm.to(torch.bfloat16)(clips(2), generators(2))["loss"]
    assert rounded.dtype == torch.float32
    assert torch.allclose(exact, rounded, rtol=0.05)
