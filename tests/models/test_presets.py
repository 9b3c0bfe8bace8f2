from __future__ import annotations

import pytest
import torch

from defi_models import presets
from defi_models.encoders.vae import VaeCodec
from defi_models.errors import ConfigurationError
from defi_models.gfdm import GFDM
from defi_models.policy import DeFIPolicy
from defi_models.pretrained.configuration import from_mapping, to_mapping


@pytest.mark.parametrize("preset", ["nano", "small", "paper"])
@pytest.mark.parametrize("kind", ["gfdm", "gidm", "policy"])
def test_a_config_survives_the_way_to_plain_mappings_and_back(kind: str, preset: str) -> None:
    config = getattr(presets, kind)(preset)
    assert from_mapping(type(config), to_mapping(config)) == config


def test_nested_overrides_change_what_they_name_and_nothing_else() -> None:
    config = presets.policy("nano", adapter={"head": {"chunk": 16}}, cameras=["front"])
    plain = presets.policy("nano")
    assert config.adapter.head.chunk == 16 and config.cameras == ("front",)
    assert config.adapter.video_former == plain.adapter.video_former
    assert config.adapter.head.dim == plain.adapter.head.dim


def test_changing_the_kind_of_a_part_starts_from_that_kinds_defaults() -> None:
    config = presets.gfdm("nano", codec={"kind": "vae", "block_out_channels": [32, 32]})
    assert config.codec == VaeCodec.Config(block_out_channels=(32, 32))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nanoo", {}), "no gfdm preset 'nanoo'. Did you mean 'nano'"),
        (("nano", {"frame": 4}), "no field 'frame'. Did you mean 'frames'"),
        (
            ("nano", {"unet": {"layers": 2}}),
            "gfdm.unet has no field 'layers'. Did you mean 'layers_per_block'",
        ),
        (("nano", {"frames": "many"}), "gfdm.frames: int is expected, 'many' was given"),
        (("nano", {"codec": {"kind": "block_dst"}}), "there is no 'block_dst'. Did you mean 'block_dct'"),
        (("nano", {"codec": 3}), "gfdm.codec: a mapping of fields is expected"),
        (("nano", {"feature_blocks": 1}), "gfdm.feature_blocks: a list is expected"),
    ],
)
def test_a_wrong_override_names_the_place_and_the_nearest(arguments, message: str) -> None:
    preset, overrides = arguments
    with pytest.raises(ConfigurationError, match=message):
        presets.gfdm(preset, **overrides)


def test_the_papers_unet_has_exactly_the_published_size() -> None:
    with torch.device("meta"):
        model = GFDM(presets.gfdm("paper"))
    assert sum(p.numel() for p in model.unet.parameters()) == 1_524_623_082


def test_the_papers_features_have_the_published_shape() -> None:
    config = presets.gfdm("paper")
    assert config.feature_dim == 2560 and config.feature_size == (16, 16) and config.latent_size == (32, 32)


def test_parts_that_do_not_fit_together_are_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"video_former\.frames is 6, but GFDM predicts 8"):
        DeFIPolicy(presets.policy("nano", adapter={"video_former": {"frames": 6}}))
    with pytest.raises(ConfigurationError, match="lies outside a clip of 8"):
        DeFIPolicy(presets.policy("nano", adapter={"frame_pair": [0, 9]}))
    with pytest.raises(ConfigurationError, match="up-block 7; the UNet has 2"):
        GFDM(presets.gfdm("nano", feature_blocks=[7]))
    with pytest.raises(ConfigurationError, match="cameras names 2"):
        DeFIPolicy(presets.policy("nano", cameras=["a", "b"]))
