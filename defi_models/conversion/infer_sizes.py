"""Sizes of a released checkpoint, inferred from its tensors; what shapes do not show comes from its notes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from defi_models.errors import ModelFolderError
from defi_models.gidm import FeatureDecoder
from defi_models.layers.action_head import ActionHead
from defi_models.layers.adapter import PolicyAdapter
from defi_models.layers.codebook import Codebook
from defi_models.layers.latent_actions import LatentActionEncoder
from defi_models.layers.video_former import VideoFormer

Notes = Mapping[str, Any]
"""Configuration that travels with a checkpoint; its names are the reference's."""

_PAPER_HEAD_DIM = 64
_PAPER_HEADS = 8
_PAPER_CHUNK = 10


@dataclass(frozen=True)
class GidmSizes:
    """Sizes of a released GIDM."""

    encoder: LatentActionEncoder.Config
    """Sizes of the encoder."""
    decoder: FeatureDecoder.Config
    """Sizes of the decoder."""
    patch_dim: int
    """Width of the patch features."""
    text_dim: int
    """Width of the token states."""


@dataclass(frozen=True)
class PolicySizes:
    """Sizes of a released policy."""

    adapter: PolicyAdapter.Config
    """Sizes of projector, GIDM encoder, Video-Former and action head."""
    feature_dim: int
    """Channels of GFDM's features."""
    patch_dim: int
    """Width of the patch features that GIDM was pretrained on."""
    text_dim: int
    """Width of GIDM's token states."""
    goal_dim: int
    """Width of the goal vector."""

    def build(self) -> PolicyAdapter:
        """The adapter with random weights."""
        return PolicyAdapter(
            self.adapter,
            feature_dim=self.feature_dim,
            tokens_per_frame=0,  # released Video-Formers have no positions to size
            patch_dim=self.patch_dim,
            text_dim=self.text_dim,
            goal_dim=self.goal_dim,
        )


def gidm_sizes(tensors: Mapping[str, Tensor], notes: Notes) -> GidmSizes:
    """Sizes of a latent action model.

    Args:
        tensors: its state dict under the released names.
        notes: its configuration, which may be empty.

    Returns:
        The configs and widths.

    Raises:
        ModelFolderError: Naming the first tensor that is missing.
    """
    encoder = _latent_actions(tensors, "", notes)
    decoder = FeatureDecoder.Config(
        blocks=_count(tensors, r"decoder\.transformer_blocks\.(\d+)\."), heads=encoder.heads
    )
    patch_dim, text_dim = _shape(tensors, "patch_up.weight")[1], _shape(tensors, "lang_proj.weight")[1]
    return GidmSizes(encoder, decoder, patch_dim, text_dim)


def policy_sizes(tensors: Mapping[str, Tensor], notes: Notes) -> PolicySizes:
    """Sizes of a fused policy.

    Args:
        tensors: its state dict under the released names.
        notes: sections `video_former`, `gidm`, `denoiser` and `sampler`, each of which may be missing.

    Returns:
        The configs and widths.

    Raises:
        ModelFolderError: Naming the first tensor that is missing.
    """
    frames, queries, width = _shape(tensors, "Video_Former.latents")
    inner = _shape(tensors, "Video_Former.layers.0.0.to_q.weight")[0]
    former_heads = notes.get("video_former", {}).get("heads", _PAPER_HEADS)
    head_notes, sampler = notes.get("denoiser", {}), notes.get("sampler", {})
    model = "model.inner_model."
    dim, action_dim = _shape(tensors, f"{model}action_emb.weight")
    chunk = _PAPER_CHUNK
    if f"{model}pos_emb" in tensors:
        chunk = tensors[f"{model}pos_emb"].shape[1] - 1 - frames * queries
    head = ActionHead.Config(
        action_dim=action_dim,
        chunk=head_notes.get("action_seq_len", chunk),
        dim=dim,
        heads=head_notes.get("n_heads", _PAPER_HEADS),
        context_blocks=_count(tensors, r"model\.inner_model\.encoder\.blocks\.(\d+)\."),
        action_blocks=_count(tensors, r"model\.inner_model\.decoder\.blocks\.(\d+)\."),
        sigma_data=head_notes.get("sigma_data", 0.5),
        sigma_min=sampler.get("sigma_min", 0.001),
        sigma_max=sampler.get("sigma_max", 80.0),
        sampling_steps=sampler.get("steps", 10),
        causal_cross_attention=True,
    )
    former = VideoFormer.Config(
        dim=width,
        depth=_count(tensors, r"Video_Former\.layers\.(\d+)\."),
        heads=former_heads,
        head_dim=inner // former_heads,
        frames=frames,
        queries_per_frame=queries,
    )
    latent_actions = _latent_actions(tensors, "lam.", notes.get("gidm", {}))
    last = max(PolicyAdapter.Config().frame_pair)
    if frames <= last:
        raise ModelFolderError(
            f"the checkpoint's clips have {frames} frames; GIDM reads frame {last} of them."
        )
    return PolicySizes(
        PolicyAdapter.Config(latent_actions=latent_actions, video_former=former, head=head),
        feature_dim=_shape(tensors, "goal_emb.0.weight")[1],
        patch_dim=_shape(tensors, "goal_emb.2.weight")[0],
        text_dim=_shape(tensors, "lam.lang_proj.weight")[1],
        goal_dim=_shape(tensors, f"{model}lang_emb.0.weight")[1],
    )


def _latent_actions(tensors: Mapping[str, Tensor], prefix: str, notes: Notes) -> LatentActionEncoder.Config:
    latent_dim, dim = _shape(tensors, f"{prefix}to_codebook.weight")
    pattern = re.escape(prefix) + r"encoder\.transformer_blocks\.(\d+)\."
    return LatentActionEncoder.Config(
        dim=dim,
        blocks=_count(tensors, pattern),
        heads=notes.get("num_heads", max(1, dim // _PAPER_HEAD_DIM)),
        latent_dim=latent_dim,
        tokens=_shape(tensors, f"{prefix}action_latent")[2],
        codebook=Codebook.Config(
            size=_shape(tensors, f"{prefix}vq.codebook.weight")[0],
            commitment_weight=notes.get("vq_beta", 0.25),
        ),
    )


def _shape(tensors: Mapping[str, Tensor], name: str) -> tuple[int, ...]:
    if name not in tensors:
        raise ModelFolderError(f"the checkpoint has no '{name}', from which a size is read.")
    return tuple(tensors[name].shape)


def _count(tensors: Mapping[str, Tensor], pattern: str) -> int:
    """Number of blocks: one more than the highest number that `pattern` finds."""
    found = [int(match.group(1)) for name in tensors if (match := re.match(pattern, name))]
    if not found:
        raise ModelFolderError(f"the checkpoint has no tensor that matches {pattern}.")
    return max(found) + 1
