"""The frozen frame encoder of GFDM or GIDM, whose output a latent cache holds. T frames, H x W pixels."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

import numpy as np
import torch

from defi_models.pretrained.configuration import to_mapping
from defi_platform.data.latents.cache import EncoderInfo
from defi_platform.errors import ConfigError

if TYPE_CHECKING:
    from defi_models.gfdm import GFDM
    from defi_models.gidm import GIDM

DTYPES = ("float32", "float16")
"""Types that a cache can store."""


class FrameEncoder:
    """Encodes frames as the model itself does in training.

    Args:
        model: GFDM or GIDM, on the device that is to encode.

    Raises: ConfigError for a model that augments its frames in training, which what is encoded ahead does not allow.
    """

    def __init__(self, model: GFDM | GIDM) -> None:
        if getattr(model.config, "augmentation", None) is not None:
            raise ConfigError(
                f"this {model.kind} augments its frames in training, which frames encoded ahead do not allow. Set "
                "model.overrides.augmentation=null (for the encoding too), or data.cache=null."
            )
        self._model = model.eval()

    @torch.no_grad()
    def __call__(self, frames: np.ndarray) -> np.ndarray:
        """Encodes uint8 (T, H, W, 3) to float32 (T, ...): scaled latents (C, h, w) or patch features (L, D) per frame."""
        batch = torch.from_numpy(frames)[None]
        encoded: np.ndarray = self._model.encode_frames(batch)[0].float().cpu().numpy()
        return encoded

    def info(self, height: int, width: int, dtype: str = "float32") -> EncoderInfo:
        """Identifies the encoder's output.

        Args:
            height: of the frames, in pixels.
            width: of the frames, in pixels.
            dtype: of the stored output, one of `DTYPES`.

        Returns: name, shape, type and a fingerprint of configuration and weights.
        """
        kind, part = self._model.kind, self._model.frozen_encoder
        settings = {"encoder": to_mapping(part.config), "height": height, "width": width, "dtype": dtype}
        digest = hashlib.sha256(json.dumps([kind, settings], sort_keys=True).encode())
        for name, tensor in sorted(part.state_dict().items()):
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        shape = self(np.zeros((1, height, width, 3), np.uint8)).shape[1:]
        return EncoderInfo(
            kind=kind,
            column=self._model.cache_column,
            fingerprint=digest.hexdigest()[:16],
            describes=f"{type(part).__name__} at {height}x{width} as {dtype}",
            shape=tuple(shape),
            dtype=dtype,
        )
