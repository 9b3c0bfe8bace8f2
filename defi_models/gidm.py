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
from defi_models.errors import InputError
from defi_models.inputs.augmentation import Augmentation
from defi_models.inputs.checks import AtLeast, Size, check_tensor, check_texts, require
from defi_models.layers.activation_checkpointing import run, set_recompute
from defi_models.layers.codebook import Codebook
from defi_models.layers.latent_actions import LatentActionEncoder, LatentActions
from defi_models.layers.spacetime import SpaceBlock, Stem
from defi_models.pretrained.folder import ModelFolder
from defi_models.rng import Generators, check_generators


class FeatureDecoder(nn.Module):
    """Patch features of the later frame from those of the earlier one and the latent action tokens.

    Source: arXiv 2604.16391, section 3.2; used in pretraining only.
    """

    @dataclass(kw_only=True, frozen=True)
    class Config:
        """Sizes of the decoder; its width is the encoder's."""

        blocks: int = 12
        """Transformer blocks."""
        heads: int = 12
        """Attention heads."""
        dropout: float = 0.0
        """In the feed-forward layers; the release has none."""

    def __init__(self, config: Config, dim: int, feature_dim: int) -> None:
        super().__init__()
        self.recompute = False
        self.patch_projection = nn.Linear(feature_dim, dim)
        self.stem = Stem(dim, dim)
        self.blocks = nn.ModuleList(
            SpaceBlock(dim, config.heads, config.dropout) for _ in range(config.blocks)
        )
        self.out = nn.Linear(dim, feature_dim)

    def forward(self, first: Tensor, actions: Tensor, words: Tensor, text_mask: Tensor | None) -> Tensor:
        """Predicted patch features of the later frame.

        Args:
            first: (B, L, feature_dim) patch features of the earlier frame.
            actions: (B, K, D) latent action tokens.
            words: (B, S, D) projected text states.
            text_mask: bool (B, S), True = a token of the text; None where all are.

        Returns:
            (B, L, feature_dim).
        """
        tokens = self.stem(torch.cat([actions, self.patch_projection(first)], dim=1))
        x = torch.cat([tokens, words], dim=1)
        key_mask = text_mask
        if text_mask is not None:
            key_mask = torch.cat([text_mask.new_ones(tokens.shape[:2]), text_mask], dim=1)
        for block in self.blocks:
            x = run(block, x, key_mask, recompute=self.recompute)
        kept = actions.shape[1]
        predicted: Tensor = self.out(x[:, kept : kept + first.shape[1]])
        return predicted


class Reconstruction(NamedTuple):
    """The training loss and its parts."""

    loss: Tensor
    """Scalar: reconstruction loss plus the codebook's."""
    reconstruction_loss: Tensor
    """Scalar: mean squared error of the later frame's patch features."""
    predicted: Tensor
    """(B, L, feature_dim) patch features of the later frame."""
    actions: LatentActions
    """The latent actions between the frames."""


class GIDM(ModelFolder, nn.Module):
    """Two frames about a second apart and a text -> latent action tokens, trained on video alone.

    Every call raises an InputError for input of another type, dtype, shape or batch size; it names the key, what was
    expected and what was got.

    Source: arXiv 2604.16391, section 3.2 and the released latent action model.
    """

    kind = "gidm"
    cache_column = "features"
    """Batch entry that may hold the output of `encode_frames` in place of `frames`."""

    @dataclass(kw_only=True, frozen=True)
    class Config:
        """The parts; the defaults are the paper's."""

        preset: str = "custom"
        """Name of the preset that the config started from."""
        patches: DinoPatches.Config | BlockDctPatches.Config = field(default_factory=DinoPatches.Config)
        """Patch features, frozen."""
        text: T5Text.Config | HashedText.Config = field(default_factory=T5Text.Config)
        """Text encoder, frozen."""
        encoder: LatentActionEncoder.Config = field(default_factory=LatentActionEncoder.Config)
        """From two frames to latent action tokens."""
        decoder: FeatureDecoder.Config = field(default_factory=FeatureDecoder.Config)
        """From latent action tokens to the later frame."""
        augmentation: Augmentation | None = None
        """Of the frames in training; it needs frames, not features that were encoded ahead."""

    def __init__(
        self,
        config: Config,
        *,
        patch_encoder: DinoPatches | BlockDctPatches | None = None,
        text_encoder: T5Text | HashedText | None = None,
    ) -> None:
        """Builds the parts that are not given from `config`, with random weights."""
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
            batch: `frames` uint8 (B, 2, H, W, 3), or `features` float (B, 2, L, feature_dim); `text` list of B
                strings.
            generator: see `Generators`; in training each sample draws its augmentation, where there is one.

        Returns:
            `loss`, its parts, `copy_loss` (the error of predicting that nothing changes), all float32 scalars, and
            `indices` int64 (B, K) where there is a codebook.

        Raises:
            InputError: Also when features are given in training though the config asks for augmentation.
        """
        if isinstance(batch, Mapping) and "features" in batch:
            key, given = "features", batch["features"]
            check_tensor(key, given, ("B", 2, "L", self.config.patches.dim), None)
        else:
            key, given = "frames", require(batch, "frames", "uint8 (B, 2, H, W, 3), or features")
            check_tensor(key, given, self._frame_shape(2), torch.uint8)
        words = check_texts("text", require(batch, "text", "a list of B strings"), len(given), key)
        check_generators(generator, len(given))
        features = self._features(given, generator) if key == "frames" else self._given_features(given)
        text = self.text_encoder.states(words)
        result = self.loss(features, text.states, text.key_mask)
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

    def loss(self, features: Tensor, text: Tensor, text_mask: Tensor | None) -> Reconstruction:
        """mse(reconstruction, later frame) + codebook loss + 0.25 * commitment loss.

        Args:
            features: float (B, 2, L, feature_dim), frozen patch features.
            text: float (B, S, text_dim), frozen token states.
            text_mask: bool (B, S), True = a token of the text, False = padding; None where there is none.

        Returns:
            The loss and its parts.
        """
        check_tensor("features", features, ("B", 2, "L", self.config.patches.dim), None)
        check_tensor("text", text, (len(features), "S", self.config.text.dim), None)
        if text_mask is not None:
            check_tensor("text_mask", text_mask, tuple(text.shape[:2]), torch.bool)
        target = features[:, 1].float()
        features, text = features.to(self.dtype), text.to(self.dtype)
        actions: LatentActions = self.encoder(features, text, text_mask)
        words = self.encoder.text_projection(text)
        predicted = self.decoder(features[:, 0], self.encoder.embed(actions.tokens), words, text_mask)
        error = F.mse_loss(predicted.float(), target)
        return Reconstruction(error + actions.vq_loss, error, predicted, actions)

    def encode(self, frames: Tensor, text: Sequence[str]) -> LatentActions:
        """Latent actions of pairs of frames, to label video.

        Args:
            frames: uint8 (B, 2, H, W, 3), about a second apart.
            text: list of B strings; an empty string where a pair has none.

        Returns:
            Tokens (B, K, latent_dim) and, where there is a codebook, indices int64 (B, K).
        """
        check_tensor("frames", frames, self._frame_shape(2), torch.uint8)
        states = self.text_encoder.states(check_texts("text", text, len(frames), "frames"))
        features = self.encode_frames(frames).to(self.dtype)
        actions: LatentActions = self.encoder(features, states.states.to(self.dtype), states.key_mask)
        return actions

    @property
    def frozen_encoder(self) -> DinoPatches | BlockDctPatches:
        """The part behind `encode_frames`, whose output a cache may hold."""
        return self.patch_encoder

    @torch.no_grad()
    def encode_frames(self, frames: Tensor) -> Tensor:
        """Patch features of frames, uint8 (B, T, H, W, 3) -> float (B, T, L, feature_dim)."""
        check_tensor("frames", frames, self._frame_shape("T"), torch.uint8)
        flat = frames.to(self.device).flatten(0, 1)
        return torch.unflatten(self.patch_encoder(flat), 0, frames.shape[:2])

    def encode_text(self, text: Sequence[str]) -> TextStates:
        """Token states float (B, S, text_dim) and mask bool (B, S) of a list of B strings."""
        return self.text_encoder.states(check_texts("text", text))

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the layers that train."""
        return self.encoder.queries.dtype

    @property
    def device(self) -> torch.device:
        """Device of the layers that train."""
        return self.encoder.queries.device

    def _features(self, frames: Tensor, generator: Generators) -> Tensor:
        """Patch features of frames, which are augmented in training where the config says so."""
        augmentation = self.config.augmentation if self.training else None
        frames = frames.to(self.device)
        return self.encode_frames(augmentation(frames, generator) if augmentation else frames)

    def _given_features(self, features: Tensor) -> Tensor:
        if self.training and self.config.augmentation:
            raise InputError(
                "features: got features that were encoded ahead; expected frames, which this GIDM augments in "
                "training. Train from frames, or set the model's augmentation to null."
            )
        return features

    def _frame_shape(self, frames: Size) -> tuple[Size, ...]:
        """(B, T, H, W, 3); a picture holds at least one patch of encoders that do not resize it."""
        patches = self.config.patches
        least = patches.block if isinstance(patches, BlockDctPatches.Config) else 1
        return "B", frames, AtLeast("H", least), AtLeast("W", least), 3


def build_patches(config: DinoPatches.Config | BlockDctPatches.Config) -> DinoPatches | BlockDctPatches:
    """The frozen patch encoder, with random weights where it has any."""
    return DinoPatches(config) if isinstance(config, DinoPatches.Config) else BlockDctPatches(config)


def build_gidm_text(config: T5Text.Config | HashedText.Config) -> T5Text | HashedText:
    """The frozen text encoder of GIDM, which the policy carries too."""
    return T5Text(config) if isinstance(config, T5Text.Config) else HashedText(config)


InverseDynamics = GIDM
"""Former name, imported by the READMEs of older model folders."""
