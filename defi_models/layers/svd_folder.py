"""A diffusers Stable Video Diffusion folder: UNet, VAE and scheduler, as SVD and the released GFDM are published."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from defi_models.encoders.lazy_diffusers import diffusers_class
from defi_models.encoders.public_folder import load_backbone
from defi_models.encoders.vae import VaeCodec
from defi_models.errors import ModelFolderError
from defi_models.layers.video_unet import (
    DiffusersUNet,
    SchedulerConfig,
    UNetConfig,
    read_scheduler,
    unet_config,
)


@dataclass(frozen=True)
class SvdParts:
    """The parts of a folder, with their configs."""

    folder: Path
    unet: DiffusersUNet
    unet_config: UNetConfig
    codec: VaeCodec
    scheduler: SchedulerConfig

    @property
    def frames(self) -> int:
        """Frames of a clip that the UNet was made for."""
        return int(self.unet.config.num_frames)

    def check_width(self, text_copies: int, text_dim: int) -> None:
        """Compares the widths that the UNet reads with those that the parts around it make.

        Raises:
            ModelFolderError: Naming the UNet's config file and both numbers.
        """
        file, expected = self.folder / "unet" / "config.json", text_copies * text_dim
        if self.unet.config.cross_attention_dim != expected:
            raise ModelFolderError(
                f"{file}: cross_attention_dim is {self.unet.config.cross_attention_dim}, but {text_copies} copies of "
                f"{text_dim}-wide text states make {expected}."
            )
        channels = 2 * self.codec.config.channels
        if self.unet.config.in_channels != channels:
            raise ModelFolderError(
                f"{file}: in_channels is {self.unet.config.in_channels}; latents and condition of the VAE in "
                f"{self.folder / 'vae'} make {channels}."
            )


def read_svd(folder: Path) -> SvdParts:
    """The parts of a folder; whatever else the pipeline has is not read.

    Raises:
        ModelFolderError: Naming the file and what was expected.
    """
    scheduler = read_scheduler(folder / "scheduler")
    codec = VaeCodec.from_folder(folder / "vae")
    unet = load_backbone(diffusers_class("UNetSpatioTemporalConditionModel"), folder / "unet")
    return SvdParts(folder, unet, unet_config(unet, folder / "unet"), codec, scheduler)
