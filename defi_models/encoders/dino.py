"""DINOv2 with registers as patch features."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from defi_models.encoders.frozen import Frozen

_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)


class DinoPatches(Frozen):
    """DINOv2 ViT-B/14 with registers, frozen: its normalised patch tokens, row-major.

    Shapes: uint8 (N, H, W, 3) -> (N, (image_size / patch_size)^2, hidden_size).
    """

    @dataclass(kw_only=True, frozen=True)
    class Config:
        kind: ClassVar[str] = "dinov2"
        image_size: int = 224
        """Pixels per side that the backbone sees; other sizes are resized."""
        trained_image_size: int = 518
        """Pixels per side that the position embeddings were trained for."""
        patch_size: int = 14
        hidden_size: int = 768
        num_hidden_layers: int = 12
        num_attention_heads: int = 12
        mlp_ratio: int = 4
        num_register_tokens: int = 4
        use_swiglu_ffn: bool = False

        @property
        def dim(self) -> int:
            return self.hidden_size

    def __init__(self, config: Config) -> None:
        from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

        super().__init__()
        self.config = config
        names = ("patch_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "mlp_ratio")
        names += ("num_register_tokens", "use_swiglu_ffn")
        dino = Dinov2WithRegistersConfig(
            **{name: getattr(config, name) for name in names}, image_size=config.trained_image_size
        )
        dino._attn_implementation = "sdpa"
        self.model = Dinov2WithRegistersModel(dino)
        self.freeze()

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """uint8 (N, H, W, 3) -> (N, L, hidden_size)."""
        pixels = images.movedim(-1, -3).float() / 255.0
        size = self.config.image_size
        if pixels.shape[-2:] != (size, size):
            pixels = F.interpolate(pixels, (size, size), mode="bilinear", antialias=True, align_corners=False)
        mean = torch.tensor(_IMAGENET_MEAN, device=pixels.device)[:, None, None]
        std = torch.tensor(_IMAGENET_STD, device=pixels.device)[:, None, None]
        tokens = self.model(pixel_values=((pixels - mean) / std).to(self.dtype)).last_hidden_state
        return tokens[:, 1 + self.config.num_register_tokens :]
