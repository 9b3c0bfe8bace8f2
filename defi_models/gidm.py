"""GIDM, the general inverse dynamics model: what happened between two frames, as latent action tokens."""

# B batch, L patches, K latent action tokens, S text tokens, D width

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from defi_models.encoders.block_dct import BlockDctPatches
from defi_models.encoders.dino import DinoPatches
from defi_models.encoders.hashed_text import HashedText
from defi_models.encoders.t5_text import T5Text
from defi_models.encoders.text_cache import TextStates
from defi_models.inputs.augmentation import Augmentation
from defi_models.layers.activation_checkpointing import run, set_recompute
from defi_models.layers.codebook import Codebook
from defi_models.layers.latent_actions import LatentActionEncoder, LatentActions
from defi_models.layers.spacetime import SpaceBlock, Stem
from defi_models.pretrained.folder import ModelFolder
from defi_models.rng import Generators


class FeatureDecoder(nn.Module):
    """Patch features of the later frame from those of the earlier one and the latent action tokens."""

    @dataclass(kw_only=True, frozen=True)
    class Config:
        blocks: int = 12
        heads: int = 12
        dropout: float = 0.1

    def __init__(self, config: Config, dim: int, feature_dim: int) -> None:
        super().__init__()
        self.recompute = False
        self.patch_projection = nn.Linear(feature_dim, dim)
        self.stem = Stem(dim, dim)
        self.blocks = nn.ModuleList(
            SpaceBlock(dim, config.heads, config.dropout) for _ in range(config.blocks)
        )
        self.out = nn.Linear(dim, feature_dim)

    def forward(self, first: Tensor, actions: Tensor, words: Tensor, text_mask: Tensor) -> Tensor:
        """first (B, L, feature_dim), actions (B, K, D), words (B, S, D), text_mask bool (B, S)."""
        tokens = self.stem(torch.cat([actions, self.patch_projection(first)], dim=1))
        x = torch.cat([tokens, words], dim=1)
        key_mask = torch.cat([text_mask.new_ones(tokens.shape[:2]), text_mask], dim=1)
        for block in self.blocks:
            x = run(block, x, key_mask, recompute=self.recompute)
        kept = actions.shape[1]
        return self.out(x[:, kept : kept + first.shape[1]])


class Reconstruction(NamedTuple):
    """What the training loss is made of."""

    loss: Tensor
    reconstruction_loss: Tensor
    predicted: Tensor
    """(B, L, feature_dim) patch features of the later frame."""
    actions: LatentActions


class GIDM(ModelFolder, nn.Module):
    """Two frames about a second apart and a text -> latent action tokens, trained on video alone.

    Source: arXiv 2604.16391, section 3.2 and the released latent action model.
    """

    kind = "gidm"

    @dataclass(kw_only=True, frozen=True)
    class Config:
        preset: str = "custom"
        patches: DinoPatches.Config | BlockDctPatches.Config = field(default_factory=DinoPatches.Config)
        text: T5Text.Config | HashedText.Config = field(default_factory=T5Text.Config)
        encoder: LatentActionEncoder.Config = field(default_factory=LatentActionEncoder.Config)
        decoder: FeatureDecoder.Config = field(default_factory=FeatureDecoder.Config)
        augmentation: Augmentation | None = None
        """Of the frames in training; it needs frames, not features that were encoded ahead."""

    def __init__(
        self,
        config: Config,
        *,
        patch_encoder: DinoPatches | BlockDctPatches | None = None,
        text_encoder: T5Text | HashedText | None = None,
    ) -> None:
        """Builds what is not given from `config`, with random weights."""
        super().__init__()
        self.config = config
        self.patch_encoder = patch_encoder or build_patches(config.patches)
        self.text_encoder = text_encoder or build_gidm_text(config.text)
        self.encoder = LatentActionEncoder(config.encoder, config.patches.dim, config.text.dim)
        self.decoder = FeatureDecoder(config.decoder, config.encoder.dim, config.patches.dim)

    @property
    def codebook(self) -> Codebook | None:
        """None where the latent is continuous."""
        return self.encoder.codebook

    def forward(self, batch: Mapping[str, Any], generator: Generators = None) -> dict[str, Tensor]:
        """Training loss of a batch.

        Args:
            batch: `frames` uint8 (B, 2, H, W, 3), or `features` (B, 2, L, feature_dim); `text` list of B.
            generator: see `draws`; in training each sample draws its augmentation, where there is one.
        Returns: `loss`, its parts, `copy_loss` (the error of predicting that nothing changes) and
            `indices` (B, K) where there is a codebook.
        Raises: ValueError when features are given in training though the config asks for augmentation.
        """
        features = self._features(batch, generator)
        text = self.encode_text(batch["text"])
        result = self.loss(features, text.states, text.mask)
        found = {
            "loss": result.loss,
            "reconstruction_loss": result.reconstruction_loss.detach(),
            "codebook_loss": result.actions.codebook_loss.detach(),
            "commitment_loss": result.actions.commitment_loss.detach(),
            "copy_loss": F.mse_loss(features[:, 0].float(), features[:, 1].float()).detach(),
        }
        return found if result.actions.indices is None else found | {"indices": result.actions.indices}

    def set_recompute(self, enabled: bool) -> None:
        """Gradient checkpointing: less memory, one more forward pass."""
        set_recompute(self, enabled)

    def compile_parts(self, **options: Any) -> None:
        """`torch.compile` of the encoder and the decoder, in place; options as torch.compile takes them."""
        self.encoder.compile_blocks(**options)
        self.decoder.compile(**options)

    def loss(self, features: Tensor, text: Tensor, text_mask: Tensor) -> Reconstruction:
        """mse(reconstruction, later frame) + codebook loss + 0.25 * commitment loss.

        Args:
            features: (B, 2, L, feature_dim) frozen patch features.
            text: (B, S, text_dim) frozen token states; text_mask bool (B, S).
        """
        target = features[:, 1].float()
        features, text = features.to(self.dtype), text.to(self.dtype)
        actions = self.encoder(features, text, text_mask)
        words = self.encoder.text_projection(text)
        predicted = self.decoder(features[:, 0], self.encoder.embed(actions.tokens), words, text_mask)
        error = F.mse_loss(predicted.float(), target)
        return Reconstruction(error + actions.vq_loss, error, predicted, actions)

    def encode(self, frames: Tensor, text: Sequence[str]) -> LatentActions:
        """uint8 (B, 2, H, W, 3) and B texts -> latent action tokens and indices, to label video."""
        states = self.encode_text(text)
        features = self.encode_patches(frames).to(self.dtype)
        return self.encoder(features, states.states.to(self.dtype), states.mask)

    def _features(self, batch: Mapping[str, Any], generator: Generators) -> Tensor:
        augmentation = self.config.augmentation if self.training else None
        if "features" not in batch:
            frames = batch["frames"].to(self.device)
            return self.encode_patches(augmentation(frames, generator) if augmentation else frames)
        if augmentation:
            raise ValueError(
                "this GIDM augments its training frames, which features that were encoded ahead do not allow. "
                "Train from frames, or set the model's augmentation to null."
            )
        features: Tensor = batch["features"]
        return features

    @torch.no_grad()
    def encode_patches(self, frames: Tensor) -> Tensor:
        """uint8 (B, T, H, W, 3) -> patch features (B, T, L, feature_dim)."""
        flat = frames.to(self.device).flatten(0, 1)
        return self.patch_encoder(flat).unflatten(0, frames.shape[:2])

    def encode_text(self, text: Sequence[str]) -> TextStates:
        """list of B strings -> states (B, S, text_dim) and mask (B, S)."""
        return self.text_encoder.states(text)

    @property
    def dtype(self) -> torch.dtype:
        """Of the layers that train."""
        return self.encoder.queries.dtype

    @property
    def device(self) -> torch.device:
        return self.encoder.queries.device


def build_patches(config: DinoPatches.Config | BlockDctPatches.Config) -> DinoPatches | BlockDctPatches:
    """The frozen patch encoder, with random weights where it has any."""
    return DinoPatches(config) if isinstance(config, DinoPatches.Config) else BlockDctPatches(config)


def build_gidm_text(config: T5Text.Config | HashedText.Config) -> T5Text | HashedText:
    """The frozen text encoder of GIDM, which the policy carries too."""
    return T5Text(config) if isinstance(config, T5Text.Config) else HashedText(config)


InverseDynamics = GIDM
"""Former name, which folders exported before 0.2 name in their README."""
