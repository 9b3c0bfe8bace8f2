"""Named sizes: nano (no downloads, two CPU cores), small (one 24 GB GPU), paper (the published ones)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from defi_models.encoders.block_dct import BlockDctCodec, BlockDctPatches
from defi_models.encoders.hashed_text import HashedText
from defi_models.errors import ConfigurationError, did_you_mean
from defi_models.gfdm import GFDM
from defi_models.gidm import GIDM, FeatureDecoder
from defi_models.inputs.augmentation import Augmentation
from defi_models.layers.action_head import ActionHead
from defi_models.layers.adapter import PolicyAdapter
from defi_models.layers.codebook import Codebook
from defi_models.layers.latent_actions import LatentActionEncoder
from defi_models.layers.video_former import VideoFormer
from defi_models.layers.video_unet import SchedulerConfig, UNetConfig
from defi_models.policy import DeFIPolicy
from defi_models.pretrained.configuration import override

Config = TypeVar("Config")

_SHORT_RUNS = 0.02
"""Standard deviation of fresh embeddings in nano and small, whose runs are a thousandth as long: at the published 1 the
features would be a whisper beside them. Their heads start as PyTorch starts linear layers, for the same reason."""


def gfdm(preset: str, **overrides: Any) -> GFDM.Config:
    """A GFDM config.

    Args:
        preset: nano, small or paper.
        overrides: values of its fields; nested parts as nested mappings.

    Returns:
        The config.

    Raises:
        ConfigurationError: Naming the nearest preset or field.
    """
    return _preset(
        "gfdm", {"nano": _nano_gfdm, "small": _small_gfdm, "paper": _paper_gfdm}, preset, overrides
    )


def gidm(preset: str, **overrides: Any) -> GIDM.Config:
    """A GIDM config; see `gfdm`."""
    return _preset(
        "gidm", {"nano": _nano_gidm, "small": _small_gidm, "paper": _paper_gidm}, preset, overrides
    )


def policy(preset: str, **overrides: Any) -> DeFIPolicy.Config:
    """A policy config; see `gfdm`."""
    return _preset(
        "policy", {"nano": _nano_policy, "small": _small_policy, "paper": _paper_policy}, preset, overrides
    )


def _preset(
    kind: str, known: dict[str, Callable[[], Config]], name: str, overrides: dict[str, Any]
) -> Config:
    if name not in known:
        raise ConfigurationError(f"there is no {kind} preset '{name}'.{did_you_mean(name, sorted(known))}")
    return override(known[name](), {"preset": name} | overrides, kind)


def _nano_gfdm() -> GFDM.Config:
    return GFDM.Config(
        height=64,
        width=64,
        frames=8,
        codec=BlockDctCodec.Config(),
        text=HashedText.Config(dim=32, max_tokens=12, goal_dim=64),
        unet=UNetConfig(
            block_out_channels=(32, 64),
            layers_per_block=1,
            num_attention_heads=(2, 2),
            addition_time_embed_dim=32,
            attention_down_blocks=(True, False),
            sample_size=8,
        ),
        # the first step's noise level must be one that a short training meets: 20, not SVD's 700
        scheduler=SchedulerConfig(sigma_max=20.0),
        fps=7.0,
        feature_fps=7.0,
    )


def _nano_gidm() -> GIDM.Config:
    return GIDM.Config(
        patches=BlockDctPatches.Config(),
        text=HashedText.Config(dim=32, max_tokens=12, goal_dim=64),
        encoder=LatentActionEncoder.Config(
            dim=96, blocks=2, heads=4, dropout=0.0, latent_dim=16, tokens=4, codebook=Codebook.Config(size=16)
        ),
        decoder=FeatureDecoder.Config(blocks=2, heads=4, dropout=0.0),
    )


def _nano_policy() -> DeFIPolicy.Config:
    gidm_config = _nano_gidm()
    return DeFIPolicy.Config(
        views=1,
        gfdm=_nano_gfdm(),
        gidm_text=gidm_config.text,
        patch_dim=gidm_config.patches.dim,
        adapter=PolicyAdapter.Config(
            frame_pair=(0, 3),
            embedding_std=_SHORT_RUNS,
            latent_actions=gidm_config.encoder,
            video_former=VideoFormer.Config(
                dim=96,
                depth=2,
                heads=4,
                head_dim=24,
                frames=8,
                queries_per_frame=8,
                embedding_std=_SHORT_RUNS,
                spatial_positions=True,
            ),
            head=ActionHead.Config(
                action_dim=4,
                chunk=10,
                proprio_dim=4,
                dim=128,
                heads=4,
                context_blocks=2,
                action_blocks=3,
                attention_dropout=0.0,
                residual_dropout=0.0,
                mlp_dropout=0.0,
                weight_std=None,
                action_positions=True,
            ),
        ),
        normalization="min_max",
    )


def _small_gfdm() -> GFDM.Config:
    return GFDM.Config(
        height=128,
        width=128,
        frames=16,
        codec=BlockDctCodec.Config(block=8, luma=12, chroma=4),
        text=HashedText.Config(dim=256, max_tokens=20, goal_dim=512),
        unet=UNetConfig(
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            num_attention_heads=(2, 4, 8, 8),
            addition_time_embed_dim=128,
            sample_size=16,
        ),
        scheduler=SchedulerConfig(sigma_max=80.0),
        feature_blocks=(1, 2),
    )


def _small_gidm() -> GIDM.Config:
    return GIDM.Config(
        patches=BlockDctPatches.Config(block=8, luma=36, chroma=10),
        text=HashedText.Config(dim=256, max_tokens=20, goal_dim=512),
        encoder=LatentActionEncoder.Config(dim=512, blocks=8, heads=8, latent_dim=128),
        decoder=FeatureDecoder.Config(blocks=8, heads=8),
        augmentation=Augmentation(),
    )


def _small_policy() -> DeFIPolicy.Config:
    gidm_config = _small_gidm()
    return DeFIPolicy.Config(
        gfdm=_small_gfdm(),
        gidm_text=gidm_config.text,
        patch_dim=gidm_config.patches.dim,
        adapter=PolicyAdapter.Config(
            embedding_std=_SHORT_RUNS,
            latent_actions=gidm_config.encoder,
            video_former=VideoFormer.Config(
                dim=384, depth=4, heads=8, head_dim=48, embedding_std=_SHORT_RUNS, spatial_positions=True
            ),
            head=ActionHead.Config(attention_dropout=0.1, weight_std=None, action_positions=True),
        ),
        normalization="min_max",
    )


def _paper_gfdm() -> GFDM.Config:
    return GFDM.Config()


def _paper_gidm() -> GIDM.Config:
    return GIDM.Config(augmentation=Augmentation())


def _paper_policy() -> DeFIPolicy.Config:
    # The released weights were trained with the causal cross-attention and need it. The tiled text mask is
    # off: at the batch of one that the release was evaluated with, it changes nothing.
    return DeFIPolicy.Config(
        adapter=PolicyAdapter.Config(head=ActionHead.Config(causal_cross_attention=True))
    )
