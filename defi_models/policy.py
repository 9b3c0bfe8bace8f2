"""The fused policy: GFDM's one-step prediction, GIDM's latent actions and a diffusion action head."""

# B batch, V views, T frames, L tokens per view, C feature channels, H actions of a chunk, A action dims

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from defi_models.act.inputs import ActInputs, gather
from defi_models.encoders.hashed_text import HashedText
from defi_models.encoders.t5_text import T5Text
from defi_models.errors import ConfigurationError, InputError, ModelFolderError, did_you_mean
from defi_models.gfdm import GFDM
from defi_models.gidm import GIDM, build_gidm_text
from defi_models.inputs.acting import Acting
from defi_models.inputs.action_contract import ActionContract
from defi_models.inputs.checks import check_tensor, check_texts, require
from defi_models.inputs.normalization import Normalizer, Statistics
from defi_models.inputs.observation import ObservationShape
from defi_models.layers.activation_checkpointing import set_recompute
from defi_models.layers.adapter import Perception, PolicyAdapter
from defi_models.precision import to_signed_unit
from defi_models.pretrained import side_files
from defi_models.pretrained.folder import ModelFolder
from defi_models.rng import Generators, check_generators, normal, repeated

TRAINABLE = ("adapter", "gidm+adapter", "gfdm+adapter", "all")


class DeFIPolicy(ModelFolder, nn.Module):
    """Observation and instruction -> a chunk of actions in the robot's own units.

    Every call raises an InputError for input of another type, dtype, shape or batch size; it names the key, what was
    expected and what was got.

    Source: arXiv 2604.16391, section 3.3 and the released CALVIN configuration.
    """

    kind = "policy"

    @dataclass(kw_only=True, frozen=True)
    class Config:
        """The parts and the cameras; the defaults are the paper's."""

        preset: str = "custom"
        """Name of the preset that the config started from."""
        views: int = 2
        """Number of cameras; the first one is also what GIDM compares over time."""
        cameras: tuple[str, ...] = ()
        """Names of the cameras, in the order of the views; empty where nobody named them."""
        gfdm: GFDM.Config = field(default_factory=GFDM.Config)
        """The pretrained forward dynamics model."""
        gidm_text: T5Text.Config | HashedText.Config = field(default_factory=T5Text.Config)
        """GIDM's text encoder, frozen."""
        patch_dim: int = 768
        """Width of the patch features that GIDM was pretrained on."""
        adapter: PolicyAdapter.Config = field(default_factory=PolicyAdapter.Config)
        """Projector, GIDM's encoder, Video-Former and action head."""
        normalization: str = "none"
        """mean_std | min_max | none, of actions and proprioception."""

    action_normalizer: Normalizer
    """From raw action units to the head's and back."""
    proprio_normalizer: Normalizer | None
    """The same for proprioception; None where the policy reads none."""

    def __init__(self, config: Config) -> None:
        """Builds every part with random weights.

        Raises:
            ConfigurationError: When sizes of the parts do not fit each other; it names both.
        """
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
        self.contract = ActionContract()
        """The meaning of the actions; it is saved with the policy and changes nothing that the network computes."""
        self.acting = Acting(steps=head.sampling_steps, sigma_min=head.sigma_min)
        """The settings of `act`, saved with the policy; `set_acting` checks them."""
        self.acting_in_folder = True
        """False for a policy from a folder without settings of acting: it acts as it did when they were not saved."""
        self.observed = ObservationShape(
            config.views, config.gfdm.height, config.gfdm.width, head.proprio_dim
        )
        self._replayed: Callable[[ActInputs], Tensor] | None = None
        self.trainable = "gidm+adapter"
        self.set_trainable(self.trainable)

    @classmethod
    def fuse(cls, config: Config, gfdm: GFDM, gidm: GIDM) -> Self:
        """A policy from two pretrained models; their own sizes replace those in `config`.

        Args:
            config: views, cameras, action head and normalisation of the policy.
            gfdm: the pretrained forward dynamics model.
            gidm: the pretrained inverse dynamics model.

        Returns:
            A policy with copies of their weights and a fresh projector, Video-Former and head.

        Raises:
            ConfigurationError: When sizes of the parts do not fit each other; it names both.
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
        """`config` with the sizes of two pretrained models in place of its own.

        Args:
            config: the policy's config.
            gfdm: config of the pretrained forward dynamics model.
            gidm: config of the pretrained inverse dynamics model.

        Returns:
            The config that `fuse` builds.
        """
        former = replace(config.adapter.video_former, frames=gfdm.frames)
        adapter = replace(config.adapter, latent_actions=gidm.encoder, video_former=former)
        return replace(config, gfdm=gfdm, gidm_text=gidm.text, patch_dim=gidm.patches.dim, adapter=adapter)

    def set_statistics(self, statistics: Statistics) -> None:
        """Sets the normalisation of actions and proprioception; it is saved with the policy.

        Raises:
            InputError: When the dimensions are not the policy's, a value is not finite, or proprioception's
                statistics are missing.
        """
        self.action_normalizer.set_statistics(statistics.action)
        if self.proprio_normalizer is not None:
            if statistics.proprio is None:
                raise InputError(
                    "statistics.proprio: got None; expected statistics of "
                    f"{len(self.proprio_normalizer.offset)} values, since this policy reads proprioception."
                )
            self.proprio_normalizer.set_statistics(statistics.proprio)
        self._statistics = statistics

    def set_acting(self, acting: Acting) -> None:
        """Sets how the policy acts; it is saved with the policy.

        Raises:
            ConfigurationError: When a setting does not fit the policy.
        """
        head, statistics = self.adapter.head.config, self._statistics
        acting.check(head.action_dim, head.sigma_max, statistics.action if statistics else None)
        self.acting = acting

    def set_trainable(self, choice: str) -> None:
        """Chooses the parts that train.

        Args:
            choice: "adapter" (projector, Video-Former and head), "gidm+adapter" (and GIDM's encoder),
                "gfdm+adapter" (and GFDM's UNet) or "all".

        Raises:
            ConfigurationError: For another name.
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
            batch: `images` uint8 (B, V, H, W, 3); `actions` float (B, H, A), raw units; `text` list of B strings;
                `proprio` float (B, P), raw units, where the policy reads it; optional `action_mask` bool (B, H),
                False = padding past the episode's end.
            generator: see `Generators`; each sample draws GFDM's noise of all views, then the action noise level
                and noise.

        Returns:
            `loss` = action loss + codebook losses, `action_loss` and `vq_loss`, float32 scalars, and `indices`
            int64 (B, K) where there is a codebook.
        """
        images, text, proprio = self.observed.checked(batch)
        head = self.adapter.head.config
        expected = f"float (B, {head.chunk}, {head.action_dim})"
        given = check_tensor(
            "actions", require(batch, "actions", expected), (len(images), head.chunk, head.action_dim), None
        )
        mask = batch.get("action_mask")
        if mask is not None:
            check_tensor("action_mask", mask, (len(images), head.chunk), torch.bool)
        perception, context = self._encode_observation(images, text, proprio, generator)
        actions = self.action_normalizer.normalize(given)
        sigma, noise = self.adapter.head.draw(len(actions), generator, actions.device)
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
            observation: `images` uint8 (B, V, H, W, 3), `text` list of B strings, `proprio` float (B, P), raw units,
                where the policy reads it.
            generator: see `Generators`; one per sample makes a sample's actions independent of the rest of the
                batch.

        Returns:
            float32 (B, H, A), raw units.

        Raises:
            InputError: Also when proprioception on the CPU is not finite.
        """
        inputs = gather(self, observation, generator)
        training = self.training
        if training:
            self.eval()  # acting uses no dropout
        actions = self.act_on(inputs) if self._replayed is None else self._replayed(inputs)
        if training:
            self.train()
        return self.acting.applied(actions, self._statistics.action if self._statistics else None)

    @torch.no_grad()
    def act_on(self, inputs: ActInputs) -> Tensor:
        """The chunk before `acting.applied`, float32 (B, H, A) in raw units: the part of `act` on the device alone."""
        head, dtype = self.adapter.head, self.dtype
        features = self._view_features(inputs.images, inputs.words, inputs.noise).to(dtype)
        perception = self.adapter.perceive(features, inputs.gidm_words.to(dtype), inputs.gidm_mask)
        context = self._context(perception, inputs.goal, inputs.proprio)
        sigmas = head.sigmas(self.device, self.acting.steps, self.acting.sigma_min)
        sampled = head.sample(context, inputs.start * head.config.sigma_max, sigmas)
        return self.action_normalizer.denormalize(sampled)

    def replay(self, run: Callable[[ActInputs], Tensor] | None) -> None:
        """Sets another way to compute `act_on` in `act`, such as CUDA graphs; None: as it is."""
        self._replayed = run

    def set_recompute(self, enabled: bool) -> None:
        """Gradient checkpointing: less memory, one more forward pass."""
        set_recompute(self, enabled)

    def hold_texts(self, capacity: int) -> None:
        """Sets how many texts' features each text encoder keeps, whatever their size.

        Of each text GFDM's encoder keeps two, its states and its goal.
        """
        self.gfdm.text_encoder.cache.max_texts = 2 * capacity
        self.gidm_text.cache.max_texts = capacity

    def pad_texts(self) -> None:
        """Gives the states of all texts one length: then the shapes of a pass depend on the batch size alone."""
        if isinstance(self.gidm_text, T5Text):  # the other encoders always do
            self.gidm_text.pad_to_max = True

    def compile_parts(self, **options: Any) -> None:
        """`torch.compile`, with its options, of GFDM's feature pass, Video-Former, GIDM's blocks and the action head."""
        self.gfdm.compile_parts(**options)
        self.adapter.video_former.compile(**options)
        self.adapter.latent_actions.compile_blocks(**options)
        self.adapter.head.compile_blocks(**options)

    def gfdm_features(self, images: Tensor, text: Sequence[str], generator: Generators = None) -> Tensor:
        """GFDM's one-step features of all views in one pass.

        Args:
            images: uint8 (B, V, H, W, 3).
            text: list of B strings.
            generator: see `Generators`; each sample draws the noise of all its views.

        Returns:
            (B, V, T, L, C) in GFDM's dtype; without gradient unless GFDM trains.
        """
        self.observed.images(images)
        check_texts("text", text, len(images), "images")
        check_generators(generator, len(images))
        frozen = self.trainable not in ("gfdm+adapter", "all")
        with torch.no_grad() if frozen else nullcontext():
            noise = self.feature_noise(len(images), generator)
            return self._view_features(images, self.gfdm.text_encoder.states(text).states, noise)

    def feature_noise(self, batch: int, generator: Generators) -> Tensor:
        """GFDM's noise of all views, float32 (B * V, T, C, h, w); each sample draws that of all its views."""
        config, views = self.config.gfdm, self.config.views
        shape = (batch * views, config.frames, config.codec.channels, *config.latent_size)
        return normal(shape, repeated(generator, views), self.device)

    def _view_features(self, images: Tensor, words: Tensor, noise: Tensor) -> Tensor:
        seen = to_signed_unit(images.to(self.device).flatten(0, 1))
        features = self.gfdm.features_from_latents(self.gfdm.codec.encode(seen), words, noise)
        return torch.unflatten(features.flatten(3).transpose(2, 3), 0, images.shape[:2])

    def perceive(self, images: Tensor, text: Sequence[str], generator: Generators = None) -> Perception:
        """Video and latent action tokens of observations.

        Args:
            images: uint8 (B, V, H, W, 3).
            text: list of B strings.
            generator: see `Generators`; each sample draws the noise of all its views.

        Returns:
            Video tokens (B, T * Q, D) and latent action tokens (B, K, D_gidm) as the action head reads them.
        """
        features = self.gfdm_features(images, text, generator)
        words = self.gidm_text.states(text)
        return self.adapter.perceive(features.to(self.dtype), words.states.to(self.dtype), words.key_mask)

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the adapter."""
        return self.adapter.head.action_out.weight.dtype

    @property
    def device(self) -> torch.device:
        """Device of the adapter."""
        return self.adapter.head.action_out.weight.device

    @property
    def statistics(self) -> Statistics | None:
        """The statistics that `set_statistics` was given or the folder holds; None where there are none."""
        return self._statistics

    def side_files(self) -> dict[str, str]:
        """The meaning of the actions, the settings of acting and the statistics as JSON, for a reader of the folder."""
        return side_files.as_texts(self.contract, self.acting, self._statistics)

    def read_side_files(self, folder: Path) -> None:
        """Reads them back, each where it is there; the numbers that normalise are in the weight file.

        Raises:
            ModelFolderError: When a file is damaged, or its settings do not fit the policy.
        """
        self.contract = side_files.read_contract(folder) or self.contract
        self._statistics = side_files.read_statistics(folder)
        acting = side_files.read_acting(folder)
        self.acting_in_folder = acting is not None
        if acting is not None:
            try:
                self.set_acting(acting)
            except ConfigurationError as error:
                raise ModelFolderError(f"{folder / side_files.ACTING_FILE}: {error}") from error

    def _encode_observation(
        self, images: Tensor, text: Sequence[str], proprio: Tensor | None, generator: Generators
    ) -> tuple[Perception, Tensor]:
        """Perception and the head's context of checked observations."""
        perception = self.perceive(images, text, generator)
        return perception, self._context(perception, self.gfdm.text_encoder.goal(text), proprio)

    def _context(self, perception: Perception, goal: Tensor, proprio: Tensor | None) -> Tensor:
        if proprio is not None:
            assert self.proprio_normalizer is not None
            proprio = self.proprio_normalizer.normalize(proprio).to(self.dtype)
        return self.adapter.context(perception, goal.to(self.dtype), proprio)
