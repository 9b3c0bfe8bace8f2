"""The SVD temporal VAE as latent codec."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from defi_models.encoders.block_dct import BlockDctCodec
from defi_models.encoders.frozen import Frozen
from defi_models.encoders.lazy_diffusers import diffusers_class
from defi_models.encoders.public_folder import known_fields, load_backbone
from defi_models.precision import to_uint8


class VaeCodec(Frozen):
    """`AutoencoderKLTemporalDecoder` of Stable Video Diffusion, frozen.

    Shapes: images (N, 3, H, W) in [-1, 1]; latents (N, 4, H / 8, W / 8).
    """

    @dataclass(kw_only=True, frozen=True)
    class Config:
        """Sizes of the VAE, under the names of diffusers; the defaults are Stable Video Diffusion's."""

        kind: ClassVar[str] = "vae"
        latent_channels: int = 4
        """Channels of the latents."""
        block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
        layers_per_block: int = 2
        sample_size: int = 768
        scaling_factor: float = 0.18215
        """Factor from latents to those that the UNet sees."""
        frames_per_pass: int = 16
        """Images that are encoded or decoded at once; bounds memory, changes nothing else but the decoder's
        temporal window."""

        @property
        def channels(self) -> int:
            """Channels of the latents."""
            return self.latent_channels

        @property
        def downscale(self) -> int:
            """Pixels per side of a latent."""
            return int(2 ** (len(self.block_out_channels) - 1))

    def __init__(self, config: Config, vae: Any = None) -> None:
        super().__init__()
        self.config = config
        self.vae: Any = vae or diffusers_class("AutoencoderKLTemporalDecoder")(
            down_block_types=("DownEncoderBlock2D",) * len(config.block_out_channels),
            block_out_channels=config.block_out_channels,
            layers_per_block=config.layers_per_block,
            latent_channels=config.latent_channels,
            sample_size=config.sample_size,
            scaling_factor=config.scaling_factor,
        )
        self.freeze()

    @classmethod
    def from_folder(cls, folder: str | Path) -> Self:
        """The codec of the `vae` folder of a diffusers SVD pipeline.

        Raises:
            ModelFolderError: Naming the file and what was expected.
        """
        vae = load_backbone(diffusers_class("AutoencoderKLTemporalDecoder"), folder)
        names = ("latent_channels", "block_out_channels", "layers_per_block", "sample_size", "scaling_factor")
        return cls(cls.Config(**known_fields(vae.config, {name: name for name in names})), vae)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Latents of images, the mode: float (N, 3, H, W) in [-1, 1] -> float32 (N, C, h, w), not scaled."""
        parts = torch.split(images.to(self.dtype), self.config.frames_per_pass)
        # `vae.encode` also computes the spread around the mode
        moments = torch.cat([self.vae.quant_conv(self.vae.encoder(part)) for part in parts])
        return moments[:, : self.config.latent_channels].float()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Pixels of unscaled latents: float (B, T, C, h, w) -> uint8 (B, T, H, W, 3)."""
        clips = []
        for clip in latents.to(self.dtype):
            parts = torch.split(clip, self.config.frames_per_pass)
            clips.append(torch.cat([to_uint8(self.vae.decode(p, num_frames=len(p)).sample) for p in parts]))
        return torch.stack(clips)


def build_codec(config: VaeCodec.Config | BlockDctCodec.Config) -> VaeCodec | BlockDctCodec:
    """The latent codec of GFDM, with random weights where it has any."""
    return VaeCodec(config) if isinstance(config, VaeCodec.Config) else BlockDctCodec(config)
