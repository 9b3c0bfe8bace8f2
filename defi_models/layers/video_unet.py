"""The video UNet and the noise scheduler of Stable Video Diffusion: sizes, building, reading from folders."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from defi_models.encoders.lazy_diffusers import diffusers_class
from defi_models.encoders.public_folder import read_public_config
from defi_models.errors import ConfigurationError, ModelFolderError
from defi_models.pretrained.configuration import from_mapping

# A type checker sees empty placeholders for the classes of diffusers.
DiffusersUNet: TypeAlias = Any
DiffusersScheduler: TypeAlias = Any


@dataclass(kw_only=True, frozen=True)
class UNetConfig:
    """Sizes of diffusers' `UNetSpatioTemporalConditionModel`, under its names.

    Sizes that follow from the codec and the text encoder are not repeated here.
    """

    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int = 2
    transformer_layers_per_block: int = 1
    num_attention_heads: tuple[int, ...] = (5, 10, 20, 20)
    addition_time_embed_dim: int = 256
    attention_down_blocks: tuple[bool, ...] = (True, True, True, False)
    """Whether each down-block attends to text; the up-blocks mirror them."""
    sample_size: int = 96


@dataclass(kw_only=True, frozen=True)
class SchedulerConfig:
    """Settings of diffusers' `EulerDiscreteScheduler`, under its names; the defaults are SVD's."""

    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: str = "scaled_linear"
    num_train_timesteps: int = 1000
    prediction_type: str = "v_prediction"
    interpolation_type: str = "linear"
    use_karras_sigmas: bool = True
    use_exponential_sigmas: bool = False
    use_beta_sigmas: bool = False
    sigma_min: float = 0.002
    sigma_max: float = 700.0
    timestep_spacing: str = "leading"
    timestep_type: str = "continuous"
    steps_offset: int = 1
    rescale_betas_zero_snr: bool = False
    final_sigmas_type: str = "zero"


def build_unet(
    config: UNetConfig, *, latent_channels: int, text_dim: int, frames: int, last_feature_block: int
) -> DiffusersUNet:
    """The UNet with random weights.

    Args:
        config: sizes of the UNet.
        latent_channels: of the codec; the input holds noisy latents and condition, twice as many.
        text_dim: width of the text states as the UNet sees them.
        frames: frames of a clip.
        last_feature_block: highest up-block that features are read from.

    Returns:
        diffusers' `UNetSpatioTemporalConditionModel`.

    Raises:
        ConfigurationError: When lists of per-block sizes differ in length or the block does not exist.
    """
    blocks = len(config.block_out_channels)
    if not blocks == len(config.num_attention_heads) == len(config.attention_down_blocks):
        raise ConfigurationError(
            "unet.block_out_channels, num_attention_heads and attention_down_blocks need one entry per block: "
            f"{config.block_out_channels}, {config.num_attention_heads}, {config.attention_down_blocks} given."
        )
    if last_feature_block >= blocks:
        raise ConfigurationError(
            f"feature_blocks names up-block {last_feature_block}; the UNet has {blocks}."
        )
    down = _down_blocks(config.attention_down_blocks)
    return diffusers_class("UNetSpatioTemporalConditionModel")(
        sample_size=config.sample_size,
        in_channels=2 * latent_channels,
        out_channels=latent_channels,
        down_block_types=down,
        up_block_types=tuple(name.replace("Down", "Up") for name in reversed(down)),
        block_out_channels=config.block_out_channels,
        addition_time_embed_dim=config.addition_time_embed_dim,
        projection_class_embeddings_input_dim=3 * config.addition_time_embed_dim,
        layers_per_block=config.layers_per_block,
        transformer_layers_per_block=config.transformer_layers_per_block,
        cross_attention_dim=text_dim,
        num_attention_heads=config.num_attention_heads,
        num_frames=frames,
    )


def unet_config(unet: DiffusersUNet, folder: Path) -> UNetConfig:
    """Our config of a UNet read from a diffusers folder.

    Raises:
        ModelFolderError: When the UNet is of a shape that this config cannot describe.
    """
    theirs = dict(unet.config)
    blocks = len(theirs["block_out_channels"])
    ours = {item.name: theirs[item.name] for item in fields(UNetConfig) if theirs.get(item.name) is not None}
    if isinstance(ours["num_attention_heads"], int):
        ours["num_attention_heads"] = [ours["num_attention_heads"]] * blocks
    attends = tuple(name.startswith("CrossAttn") for name in theirs["down_block_types"])
    mirrored = tuple(name.replace("Down", "Up") for name in reversed(_down_blocks(attends)))
    if (
        tuple(theirs["down_block_types"]) != _down_blocks(attends)
        or tuple(theirs["up_block_types"]) != mirrored
    ):
        raise ModelFolderError(
            f"{folder / 'config.json'}: up_block_types {theirs['up_block_types']} do not mirror "
            f"down_block_types {theirs['down_block_types']}."
        )
    try:
        return from_mapping(
            UNetConfig, ours | {"attention_down_blocks": attends}, str(folder / "config.json")
        )
    except ConfigurationError as error:
        raise ModelFolderError(str(error)) from error


class FirstStep(NamedTuple):
    """Constants of the first step of a schedule, the one denoising step that features are read from."""

    timestep: float
    """The UNet's conditioning, ln(sigma) / 4."""
    noise_scale: float
    """Standard deviation of the initial noise."""
    input_scale: float
    """Factor of `scale_model_input`."""


def read_first_step(scheduler: DiffusersScheduler, steps: int) -> FirstStep:
    """The constants of the first of `steps` steps; the scheduler itself is left as it is."""
    scheduler = copy.deepcopy(scheduler)
    with torch.device("cpu"):
        scheduler.set_timesteps(steps)
    input_scale = 1 / (float(scheduler.sigmas[0]) ** 2 + 1) ** 0.5
    return FirstStep(float(scheduler.timesteps[0]), float(scheduler.init_noise_sigma), input_scale)


def denoise_clip(
    scheduler: DiffusersScheduler, steps: int, noise: Tensor, predict: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """Samples latents by the scheduler's rule; the scheduler itself is left as it is.

    Args:
        scheduler: the noise schedule.
        steps: denoising steps.
        noise: float (B, T, C, h, w), standard normal.
        predict: (scaled noisy latents, timestep, a scalar) -> the UNet's output, both like `noise`.

    Returns:
        The denoised latents, like `noise`.
    """
    scheduler = copy.deepcopy(scheduler)
    scheduler.set_timesteps(steps, device=noise.device)
    latents: Tensor = noise * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        output = predict(scheduler.scale_model_input(latents, timestep), timestep)
        latents = scheduler.step(output, timestep, latents).prev_sample
    return latents


def build_scheduler(config: SchedulerConfig) -> DiffusersScheduler:
    """The scheduler; its schedule is numbers even where the model around is built on the meta device."""
    with torch.device("cpu"):
        return diffusers_class("EulerDiscreteScheduler")(**asdict(config))


def read_scheduler(folder: Path) -> SchedulerConfig:
    """The config of an `EulerDiscreteScheduler` folder.

    Raises:
        ModelFolderError: When it is missing, of another class, or has settings that this config does not know.
    """
    file = "scheduler_config.json"
    content = read_public_config(folder, "EulerDiscreteScheduler", file)
    name = content.get("_class_name")
    if name != "EulerDiscreteScheduler":
        raise ModelFolderError(
            f"{folder / file} is of {name}; EulerDiscreteScheduler is expected, as SVD ships."
        )
    # diffusers' own defaults hold for what the file leaves out, not SVD's
    known = {item.name for item in fields(SchedulerConfig)}
    scheduler = diffusers_class("EulerDiscreteScheduler")
    theirs: DiffusersScheduler = scheduler(**{k: v for k, v in content.items() if k in known})
    full = dict(theirs.config)
    dropped = [k for k, v in content.items() if k not in known and not k.startswith("_") and v != full.get(k)]
    unsupported = [key for key in dropped if content[key] not in (None, False)]
    full = {key: value for key, value in full.items() if key in known}
    missing_keys = [key for key, value in full.items() if value is None]
    if missing_keys:
        raise ModelFolderError(
            f"{folder / file} does not set {', '.join(missing_keys)}, which SVD's schedule needs."
        )
    if "trained_betas" in unsupported:
        raise ModelFolderError(f"{folder / file} sets trained_betas, which SVD's schedule has not.")
    try:
        return from_mapping(SchedulerConfig, full, str(folder / file))
    except ConfigurationError as error:
        raise ModelFolderError(str(error)) from error


def _down_blocks(attends: Sequence[bool]) -> tuple[str, ...]:
    return tuple(f"{'CrossAttn' if each else ''}DownBlockSpatioTemporal" for each in attends)
