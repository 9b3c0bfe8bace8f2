"""GFDM: clips of video, denoised."""

from __future__ import annotations

import io
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import nn

from defi_platform import storage
from defi_platform.data.rules import ClipRule, Rule
from defi_platform.train.draws import sample_generators
from defi_platform.train.recipes.video import VideoRecipe, load_folder, model_errors

SHOWN_CLIPS = 4
SAMPLING_STEPS = 10
GAP = 2
"""White pixels between the pictures of a strip."""


class GFDMRecipe(VideoRecipe):
    """Forward dynamics pretraining."""

    kind = "gfdm"

    def rule(self) -> Rule:
        data = self.config.data
        return ClipRule(data.clip_frames, data.clip_span_s)

    def build_without_cache(self) -> nn.Module:
        from defi_models import presets
        from defi_models.gfdm import ForwardDynamics

        model = self.config.model
        with model_errors():
            built = (
                load_folder(ForwardDynamics.from_pretrained, model.init_from)
                if model.init_from
                else ForwardDynamics(presets.gfdm(model.preset, **model.overrides))
            )
        data = self.config.data
        for name, given in (("frames", data.clip_frames), ("height", data.height), ("width", data.width)):
            field = "clip_frames" if name == "frames" else name
            self.check_size(name, getattr(built.config, name), given, field)
        return built

    def media(self, model: nn.Module, batch: dict[str, Any], folder: str, step: int) -> list[str]:
        """Three rows per clip: what happened, and what the model makes of the first frame and the text in one
        denoising step (which is what the policy reads) and in SAMPLING_STEPS."""
        truth = batch["frames"][:SHOWN_CLIPS]
        rows = [truth.numpy()]
        for steps in (1, SAMPLING_STEPS):
            predicted = model.sample(  # type: ignore[operator]
                truth[:, 0],
                batch["text"][:SHOWN_CLIPS],
                steps=steps,
                generator=sample_generators(
                    self.config.train.seed, "media", batch["sample"][:SHOWN_CLIPS].tolist()
                ),
            )
            rows.append(predicted.cpu().numpy())
        name = f"media/clips_{step:06d}.png"
        storage.write_bytes(storage.join(folder, name), strips(rows))
        return [name]


def strips(rows: Sequence[np.ndarray]) -> bytes:
    """A PNG of clips, each in `len(rows)` rows of frames.

    Args:
        rows: uint8 (B, T, H, W, 3) each.
    """
    from PIL import Image

    clips, frames, height, width, _ = rows[0].shape
    clip_height = len(rows) * (height + GAP) + 3 * GAP
    canvas = np.full((clips * clip_height, frames * (width + GAP), 3), 255, np.uint8)
    for clip, row in itertools.product(range(clips), range(len(rows))):
        top = clip * clip_height + row * (height + GAP)
        for frame in range(frames):
            left = frame * (width + GAP)
            canvas[top : top + height, left : left + width] = rows[row][clip, frame]
    png = io.BytesIO()
    Image.fromarray(canvas).save(png, format="PNG")
    return png.getvalue()
