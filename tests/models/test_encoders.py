from __future__ import annotations

import os
import subprocess
import sys

import torch
from model_samples import pixels

from defi_models.encoders.block_dct import BlockDctCodec, BlockDctPatches
from defi_models.encoders.hashed_text import HashedText
from defi_models.precision import to_signed_unit, to_uint8


def test_a_codec_that_keeps_every_coefficient_loses_nothing() -> None:
    codec = BlockDctCodec(BlockDctCodec.Config(block=4, luma=16, chroma=16))
    frames = torch.randint(0, 256, (2, 3, 64, 64, 3), dtype=torch.uint8)
    latents = codec.encode(to_signed_unit(frames.flatten(0, 1))).unflatten(0, (2, 3))
    assert torch.equal(codec.decode(latents), frames)


def test_the_nano_codec_decodes_smooth_pictures_to_within_a_few_grey_levels() -> None:
    codec = BlockDctCodec(BlockDctCodec.Config())
    frames = pixels(1, 2)
    latents = codec.encode(to_signed_unit(frames[0]))
    error = (codec.decode(latents[None]).float() - frames.float()).abs().mean()
    assert latents.shape == (2, 16, 8, 8) and error < 4


def test_pixels_survive_the_way_to_floats_and_back() -> None:
    every = torch.arange(256, dtype=torch.uint8).repeat(3).view(1, 16, 16, 3)
    assert torch.equal(to_uint8(to_signed_unit(every)), every)


def test_patch_features_are_one_row_per_block_in_row_major_order() -> None:
    patches = BlockDctPatches(BlockDctPatches.Config())
    picture = torch.zeros(1, 64, 64, 3, dtype=torch.uint8)
    picture[0, 8:16, 16:24] = 255  # block row 1, column 2
    features = patches(picture)
    differing = (features[0] - features[0, 0]).abs().sum(-1).nonzero().flatten()
    assert features.shape == (1, 64, 36) and differing.tolist() == [1 * 8 + 2]


def test_a_module_cast_to_bf16_keeps_its_constants_in_float32() -> None:
    codec = BlockDctCodec(BlockDctCodec.Config())
    before = codec.encode_kernel.clone()
    codec.to(torch.bfloat16)
    assert codec.encode_kernel.dtype == torch.float32 and torch.equal(codec.encode_kernel, before)


def test_hashed_text_is_the_same_in_a_process_with_another_hash_seed() -> None:
    program = (
        "from defi_models.encoders.hashed_text import HashedText\n"
        "encoder = HashedText(HashedText.Config())\n"
        "print(encoder.states(['open the drawer']).states.double().sum().item(),"
        " encoder.goal(['open the drawer'])[0, :5].tolist())"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", program],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1


def test_hashed_text_tells_instructions_apart_and_related_words_alike() -> None:
    encoder = HashedText(HashedText.Config())
    goals = encoder.goal(["open the drawer", "close the drawer", "drawer open the"])
    states = encoder.states(["open", "opened", "window"]).states[:, 0]
    similarity = torch.nn.functional.cosine_similarity
    assert len({tuple(goal.tolist()) for goal in goals}) == 3
    assert similarity(states[0], states[1], dim=0) > similarity(states[0], states[2], dim=0) + 0.2


def test_hashed_text_masks_padding_and_holds_an_empty_text() -> None:
    encoded = HashedText(HashedText.Config(max_tokens=4)).states(["press the button", "", "a b c d e f"])
    assert encoded.mask.sum(1).tolist() == [3, 0, 4]
    assert encoded.states[1].abs().sum() == 0 and encoded.states[0, 3].abs().sum() == 0
