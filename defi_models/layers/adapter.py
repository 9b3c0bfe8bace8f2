"""The policy downstream of GFDM's features: everything that stage II may train except GFDM itself."""

# B batch, V views, T frames, L tokens per view, C feature channels, K latent action tokens, D width

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from defi_models.errors import ConfigurationError
from defi_models.layers.action_head import ActionHead
from defi_models.layers.latent_actions import LatentActionEncoder, LatentActions
from defi_models.layers.video_former import VideoFormer


class FeatureProjector(nn.Module):
    """GFDM features of two frames of the first view, projected to GIDM's patch features."""

    def __init__(
        self, feature_dim: int, patch_dim: int, frame_pair: tuple[int, int], embedding_std: float
    ) -> None:
        super().__init__()
        self.frame_pair = frame_pair
        self.projection = nn.Sequential(
            nn.Linear(feature_dim, patch_dim), nn.GELU(), nn.Linear(patch_dim, patch_dim)
        )
        self.time_embedding = nn.Parameter(torch.randn(2, 1, patch_dim) * embedding_std)

    def forward(self, features: Tensor) -> Tensor:
        """Features (B, T, L, C) of the first view -> (B, 2, L, patch_dim)."""
        # not by a list of numbers, which would have to reach the device first
        pair = torch.stack([features[:, number] for number in self.frame_pair], dim=1)
        projected: Tensor = self.projection(pair)
        return projected + self.time_embedding


class Perception(NamedTuple):
    """The action head's condition."""

    video: Tensor
    """(B, T * Q, D) Video-Former tokens."""
    actions: LatentActions
    """Latent actions between the two frames of the predicted clip, with their losses."""
    motion: Tensor
    """(B, K, D_gidm) latent action tokens as the head reads them."""


class PolicyAdapter(nn.Module):
    """Projector, GIDM encoder, Video-Former and action head.

    Source: arXiv 2604.16391, section 3.3.
    """

    @dataclass(kw_only=True, frozen=True)
    class Config:
        """The parts; the defaults are the paper's."""

        frame_pair: tuple[int, int] = (0, 5)
        """Frames of the predicted clip that GIDM compares."""
        embedding_std: float = 1.0
        """Standard deviation of the fresh time embedding of these frames."""
        latent_actions: LatentActionEncoder.Config = field(default_factory=LatentActionEncoder.Config)
        """GIDM's encoder."""
        video_former: VideoFormer.Config = field(default_factory=VideoFormer.Config)
        """Resampler of the predicted clip."""
        head: ActionHead.Config = field(default_factory=ActionHead.Config)
        """Diffusion action head."""

    def __init__(
        self,
        config: Config,
        *,
        feature_dim: int,
        tokens_per_frame: int,
        patch_dim: int,
        text_dim: int,
        goal_dim: int,
    ) -> None:
        """Builds the parts with random weights.

        Args:
            config: sizes of the parts.
            feature_dim: channels of GFDM's features.
            tokens_per_frame: positions of a frame's features, of all views together.
            patch_dim: width of the patch features that GIDM was pretrained on.
            text_dim: width of the token states that GIDM was pretrained on.
            goal_dim: width of the goal vector.

        Raises:
            ConfigurationError: When `frame_pair` lies outside the clip.
        """
        super().__init__()
        if max(config.frame_pair) >= config.video_former.frames:
            raise ConfigurationError(
                f"frame_pair {config.frame_pair} lies outside a clip of {config.video_former.frames} frames."
            )
        self.config = config
        self.projector = FeatureProjector(feature_dim, patch_dim, config.frame_pair, config.embedding_std)
        self.latent_actions = LatentActionEncoder(config.latent_actions, patch_dim, text_dim)
        self.video_former = VideoFormer(
            config.video_former, feature_dim=feature_dim, tokens_per_frame=tokens_per_frame
        )
        self.head = ActionHead(config.head, config.video_former.dim, config.latent_actions.dim, goal_dim)

    def perceive(self, features: Tensor, text: Tensor, text_mask: Tensor | None) -> Perception:
        """Video and latent action tokens.

        Args:
            features: (B, V, T, L, C), GFDM's.
            text: (B, S, text_dim) token states of GIDM's text encoder.
            text_mask: bool (B, S), True = a token of the text; None where all are.

        Returns:
            The action head's condition.
        """
        video = self.video_former(features.transpose(1, 2).flatten(2, 3))  # views side by side on the tokens
        actions: LatentActions = self.latent_actions(self.projector(features[:, 0]), text, text_mask)
        return Perception(video, actions, self.latent_actions.embed(actions.tokens))

    def context(self, perception: Perception, goal: Tensor, proprio: Tensor | None) -> Tensor:
        """The action head's encoded context.

        Args:
            perception: as `perceive` returns it.
            goal: (B, goal_dim) text vector.
            proprio: (B, P), normalised, or None where the head reads none.

        Returns:
            (B, M, D).
        """
        return self.head.context(goal, perception.video, perception.motion, proprio)
