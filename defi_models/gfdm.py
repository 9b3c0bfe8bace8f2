"""GFDM, the general forward dynamics model: a video of what comes next, from one frame and a text."""

# B batch, T frames, C latent channels, h w latent grid, S text tokens

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from defi_models.edm import velocity_preconditioning
from defi_models.encoders.block_dct import BlockDctCodec
from defi_models.encoders.clip_text import ClipText
from defi_models.encoders.hashed_text import HashedText
from defi_models.encoders.public_folder import load_backbone
from defi_models.encoders.vae import VaeCodec
from defi_models.errors import ModelFolderError
from defi_models.layers.activation_checkpointing import set_recompute
from defi_models.layers.unet_features import feature_channels, up_block_features
from defi_models.layers.video_unet import (
    DiffusersScheduler,
    DiffusersUNet,
    SchedulerConfig,
    UNetConfig,
    build_scheduler,
    build_unet,
    read_scheduler,
    unet_config,
)
from defi_models.precision import to_signed_unit
from defi_models.pretrained.folder import ModelFolder
from defi_models.pretrained.lazy_diffusers import diffusers_class
from defi_models.rng import Generators, normal, uniform


class FirstStep(NamedTuple):
    """Constants of the one denoising step that features are read from."""

    timestep: float
    noise_scale: float
    """Standard deviation of the initial noise."""
    input_scale: float
    """Factor of `scale_model_input`."""


class GFDM(ModelFolder, nn.Module):
    """Stable Video Diffusion conditioned on the present frame and on text; only the UNet trains.

    Source: arXiv 2604.16391, section 3.1 and the released CALVIN configuration.
    """

    kind = "gfdm"

    @dataclass(kw_only=True, frozen=True)
    class Config:
        preset: str = "custom"
        height: int = 256
        """Pixels."""
        width: int = 256
        frames: int = 16
        codec: VaeCodec.Config | BlockDctCodec.Config = field(default_factory=VaeCodec.Config)
        text: ClipText.Config | HashedText.Config = field(default_factory=ClipText.Config)
        text_copies: int = 2
        """The text states are concatenated with themselves on the channels, 2 x 512 = SVD's 1024."""
        unet: UNetConfig = field(default_factory=UNetConfig)
        scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
        sigma_mean: float = 0.7
        """Of ln(sigma) in training."""
        sigma_std: float = 1.6
        text_dropout: float = 0.05
        """Probability of training a sample without its text, for guidance."""
        fps: float = 7.0
        """Micro-conditioning in training and sampling; the released code passes fps, not fps - 1."""
        feature_fps: float = 4.0
        """Micro-conditioning when features are read."""
        motion_bucket: float = 127.0
        noise_augmentation: float = 0.0
        feature_blocks: tuple[int, ...] = (0, 1)
        """Up-blocks whose outputs the policy reads."""
        feature_steps: int = 20
        """Length of the schedule whose first step features are read from."""

        @property
        def latent_size(self) -> tuple[int, int]:
            return self.height // self.codec.downscale, self.width // self.codec.downscale

        @property
        def feature_dim(self) -> int:
            return feature_channels(self.unet.block_out_channels, self.feature_blocks)

        @property
        def feature_size(self) -> tuple[int, int]:
            """Grid of the features."""
            down = 2 ** max(0, len(self.unet.block_out_channels) - 2 - max(self.feature_blocks))
            return self.latent_size[0] // down, self.latent_size[1] // down

    def __init__(
        self,
        config: Config,
        *,
        codec: VaeCodec | BlockDctCodec | None = None,
        text_encoder: ClipText | HashedText | None = None,
        unet: DiffusersUNet | None = None,
    ) -> None:
        """Builds what is not given from `config`, with random weights."""
        super().__init__()
        self.config = config
        self.codec = codec or _build_codec(config.codec)
        self.text_encoder = text_encoder or _build_text(config.text)
        self.unet: DiffusersUNet = unet or build_unet(
            config.unet,
            latent_channels=config.codec.channels,
            text_dim=config.text_copies * config.text.dim,
            frames=config.frames,
            last_feature_block=max(config.feature_blocks),
        )
        self.scheduler: DiffusersScheduler = build_scheduler(config.scheduler)
        self._first_step = self._read_first_step()
        self._up_block_features = up_block_features

    @classmethod
    def from_svd(
        cls,
        folder: str | Path,
        text_encoder: ClipText | HashedText,
        *,
        height: int = 256,
        width: int = 256,
        frames: int | None = None,
        **options: Any,
    ) -> Self:
        """From a diffusers Stable Video Diffusion folder, as SVD and the released GFDM are published.

        Args:
            folder: holds `unet`, `vae` and `scheduler`; whatever else the pipeline has is not read.
            text_encoder: what conditions the UNet, e.g. `ClipText.from_folder(...)`.
            frames: None takes the UNet's own number.
            options: further fields of the Config.
        Raises: ModelFolderError naming the file and what was expected.
        """
        place = Path(folder)
        scheduler = read_scheduler(place / "scheduler")
        codec = VaeCodec.from_folder(place / "vae")
        unet = load_backbone(diffusers_class("UNetSpatioTemporalConditionModel"), place / "unet")
        config = cls.Config(
            height=height,
            width=width,
            frames=frames or unet.config.num_frames,
            codec=codec.config,
            text=text_encoder.config,
            unet=unet_config(unet, place / "unet"),
            scheduler=scheduler,
            **options,
        )
        expected = config.text_copies * config.text.dim
        if unet.config.cross_attention_dim != expected:
            raise ModelFolderError(
                f"{place / 'unet' / 'config.json'}: cross_attention_dim is {unet.config.cross_attention_dim}, but "
                f"{config.text_copies} copies of {config.text.dim}-wide text states make {expected}."
            )
        if unet.config.in_channels != 2 * config.codec.channels:
            raise ModelFolderError(
                f"{place / 'unet' / 'config.json'}: in_channels is {unet.config.in_channels}; latents and "
                f"condition of the VAE beside it make {2 * config.codec.channels}."
            )
        return cls(config, codec=codec, text_encoder=text_encoder, unet=unet).eval()

    def forward(self, batch: Mapping[str, Any], generator: Generators = None) -> dict[str, Tensor]:
        """Training loss of a batch of clips.

        Args:
            batch: `frames` uint8 (B, T, H, W, 3), or `latents` (B, T, C, h, w) already scaled; `text` list
                of B strings.
            generator: see `draws`; each sample draws its noise level, its noise, then whether it keeps text.
        Returns: `loss` and `mse` (unweighted error of the denoised latents), scalars; in evaluation also
            `sample_loss` (B,) and `sigma_normal` (B,), the draws behind the noise levels.
        """
        latents = (
            batch["latents"].to(self.device) if "latents" in batch else self.encode_frames(batch["frames"])
        )
        text = self.encode_text(batch["text"])
        sigma_normal = normal((len(latents),), generator, latents.device)
        noise = normal(latents.shape, generator, latents.device)
        keep = uniform((len(latents),), generator, latents.device) if self.training else None
        loss, denoised = self.loss(latents, text, sigma_normal=sigma_normal, noise=noise, keep_draw=keep)
        error = (denoised - latents.float()).square().detach()
        found = {"loss": loss, "mse": error.mean()}
        if self.training:
            return found
        level = (self.config.sigma_std * sigma_normal.float() + self.config.sigma_mean).exp().square()
        weight = (level + 1) / level
        return found | {"sample_loss": weight * error.flatten(1).mean(dim=1), "sigma_normal": sigma_normal}

    def loss(
        self,
        latents: Tensor,
        text: Tensor,
        *,
        sigma_normal: Tensor,
        noise: Tensor,
        keep_draw: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """EDM-weighted denoising loss of a clip.

        Args:
            latents: (B, T, C, h, w) latents times `scaling_factor`; frame 0 is the condition.
            text: (B, S, dim) token states, not yet doubled.
            sigma_normal: (B,) standard normal draws behind sigma = exp(sigma_std * n + sigma_mean).
            noise: like latents, standard normal.
            keep_draw: (B,) uniform draws; a sample keeps its text when its draw exceeds `text_dropout`.
        Returns: the scalar loss, mean over the batch, and the denoised latents.
        """
        config = self.config
        latents = latents.float()
        sigma = (config.sigma_std * sigma_normal.float() + config.sigma_mean).exp()
        level = sigma.view(-1, 1, 1, 1, 1)
        c_skip, c_out, c_in = velocity_preconditioning(level)
        noisy = latents + level * noise
        # SVD's image condition is unscaled
        condition = (latents[:, :1] / config.codec.scaling_factor).expand_as(latents)
        text = self._cross_attention_text(text)
        if keep_draw is not None:
            text = text * (keep_draw > config.text_dropout).to(text.dtype)[:, None, None]
        output = self.unet_output(torch.cat([c_in * noisy, condition], dim=2), sigma.log() / 4, text)
        denoised = c_out * output + c_skip * noisy
        weight = (level**2 + 1) / level**2
        return (weight * (denoised - latents).square()).mean(), denoised

    def unet_output(self, x: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        """The whole UNet. x (B, T, 2C, h, w), timestep (B,) = ln(sigma) / 4, doubled text -> float32."""
        ids = self._time_ids(len(x), self.config.fps)
        return self.unet(x.to(self.dtype), timestep, text, added_time_ids=ids).sample.float()

    @torch.no_grad()
    def encode_frames(self, frames: Tensor) -> Tensor:
        """uint8 (B, T, H, W, 3) -> latents (B, T, C, h, w), times `scaling_factor`, float32."""
        self._check_size(frames)
        images = to_signed_unit(frames.to(self.device).flatten(0, 1))
        return self.codec.encode(images).unflatten(0, frames.shape[:2]) * self.config.codec.scaling_factor

    @torch.no_grad()
    def decode_latents(self, latents: Tensor) -> Tensor:
        """Scaled latents (B, T, C, h, w) -> uint8 (B, T, H, W, 3)."""
        return self.codec.decode(latents / self.config.codec.scaling_factor)

    def encode_text(self, text: Sequence[str]) -> Tensor:
        """list of B strings -> token states (B, S, dim), not doubled; each distinct string is encoded once."""
        return self.text_encoder.states(text).states

    def features(self, images: Tensor, text: Sequence[str], generator: Generators = None) -> Tensor:
        """Features of one denoising step, the policy's view of what will happen.

        Args:
            images: uint8 (B, H, W, 3), the present frame.
            generator: see `draws`; each sample draws its initial noise.
        Returns: (B, T, feature_dim, h', w') in the UNet's dtype.
        """
        self._check_size(images)
        condition = self.codec.encode(to_signed_unit(images.to(self.device)))
        shape = (len(images), self.config.frames, *condition.shape[1:])
        noise = normal(shape, generator, condition.device)
        return self.features_from_latents(condition, self.encode_text(text), noise)

    def features_from_latents(self, condition: Tensor, text: Tensor, noise: Tensor) -> Tensor:
        """`features` with everything given: unscaled image latents (B, C, h, w), text states (B, S, dim),
        standard normal noise (B, T, C, h, w)."""
        step = self._first_step
        latents = noise * step.noise_scale * step.input_scale
        x = torch.cat([latents, condition[:, None].expand_as(latents)], dim=2).to(self.dtype)
        timestep = torch.full((len(x),), step.timestep, device=x.device)
        ids = self._time_ids(len(x), self.config.feature_fps)
        text = self._cross_attention_text(text)
        return self._up_block_features(self.unet, x, timestep, text, ids, self.config.feature_blocks)

    @torch.no_grad()
    def sample(
        self,
        first_frames: Tensor,
        text: Sequence[str],
        steps: int = 20,
        guidance: float = 1.0,
        generator: Generators = None,
    ) -> Tensor:
        """Predicts a whole clip.

        Args:
            first_frames: uint8 (B, H, W, 3).
            guidance: 1 follows the text as trained; more pushes away from the text-free prediction.
        Returns: uint8 (B, T, H, W, 3).
        """
        self._check_size(first_frames)
        condition = self.codec.encode(to_signed_unit(first_frames.to(self.device)))
        shape = (len(first_frames), self.config.frames, *condition.shape[1:])
        scheduler = copy.deepcopy(self.scheduler)
        scheduler.set_timesteps(steps, device=condition.device)
        latents = normal(shape, generator, condition.device) * scheduler.init_noise_sigma
        states = self._cross_attention_text(self.encode_text(text))
        repeated = condition[:, None].expand_as(latents)
        for timestep in scheduler.timesteps:
            x = torch.cat([scheduler.scale_model_input(latents, timestep), repeated], dim=2)
            level = timestep.expand(len(x))
            output = self.unet_output(x, level, states)
            if guidance != 1.0:
                free = self.unet_output(x, level, torch.zeros_like(states))
                output = free + guidance * (output - free)
            latents = scheduler.step(output, timestep, latents).prev_sample
        return self.decode_latents(latents)

    def set_recompute(self, enabled: bool) -> None:
        """Gradient checkpointing of the UNet: less memory, one more forward pass."""
        set_recompute(self, enabled)

    def compile_parts(self, **options: Any) -> None:
        """`torch.compile` of the UNet and of its shortened feature pass, in place."""
        self.unet.compile(**options)
        self._up_block_features = torch.compile(up_block_features, **options)

    @property
    def first_step(self) -> FirstStep:
        """Constants of the step that features are read from."""
        return self._first_step

    @property
    def dtype(self) -> torch.dtype:
        """Of the UNet."""
        return self.unet.conv_in.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.unet.conv_in.weight.device

    def _read_first_step(self) -> FirstStep:
        scheduler = copy.deepcopy(self.scheduler)
        with torch.device("cpu"):
            scheduler.set_timesteps(self.config.feature_steps)
        input_scale = 1 / (float(scheduler.sigmas[0]) ** 2 + 1) ** 0.5
        return FirstStep(float(scheduler.timesteps[0]), float(scheduler.init_noise_sigma), input_scale)

    def _cross_attention_text(self, text: Tensor) -> Tensor:
        return text.to(self.dtype).repeat(1, 1, self.config.text_copies)

    def _time_ids(self, batch: int, fps: float) -> Tensor:
        ids = torch.tensor(
            [fps, self.config.motion_bucket, self.config.noise_augmentation], device=self.device
        )
        return ids.expand(batch, -1)

    def _check_size(self, images: Tensor) -> None:
        expected = (self.config.height, self.config.width, 3)
        if images.dtype != torch.uint8 or tuple(images.shape[-3:]) != expected:
            raise ValueError(
                f"images are {images.dtype} {tuple(images.shape)}; uint8 (..., {', '.join(map(str, expected))}) "
                "is expected. Resize them first or set the model's height and width."
            )


def _build_codec(config: VaeCodec.Config | BlockDctCodec.Config) -> VaeCodec | BlockDctCodec:
    return VaeCodec(config) if isinstance(config, VaeCodec.Config) else BlockDctCodec(config)


def _build_text(config: ClipText.Config | HashedText.Config) -> ClipText | HashedText:
    return ClipText(config) if isinstance(config, ClipText.Config) else HashedText(config)


ForwardDynamics = GFDM
"""Former name, which folders exported before 0.2 name in their README."""
