"""Fixed block-DCT transforms: an image codec and patch features that need no weights.

An image is turned into orthonormal luma/chroma, cut into square blocks, and each block into its DCT
coefficients, of which the lowest frequencies are kept and scaled by fixed constants to about unit variance.
The transform is orthonormal, so that the kept coefficients decode back to pixels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from defi_models.precision import Float32Constants, to_signed_unit, to_uint8

# Standard deviations measured once on 88 frames of robot and human video at 64x64, pixels in [-1, 1] and
# 8x8 blocks (shared sample corpora), rounded to a law: DC as given, frequency r as AC * r**-1.2.
_DC_STD = (6.0, 1.7, 0.5)  # luma, red-blue, green-magenta
_AC_STD = (1.8, 0.5, 0.16)
_AC_EXPONENT = -1.2
_MEASURED_BLOCK = 8


def _basis(block: int) -> Tensor:
    """(block, block) orthonormal DCT-II: row k is the k-th cosine."""
    position = torch.arange(block, dtype=torch.float64)
    frequency = position[:, None]
    cosines = torch.cos(math.pi * (2 * position + 1) * frequency / (2 * block)) * math.sqrt(2 / block)
    cosines[0] /= math.sqrt(2)
    return cosines


def _colour() -> Tensor:
    """(3, 3) orthonormal: rows luma, red minus blue, green against both."""
    rows = torch.tensor([[1, 1, 1], [1, 0, -1], [1, -2, 1]], dtype=torch.float64)
    lengths: Tensor = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    return rows / lengths


def _lowest_frequencies(block: int) -> list[tuple[int, int]]:
    """All (row, column) frequencies of a block, the lowest first."""
    every = [(row, column) for row in range(block) for column in range(block)]
    return sorted(every, key=lambda f: (f[0] + f[1], max(f), f))


def _kernels(block: int, luma: int, chroma: int) -> tuple[Tensor, Tensor]:
    """The transform as convolution kernels (C, 3, block, block) and the standard deviation of each (C,)."""
    basis, colour, frequencies = _basis(block), _colour(), _lowest_frequencies(block)
    kernels, deviations = [], []
    for plane, kept in enumerate((luma, chroma, chroma)):
        for row, column in frequencies[:kept]:
            kernels.append(colour[plane][:, None, None] * torch.outer(basis[row], basis[column]))
            radius = math.hypot(row, column)
            deviation = _AC_STD[plane] * radius**_AC_EXPONENT if radius else _DC_STD[plane]
            deviations.append(deviation * block / _MEASURED_BLOCK)
    return torch.stack(kernels), torch.tensor(deviations, dtype=torch.float64)


class BlockDctCodec(Float32Constants):
    """Latent space of `nano`: low-frequency block-DCT coefficients, decodable back to pixels.

    Shapes: images (N, 3, H, W) in [-1, 1]; latents (N, luma + 2 * chroma, H / block, W / block).
    """

    @dataclass(kw_only=True, frozen=True)
    class Config:
        """Block size and the coefficients that are kept."""

        kind: ClassVar[str] = "block_dct"
        block: int = 8
        """Pixels per side of a block, so of a latent."""
        luma: int = 10
        """Luma coefficients kept per block."""
        chroma: int = 3
        """Coefficients kept of each of the two chroma planes."""
        scaling_factor: float = 1.0
        """Factor from latents to those that the UNet sees."""

        @property
        def channels(self) -> int:
            """Channels of the latents."""
            return self.luma + 2 * self.chroma

        @property
        def downscale(self) -> int:
            """Pixels per side of a latent."""
            return self.block

    encode_kernel: Tensor
    decode_kernel: Tensor

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        kernels, deviations = _kernels(config.block, config.luma, config.chroma)
        scale = deviations[:, None, None, None]
        self.register_buffer("encode_kernel", (kernels / scale).float(), persistent=False)
        self.register_buffer("decode_kernel", (kernels * scale).float(), persistent=False)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Latents of images: float (N, 3, H, W) in [-1, 1] -> float32 (N, C, h, w), not scaled by `scaling_factor`."""
        return F.conv2d(images.float(), self.encode_kernel, stride=self.config.block)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Pixels of unscaled latents: float (B, T, C, h, w) -> uint8 (B, T, H, W, 3)."""
        flat = latents.flatten(0, 1).float()
        images = F.conv_transpose2d(flat, self.decode_kernel, stride=self.config.block)
        return torch.unflatten(to_uint8(images), 0, latents.shape[:2])


class BlockDctPatches(Float32Constants):
    """Patch features of `nano`: whitened DCT coefficients of every block, blocks in row-major order.

    Shapes: uint8 (N, H, W, 3) -> (N, L, dim), L = (H / block) * (W / block).
    """

    @dataclass(kw_only=True, frozen=True)
    class Config:
        """Block size and the coefficients that are kept."""

        kind: ClassVar[str] = "block_dct"
        block: int = 8
        """Pixels per side of a block, so of a patch."""
        luma: int = 24
        """Luma coefficients kept per block."""
        chroma: int = 6
        """Coefficients kept of each of the two chroma planes."""

        @property
        def dim(self) -> int:
            """Width of a patch feature."""
            return self.luma + 2 * self.chroma

    kernel: Tensor

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        kernels, deviations = _kernels(config.block, config.luma, config.chroma)
        self.register_buffer("kernel", (kernels / deviations[:, None, None, None]).float(), persistent=False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Patch features of images: uint8 (N, H, W, 3) -> float32 (N, L, dim), about unit variance per channel."""
        coefficients = F.conv2d(to_signed_unit(images), self.kernel, stride=self.config.block)
        return coefficients.flatten(2).transpose(1, 2)
