"""Checks of a policy's observations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from defi_models.inputs.checks import check_tensor, check_texts, require


class ObservationShape(NamedTuple):
    """Sizes of what a policy observes."""

    views: int
    """Number of cameras."""
    height: int
    """Pixels of an image."""
    width: int
    """Pixels of an image."""
    proprio: int
    """Width of proprioception; 0: not read."""

    def checked(self, batch: Mapping[str, Any]) -> tuple[Tensor, Sequence[str], Tensor | None]:
        """Images, text and, where the policy reads it, proprioception of a batch.

        Raises:
            InputError: Naming the entry that is missing or does not fit.
        """
        images = self.images(require(batch, "images", "uint8 (B, V, H, W, 3)"))
        text = require(batch, "text", "a list of B strings")
        check_texts("text", text, len(images), "images")
        if not self.proprio:
            return images, text, None
        proprio = require(batch, "proprio", f"float (B, {self.proprio}); this policy reads proprioception")
        return images, text, check_tensor("proprio", proprio, (len(images), self.proprio), None)

    def images(self, images: object) -> Tensor:
        """Images (B, V, H, W, 3), checked.

        Raises:
            InputError: Saying what was expected and what was got.
        """
        shape = ("B", self.views, self.height, self.width, 3)
        hint = ""
        if isinstance(images, Tensor) and images.ndim == len(shape) and images.shape[1] != self.views:
            hint = f"{images.shape[1]} camera views were given; this policy reads {self.views}."
        return check_tensor("images", images, shape, torch.uint8, hint)
