"""GFDM, the general forward dynamics model: a video of what comes next, from one frame and a text."""

# B batch, T frames, C latent channels, h w latent grid, S text tokens

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from defi_models.edm import velocity_preconditioning
from defi_models.encoders.block_dct import BlockDctCodec
from defi_models.encoders.clip_text import ClipText, build_text
from defi_models.encoders.hashed_text import HashedText
from defi_models.encoders.vae import VaeCodec, build_codec
from defi_models.inputs import checks
from defi_models.inputs.checks import Size, check_count, check_number, check_tensor, check_texts, require
from defi_models.layers import unet_features
from defi_models.layers.activation_checkpointing import set_recompute
from defi_models.layers.svd_folder import read_svd
from defi_models.layers.video_unet import (
    DiffusersScheduler,
    DiffusersUNet,
    FirstStep,
    SchedulerConfig,
    UNetConfig,
    build_scheduler,
    build_unet,
    denoise_clip,
    read_first_step,
)
from defi_models.precision import to_signed_unit
from defi_models.pretrained.folder import ModelFolder
from defi_models.rng import Generators, normal, uniform

_SIZE_HINT = "Resize and cut the video first, or set the model's height, width and frames."


class GFDM(ModelFolder, nn.Module):
    """Stable Video Diffusion conditioned on the present frame and on text; only the UNet trains.

    Every call raises an InputError for input of another type, dtype, shape or batch size; it names the key, what was
    expected and what was got.

    Source: arXiv 2604.16391, section 3.1 and the released CALVIN configuration.
    """

    kind = "gfdm"
    cache_column = "latents"
    """Batch entry that may hold the output of `encode_frames` in place of `frames`."""

    @dataclass(kw_only=True, frozen=True)
    class Config:
        """Sizes, conditioning and training noise; the defaults are the paper's."""

        preset: str = "custom"
        """Name of the preset that the config started from."""
        height: int = 256
        """Pixels of a frame."""
        width: int = 256
        """Pixels of a frame."""
        frames: int = 16
        """Frames of a clip, the given one included."""
        codec: VaeCodec.Config | BlockDctCodec.Config = field(default_factory=VaeCodec.Config)
        """Latent codec, frozen."""
        text: ClipText.Config | HashedText.Config = field(default_factory=ClipText.Config)
        """Text encoder, frozen."""
        text_copies: int = 2
        """The text states are concatenated with themselves on the channels, 2 x 512 = SVD's 1024."""
        unet: UNetConfig = field(default_factory=UNetConfig)
        """Denoiser, the part that trains."""
        scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
        """Noise schedule of sampling and of the feature step."""
        sigma_mean: float = 0.7
        """Mean of ln(sigma) in training."""
        sigma_std: float = 1.6
        """Standard deviation of ln(sigma) in training."""
        text_dropout: float = 0.05
        """Probability of training a sample without its text, for guidance."""
        fps: float = 7.0
        """Micro-conditioning in training and sampling, frames per second; the released code passes fps, not fps - 1."""
        feature_fps: float = 4.0
        """Micro-conditioning when features are read, frames per second."""
        motion_bucket: float = 127.0
        """SVD's micro-conditioning on the amount of motion."""
        noise_augmentation: float = 0.0
        """SVD's micro-conditioning on the noise added to the condition; none is added here."""
        feature_blocks: tuple[int, ...] = (0, 1)
        """Up-blocks whose outputs the policy reads."""
        feature_steps: int = 20
        """Length of the schedule whose first step features are read from."""

        @property
        def latent_size(self) -> tuple[int, int]:
            """Height and width of the latent grid."""
            return self.height // self.codec.downscale, self.width // self.codec.downscale

        @property
        def feature_dim(self) -> int:
            """Channels of the features."""
            return unet_features.feature_channels(self.unet.block_out_channels, self.feature_blocks)

        @property
        def feature_size(self) -> tuple[int, int]:
            """Height and width of the feature grid."""
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
        """Builds the parts that are not given from `config`, with random weights."""
        super().__init__()
        self.config = config
        self.codec = codec or build_codec(config.codec)
        self.text_encoder = text_encoder or build_text(config.text)
        self.unet: DiffusersUNet = unet or build_unet(
            config.unet,
            latent_channels=config.codec.channels,
            text_dim=config.text_copies * config.text.dim,
            frames=config.frames,
            last_feature_block=max(config.feature_blocks),
        )
        self.scheduler: DiffusersScheduler = build_scheduler(config.scheduler)
        self.first_step: FirstStep = read_first_step(self.scheduler, config.feature_steps)
        self._functions: unet_features.BlockFunctions | None = None

    @classmethod
    def from_svd(cls, folder: str | Path, text_encoder: ClipText | HashedText, **options: Any) -> Self:
        """GFDM from a diffusers Stable Video Diffusion folder, the layout of SVD and of the released GFDM.

        Args:
            folder: holds `unet`, `vae` and `scheduler`; whatever else the pipeline has is not read.
            text_encoder: conditions the UNet, e.g. `ClipText.from_folder(...)`.
            options: fields of the Config, e.g. `height`; `frames` is the UNet's own number where it is not given.

        Returns:
            The model in eval mode, on the CPU, in the stored precision.

        Raises:
            ModelFolderError: Naming the file and what was expected.
        """
        svd = read_svd(Path(folder))
        parts: dict[str, Any] = dict(codec=svd.codec.config, unet=svd.unet_config, scheduler=svd.scheduler)
        config = cls.Config(**{"frames": svd.frames, "text": text_encoder.config} | parts | options)
        svd.check_width(config.text_copies, config.text.dim)
        return cls(config, codec=svd.codec, text_encoder=text_encoder, unet=svd.unet).eval()

    def forward(self, batch: Mapping[str, Any], generator: Generators = None) -> dict[str, Tensor]:
        """Training loss of a batch of clips.

        Args:
            batch: `frames` uint8 (B, T, H, W, 3), or `latents` float (B, T, C, h, w) times `scaling_factor`;
                `text` list of B strings.
            generator: see `Generators`; each sample draws its noise level, its noise, then, in training, whether
                it keeps its text.

        Returns:
            `loss` and `mse` (unweighted error of the denoised latents), float32 scalars; in evaluation also
            `sample_loss` (B,) and `sigma_normal` (B,), the normal draws behind the noise levels.
        """
        if isinstance(batch, Mapping) and "latents" in batch:
            key, given = "latents", check_tensor("latents", batch["latents"], self._latent_shape(), None)
        else:
            key, given = "frames", require(batch, "frames", "uint8 (B, T, H, W, 3), or latents")
            shape = ("B", self.config.frames, *self._frame_shape())
            check_tensor("frames", given, shape, torch.uint8, _SIZE_HINT)
        text = check_texts("text", require(batch, "text", "a list of B strings"), len(given), key)
        latents = given.to(self.device) if key == "latents" else self.encode_frames(given)
        states = self.text_encoder.states(text).states
        sigma_normal = normal((len(latents),), generator, latents.device)
        noise = normal(latents.shape, generator, latents.device)
        keep = uniform((len(latents),), generator, latents.device) if self.training else None
        loss, denoised = self.loss(latents, states, sigma_normal=sigma_normal, noise=noise, keep_draw=keep)
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

        Source: arXiv 2604.16391, section 3.1; Karras et al. 2022 with SVD's velocity preconditioning.

        Args:
            latents: float (B, T, C, h, w), times `scaling_factor`, of any length; frame 0 is the condition.
            text: float (B, S, dim) token states, before `text_copies`.
            sigma_normal: float (B,) standard normal draws behind sigma = exp(sigma_std * n + sigma_mean).
            noise: float, like latents, standard normal.
            keep_draw: float (B,) in [0, 1); a sample keeps its text when its draw exceeds `text_dropout`.

        Returns:
            The loss, a float32 scalar, mean over the batch, and the denoised latents, float32 like latents.
        """
        config = self.config
        check_tensor("latents", latents, self._latent_shape("T"), None)
        batch = len(latents)
        check_tensor("text", text, (batch, "S", config.text.dim), None)
        check_tensor("sigma_normal", sigma_normal, (batch,), None)
        check_tensor("noise", noise, tuple(latents.shape), None)
        latents = latents.float()
        sigma = (config.sigma_std * sigma_normal.float() + config.sigma_mean).exp()
        level = sigma.view(-1, 1, 1, 1, 1)
        c_skip, c_out, c_in = velocity_preconditioning(level)
        noisy = latents + level * noise
        # SVD's image condition is unscaled
        condition = (latents[:, :1] / config.codec.scaling_factor).expand_as(latents)
        text = self._cross_attention_text(text)
        if keep_draw is not None:
            check_tensor("keep_draw", keep_draw, (batch,), None)
            text = text * (keep_draw > config.text_dropout).to(text.dtype)[:, None, None]
        output = self.unet_output(torch.cat([c_in * noisy, condition], dim=2), sigma.log() / 4, text)
        denoised = c_out * output + c_skip * noisy
        weight = (level**2 + 1) / level**2
        return (weight * (denoised - latents).square()).mean(), denoised

    def unet_output(self, x: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        """Output of the whole UNet.

        Args:
            x: float (B, T, 2C, h, w), noisy latents and condition on the channels.
            timestep: float (B,), ln(sigma) / 4.
            text: float (B, S, text_copies * dim) token states.

        Returns:
            float32 (B, T, C, h, w), the predicted velocity.
        """
        config = self.config
        check_tensor("x", x, ("B", "T", 2 * config.codec.channels, *config.latent_size), None)
        check_tensor("timestep", timestep, (len(x),), None)
        check_tensor("text", text, (len(x), "S", config.text_copies * config.text.dim), None)
        ids = self._time_ids(len(x), config.fps)
        return cast(Tensor, self.unet(x.to(self.dtype), timestep, text, added_time_ids=ids).sample).float()

    @property
    def frozen_encoder(self) -> VaeCodec | BlockDctCodec:
        """The part behind `encode_frames`, whose output a cache may hold."""
        return self.codec

    @torch.no_grad()
    def encode_frames(self, frames: Tensor) -> Tensor:
        """Scaled latents of frames.

        Args:
            frames: uint8 (B, T, H, W, 3), any number of frames.

        Returns:
            float32 (B, T, C, h, w), times `scaling_factor`.
        """
        check_tensor("frames", frames, ("B", "T", *self._frame_shape()), torch.uint8, _SIZE_HINT)
        images = to_signed_unit(frames.to(self.device).flatten(0, 1))
        latents = torch.unflatten(self.codec.encode(images), 0, frames.shape[:2])
        scaled: Tensor = latents * self.config.codec.scaling_factor
        return scaled

    @torch.no_grad()
    def decode_latents(self, latents: Tensor) -> Tensor:
        """Pixels of scaled latents, float (B, T, C, h, w) -> uint8 (B, T, H, W, 3)."""
        check_tensor("latents", latents, self._latent_shape("T"), None)
        return self.codec.decode(latents / self.config.codec.scaling_factor)

    def encode_text(self, text: Sequence[str]) -> Tensor:
        """Token states of a list of B strings, float (B, S, dim); each distinct string is encoded once."""
        return self.text_encoder.states(check_texts("text", text)).states

    def features(self, images: Tensor, text: Sequence[str], generator: Generators = None) -> Tensor:
        """UNet features of one denoising step from pure noise: the prediction as the policy reads it.

        Args:
            images: uint8 (B, H, W, 3), the present frame.
            text: list of B strings.
            generator: see `Generators`; each sample draws its initial noise.

        Returns:
            (B, T, feature_dim, h', w') in the UNet's dtype.
        """
        check_tensor("images", images, ("B", *self._frame_shape()), torch.uint8, _SIZE_HINT)
        check_texts("text", text, len(images), "images")
        condition = self.codec.encode(to_signed_unit(images.to(self.device)))
        noise = normal((len(images), self.config.frames, *condition.shape[1:]), generator, condition.device)
        return self.features_from_latents(condition, self.text_encoder.states(text).states, noise)

    def features_from_latents(self, condition: Tensor, text: Tensor, noise: Tensor) -> Tensor:
        """The same as `features`, from encoded inputs and given noise.

        Args:
            condition: float (B, C, h, w), latents of the present frame, not scaled.
            text: float (R, S, dim) token states; B / R neighbouring frames (views of a moment) share a row.
            noise: float (B, T, C, h, w), standard normal.

        Returns:
            (B, T, feature_dim, h', w') in the UNet's dtype.
        """
        check_tensor("condition", condition, ("B", *self._latent_shape()[2:]), None)
        checks.check_shared("text", text, len(condition), self.config.text.dim)
        check_tensor("noise", noise, (len(condition), *self._latent_shape()[1:]), None)
        step, read = self.first_step, self.config.feature_blocks
        latents = noise * step.noise_scale * step.input_scale
        x = torch.cat([latents, condition[:, None].expand_as(latents)], dim=2).to(self.dtype)
        timestep = torch.full((1,), step.timestep, device=x.device)
        ids = self._time_ids(1, self.config.feature_fps)
        text = self._cross_attention_text(text)
        return unet_features.up_block_features(self.unet, x, timestep, text, ids, read, self._functions)

    @torch.no_grad()
    def sample(
        self,
        first_frames: Tensor,
        text: Sequence[str],
        steps: int = 20,
        guidance: float = 1.0,
        generator: Generators = None,
    ) -> Tensor:
        """A predicted clip per first frame and text.

        Args:
            first_frames: uint8 (B, H, W, 3).
            text: list of B strings.
            steps: denoising steps, at least 1.
            guidance: 1 follows the text as trained; more pushes away from the text-free prediction.
            generator: see `Generators`; each sample draws its initial noise.

        Returns:
            uint8 (B, T, H, W, 3).
        """
        check_tensor("first_frames", first_frames, ("B", *self._frame_shape()), torch.uint8, _SIZE_HINT)
        check_texts("text", text, len(first_frames), "first_frames")
        check_count("steps", steps)
        check_number("guidance", guidance)
        condition = self.codec.encode(to_signed_unit(first_frames.to(self.device)))
        noise = normal((len(text), self.config.frames, *condition.shape[1:]), generator, condition.device)
        states = self._cross_attention_text(self.text_encoder.states(text).states)

        def predict(latents: Tensor, timestep: Tensor) -> Tensor:
            x = torch.cat([latents, condition[:, None].expand_as(latents)], dim=2)
            output = self.unet_output(x, timestep.expand(len(x)), states)
            if guidance == 1.0:
                return output
            free = self.unet_output(x, timestep.expand(len(x)), torch.zeros_like(states))
            return free + guidance * (output - free)

        return self.decode_latents(denoise_clip(self.scheduler, steps, noise, predict))

    def set_recompute(self, enabled: bool) -> None:
        """Gradient checkpointing of the UNet: less memory, one more forward pass."""
        set_recompute(self, enabled)

    def compile_parts(self, **options: Any) -> None:
        """`torch.compile` of the UNet, and of each block of its shortened feature pass, in place."""
        self.unet.compile(**options)
        self._functions = unet_features.BlockFunctions.compiled(**options)

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the UNet."""
        dtype: torch.dtype = self.unet.conv_in.weight.dtype
        return dtype

    @property
    def device(self) -> torch.device:
        """Device of the UNet."""
        device: torch.device = self.unet.conv_in.weight.device
        return device

    def _cross_attention_text(self, text: Tensor) -> Tensor:
        return text.to(self.dtype).repeat(1, 1, self.config.text_copies)

    def _time_ids(self, batch: int, fps: float) -> Tensor:
        more = (self.config.motion_bucket, self.config.noise_augmentation)
        return unet_features.time_ids(batch, (fps, *more), self.device)

    def _frame_shape(self) -> tuple[int, int, int]:
        return self.config.height, self.config.width, 3

    def _latent_shape(self, frames: Size | None = None) -> tuple[Size, ...]:
        return "B", frames or self.config.frames, self.config.codec.channels, *self.config.latent_size


ForwardDynamics = GFDM
"""Former name, imported by the READMEs of older model folders."""
