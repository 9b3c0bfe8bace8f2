"""DINOv2 with registers as patch features."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from defi_models.encoders.frozen import Frozen
from defi_models.encoders.public_folder import known_fields, load_backbone

_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)
_SHARED_FIELDS = (
    "patch_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "mlp_ratio",
    "num_register_tokens",
    "use_swiglu_ffn",
)


class DinoPatches(Frozen):
    """DINOv2 ViT-B/14 with registers, frozen: its normalised patch tokens, row-major.

    Shapes: uint8 (N, H, W, 3) -> (N, (image_size / patch_size)^2, hidden_size).
    """

    @dataclass(kw_only=True, frozen=True)
    class Config:
        """Sizes of the backbone, under the names of transformers; the defaults are ViT-B/14's with registers."""

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
            """Width of a patch feature."""
            return self.hidden_size

    def __init__(self, config: Config, model: Any = None) -> None:
        from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

        super().__init__()
        self.config = config
        if model is None:
            dino = Dinov2WithRegistersConfig(
                **{name: getattr(config, name) for name in _SHARED_FIELDS},
                image_size=config.trained_image_size,
            )
            dino._attn_implementation = "sdpa"
            model = Dinov2WithRegistersModel(dino)
        self.model = model
        self.freeze()

    @classmethod
    def from_folder(cls, folder: str | Path, image_size: int = 224) -> Self:
        """The backbone of a transformers DINOv2-with-registers folder.

        Raises:
            ModelFolderError: Naming the file and what was expected.
        """
        from transformers import Dinov2WithRegistersModel

        model = load_backbone(Dinov2WithRegistersModel, folder, attn_implementation="sdpa")
        names = {name: name for name in _SHARED_FIELDS} | {"trained_image_size": "image_size"}
        return cls(cls.Config(image_size=image_size, **known_fields(model.config.to_dict(), names)), model)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Patch features of images: uint8 (N, H, W, 3) -> (N, L, hidden_size)."""
        pixels = images.movedim(-1, -3).float() / 255.0
        size = self.config.image_size
        if pixels.shape[-2:] != (size, size):
            pixels = F.interpolate(pixels, (size, size), mode="bilinear", antialias=True, align_corners=False)
        mean = torch.tensor(_IMAGENET_MEAN, device=pixels.device)[:, None, None]
        std = torch.tensor(_IMAGENET_STD, device=pixels.device)[:, None, None]
        tokens: Tensor = self.model(pixel_values=((pixels - mean) / std).to(self.dtype)).last_hidden_state
        return tokens[:, 1 + self.config.num_register_tokens :]
