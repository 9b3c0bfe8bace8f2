from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import SpatioTemporalResBlock
from diffusers.models.transformers.transformer_temporal import TransformerSpatioTemporalModel
from diffusers.models.upsampling import Upsample2D

from defi_models.cost.operations import Operations
from defi_models.layers import unet_blocks

FRAMES, SAMPLES, CHANNELS = 3, 4, 32
INDICATOR = torch.zeros(SAMPLES, FRAMES)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def texts(rows: int) -> torch.Tensor:
    return torch.randn(rows, 5, 24)


def flops(run: Any) -> int:
    with torch.no_grad(), Operations() as seen:
        run()
    return seen.flops


def test_four_small_convolutions_are_the_upsampled_one_for_less_than_half_of_the_work() -> None:
    block = Upsample2D(CHANNELS, use_conv=True, out_channels=CHANNELS)
    x = torch.randn(2, CHANNELS, 4, 6)
    assert torch.allclose(unet_blocks.upsampling(block, x, None), block(x), atol=1e-5)
    assert flops(lambda: unet_blocks.upsampling(block, x, None)) * 9 == flops(lambda: block(x)) * 4


def test_an_upsampling_to_an_odd_size_is_the_block_s_own() -> None:
    block = Upsample2D(CHANNELS, use_conv=True, out_channels=CHANNELS)
    x = torch.randn(2, CHANNELS, 4, 6)
    assert torch.equal(unet_blocks.upsampling(block, x, (7, 11)), block(x, (7, 11)))


def test_a_text_that_views_and_frames_share_is_read_once() -> None:
    attention = Attention(query_dim=CHANNELS, cross_attention_dim=24, heads=2, dim_head=16)
    x, text = torch.randn(SAMPLES * FRAMES, 40, CHANNELS), texts(2)
    repeated = text.repeat_interleave(len(x) // 2, 0)
    ours = unet_blocks.text_attention(attention, x, text)
    assert torch.allclose(ours, attention(x, repeated), atol=1e-5)
    reading = 2 * 2 * len(repeated[0]) * 24 * CHANNELS  # keys and values of one text
    assert flops(lambda: attention(x, repeated)) > reading * len(x)
    folding = 2 * 2 * 2 * len(text[0]) * CHANNELS * CHANNELS
    attending = 2 * 2 * x.shape[0] * x.shape[1] * CHANNELS * 2 * len(text[0])
    assert flops(lambda: unet_blocks.text_attention(attention, x, text)) == 2 * reading + folding + attending


def test_gradients_of_a_folded_text_are_those_of_the_attention() -> None:
    attention = Attention(query_dim=CHANNELS, cross_attention_dim=24, heads=2, dim_head=16)
    x, text = torch.randn(6, 7, CHANNELS), texts(2)
    found = []
    for run in (
        lambda: unet_blocks.text_attention(attention, x, text),
        lambda: attention(x, text.repeat_interleave(3, 0)),
    ):
        attention.zero_grad()
        run().square().mean().backward()
        found.append([parameter.grad.clone() for parameter in attention.parameters()])
    assert all(torch.allclose(ours, theirs, atol=1e-5) for ours, theirs in zip(*found, strict=True))


def test_a_resnet_with_one_noise_level_is_that_with_the_level_of_every_frame() -> None:
    block = SpatioTemporalResBlock(CHANNELS, 2 * CHANNELS, temb_channels=20)
    torch.nn.init.constant_(block.time_mixer.mix_factor, 0.3)
    x, level = torch.randn(SAMPLES * FRAMES, CHANNELS, 4, 4), torch.randn(1, 20)
    theirs = block(x, level.expand(len(x), -1), INDICATOR)
    ours = unet_blocks.resnet(block, x, torch.nn.functional.silu(level), FRAMES)
    assert torch.allclose(ours, theirs, atol=1e-5)


def test_a_transformer_is_diffusers_own() -> None:
    block = TransformerSpatioTemporalModel(2, 16, in_channels=CHANNELS, cross_attention_dim=24)
    torch.nn.init.constant_(block.time_mixer.mix_factor, -0.4)
    x, text = torch.randn(SAMPLES * FRAMES, CHANNELS, 4, 6), texts(2)
    repeated = text.repeat_interleave(len(x) // 2, 0)
    theirs = block(x, repeated, INDICATOR, return_dict=False)[0]
    assert torch.allclose(unet_blocks.transformer(block, x, text, FRAMES), theirs, atol=1e-5)
