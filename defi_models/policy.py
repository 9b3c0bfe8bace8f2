"""The fused policy: GFDM's one-step prediction, GIDM's latent actions and a diffusion action head."""

# B batch, V views, T frames, L tokens per view, C feature channels, H actions of a chunk, A action dims

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from defi_models.encoders.hashed_text import HashedText
from defi_models.encoders.t5_text import T5Text
from defi_models.errors import ConfigurationError, ModelFolderError, did_you_mean
from defi_models.gfdm import GFDM
from defi_models.gidm import GIDM, build_gidm_text
from defi_models.inputs.normalization import FieldStatistics, Normalizer, Statistics
from defi_models.layers.activation_checkpointing import set_recompute
from defi_models.layers.adapter import Perception, PolicyAdapter
from defi_models.pretrained.folder import ModelFolder
from defi_models.rng import Generators, normal

TRAINABLE = ("adapter", "gidm+adapter", "gfdm+adapter", "all")
STATISTICS_FILE = "statistics.json"


class DeFIPolicy(ModelFolder, nn.Module):
    """Observation and instruction -> a chunk of actions in the robot's own units.

    Source: arXiv 2604.16391, section 3.3 and the released CALVIN configuration.
    """

    kind = "policy"

    @dataclass(kw_only=True, frozen=True)
    class Config:
        preset: str = "custom"
        views: int = 2
        """How many cameras; the first one is also what GIDM compares over time."""
        cameras: tuple[str, ...] = ()
        """Their names, in the order of the views; empty where nobody named them."""
        gfdm: GFDM.Config = field(default_factory=GFDM.Config)
        gidm_text: T5Text.Config | HashedText.Config = field(default_factory=T5Text.Config)
        patch_dim: int = 768
        """Width of the patch features that GIDM was pretrained on."""
        adapter: PolicyAdapter.Config = field(default_factory=PolicyAdapter.Config)
        normalization: str = "none"
        """mean_std | min_max | none, of actions and proprioception."""

    action_normalizer: Normalizer
    proprio_normalizer: Normalizer | None

    def __init__(self, config: Config) -> None:
        super().__init__()
        head = config.adapter.head
        if config.adapter.video_former.frames != config.gfdm.frames:
            raise ConfigurationError(
                f"adapter.video_former.frames is {config.adapter.video_former.frames}, but GFDM predicts "
                f"{config.gfdm.frames} frames; they must be equal."
            )
        if config.cameras and len(config.cameras) != config.views:
            raise ConfigurationError(
                f"cameras names {len(config.cameras)} ({', '.join(config.cameras)}), but views is {config.views}."
            )
        self.config = config
        self.gfdm = GFDM(config.gfdm)
        self.gidm_text = build_gidm_text(config.gidm_text)
        self.adapter = PolicyAdapter(
            config.adapter,
            feature_dim=config.gfdm.feature_dim,
            tokens_per_frame=config.views * config.gfdm.feature_size[0] * config.gfdm.feature_size[1],
            patch_dim=config.patch_dim,
            text_dim=config.gidm_text.dim,
            goal_dim=config.gfdm.text.goal_dim,
        )
        self.action_normalizer = Normalizer(head.action_dim, config.normalization)
        self.proprio_normalizer = (
            Normalizer(head.proprio_dim, config.normalization) if head.proprio_dim else None
        )
        self._statistics: Statistics | None = None
        self.trainable = "gidm+adapter"
        self.set_trainable(self.trainable)

    @classmethod
    def fuse(cls, config: Config, gfdm: GFDM, gidm: GIDM) -> Self:
        """A policy from two pretrained models; their own sizes take the place of those in `config`.

        Returns: a policy with copies of their weights and a fresh projector, Video-Former and head.
        """
        policy = cls(cls.fused_config(config, gfdm.config, gidm.config))
        policy.gfdm.load_state_dict(gfdm.state_dict())
        policy.gidm_text.load_state_dict(gidm.text_encoder.state_dict())
        policy.adapter.latent_actions.load_state_dict(gidm.encoder.state_dict())
        for own, given in (
            (policy.gfdm.text_encoder, gfdm.text_encoder),
            (policy.gidm_text, gidm.text_encoder),
        ):
            if hasattr(given, "tokenizer"):
                own.tokenizer = given.tokenizer
        return policy

    @staticmethod
    def fused_config(config: DeFIPolicy.Config, gfdm: GFDM.Config, gidm: GIDM.Config) -> DeFIPolicy.Config:
        """`config` with the sizes of two pretrained models in the place of its own."""
        former = replace(config.adapter.video_former, frames=gfdm.frames)
        adapter = replace(config.adapter, latent_actions=gidm.encoder, video_former=former)
        return replace(config, gfdm=gfdm, gidm_text=gidm.text, patch_dim=gidm.patches.dim, adapter=adapter)

    def set_statistics(self, statistics: Statistics) -> None:
        """Sets the normalisation of actions and proprioception; it is saved with the policy.

        Raises: ValueError when the dimensions are not the policy's or proprioception's are absent.
        """
        self.action_normalizer.set_statistics(statistics.action)
        if self.proprio_normalizer is not None:
            if statistics.proprio is None:
                raise ValueError("this policy reads proprioception, but the statistics have none.")
            self.proprio_normalizer.set_statistics(statistics.proprio)
        self._statistics = statistics

    def set_trainable(self, choice: str) -> None:
        """Chooses what trains: adapter (projector, Video-Former, head), with gidm, with gfdm's UNet, or all.

        Raises: ConfigurationError for another name.
        """
        if choice not in TRAINABLE:
            raise ConfigurationError(
                f"there is no trainable part '{choice}'.{did_you_mean(choice, TRAINABLE)}"
            )
        self.trainable = choice
        self.adapter.requires_grad_(True)
        self.adapter.latent_actions.requires_grad_(choice in ("gidm+adapter", "all"))
        self.gfdm.unet.requires_grad_(choice in ("gfdm+adapter", "all"))

    def forward(self, batch: Mapping[str, Any], generator: Generators = None) -> dict[str, Tensor]:
        """Training loss of a batch.

        Args:
            batch: `images` uint8 (B, V, H, W, 3); `actions` (B, H, A) raw units; `text` list of B strings;
                `proprio` (B, P) raw units where the policy reads it; optional `action_mask` bool (B, H),
                False = padding past the episode's end.
            generator: see `draws`; each sample draws GFDM's noise of all views, then the action noise level
                and noise.
        Returns: `loss` = action loss + codebook losses, and its parts.
        """
        perception, context = self._look(batch, generator)
        actions = self.action_normalizer.normalize(batch["actions"])
        sigma, noise = self.adapter.head.draw(len(actions), generator, actions.device)
        mask = batch.get("action_mask")
        mask = None if mask is None else mask.to(actions.device)
        action_loss, _ = self.adapter.head.loss(context, actions, mask, sigma=sigma, noise=noise)
        found = {
            "loss": action_loss + perception.actions.vq_loss,
            "action_loss": action_loss.detach(),
            "vq_loss": perception.actions.vq_loss.detach(),
        }
        indices = perception.actions.indices
        return found if indices is None else found | {"indices": indices}

    @torch.no_grad()
    def act(self, observation: Mapping[str, Any], generator: Generators = None) -> Tensor:
        """Action chunks for a batch of observations.

        Args:
            observation: `images` uint8 (B, V, H, W, 3), `text` list of B strings, `proprio` (B, P) raw units
                where the policy reads it.
            generator: one per sample makes a sample's actions independent of the rest of the batch.
        Returns: (B, H, A) float32, raw units.
        """
        training = self.training
        if training:
            self.eval()  # dropout has no place in acting
        _, context = self._look(observation, generator)
        head = self.adapter.head.config
        start = normal((len(context), head.chunk, head.action_dim), generator, context.device)
        sampled = self.adapter.head.sample(context, start * head.sigma_max)
        if training:
            self.train()
        return self.action_normalizer.denormalize(sampled)

    def set_recompute(self, enabled: bool) -> None:
        """Gradient checkpointing: less memory, one more forward pass."""
        set_recompute(self, enabled)

    def compile_parts(self, **options: Any) -> None:
        """`torch.compile` of GFDM's feature pass, Video-Former, GIDM's blocks and the action head, in place.

        Options are those of torch.compile, e.g. mode="reduce-overhead" on a GPU.
        """
        self.gfdm.compile_parts(**options)
        self.adapter.video_former.compile(**options)
        self.adapter.latent_actions.compile_blocks(**options)
        self.adapter.head.compile(**options)

    def gfdm_features(self, images: Tensor, text: Sequence[str], generator: Generators = None) -> Tensor:
        """GFDM's one-step features of all views in one pass.

        Args:
            images: uint8 (B, V, H, W, 3).
        Returns: (B, V, T, L, C); without gradient unless GFDM trains.
        """
        batch, views = images.shape[:2]
        if views != self.config.views:
            raise ValueError(f"{views} camera views were given; this policy reads {self.config.views}.")
        frozen = self.trainable not in ("gfdm+adapter", "all")
        with torch.no_grad() if frozen else nullcontext():
            repeated = [string for string in text for _ in range(views)]
            own = generator
            if isinstance(generator, Sequence):
                own = [each for each in generator for _ in range(views)]
            features = self.gfdm.features(images.flatten(0, 1), repeated, own)
        return features.flatten(3).transpose(2, 3).unflatten(0, (batch, views))

    def perceive(self, images: Tensor, text: Sequence[str], generator: Generators = None) -> Perception:
        """Video and latent action tokens of B observations; images uint8 (B, V, H, W, 3)."""
        features = self.gfdm_features(images, text, generator)
        words = self.gidm_text.states(text)
        return self.adapter.perceive(features.to(self.dtype), words.states.to(self.dtype), words.mask)

    @property
    def dtype(self) -> torch.dtype:
        """Of the adapter."""
        return self.adapter.head.action_out.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.adapter.head.action_out.weight.device

    @property
    def statistics(self) -> Statistics | None:
        """What `set_statistics` was given, or what the folder holds."""
        return self._statistics

    def side_files(self) -> dict[str, str]:
        if self._statistics is None:
            return {}
        return {STATISTICS_FILE: json.dumps(asdict(self._statistics), indent=2) + "\n"}

    def read_side_files(self, folder: Path) -> None:
        """Statistics for a reader; what the network uses is in the weight file."""
        path = folder / STATISTICS_FILE
        if not path.is_file():
            return
        try:
            self._statistics = statistics_from_mapping(json.loads(path.read_text()))
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
            raise ModelFolderError(f"{path} does not hold action statistics: {error}") from error

    def _look(self, batch: Mapping[str, Any], generator: Generators) -> tuple[Perception, Tensor]:
        """Perception and the head's context of a batch."""
        perception = self.perceive(batch["images"], batch["text"], generator)
        goal = self.gfdm.text_encoder.goal(batch["text"]).to(self.dtype)
        proprio = None
        if self.proprio_normalizer is not None:
            if "proprio" not in batch:
                raise ValueError(
                    f"this policy reads proprioception ({len(self.proprio_normalizer.offset)} values); "
                    "the observation has no 'proprio'."
                )
            proprio = self.proprio_normalizer.normalize(batch["proprio"]).to(self.dtype)
        return perception, self.adapter.context(perception, goal, proprio)


def statistics_from_mapping(values: Mapping[str, Any]) -> Statistics:
    """The inverse of `dataclasses.asdict`. Raises: KeyError or TypeError for other mappings."""
    proprio = values.get("proprio")
    return Statistics(
        action=FieldStatistics(**values["action"]), proprio=FieldStatistics(**proprio) if proprio else None
    )
