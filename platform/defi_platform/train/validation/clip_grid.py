"""Predicted clips next to true ones: an image grid of all frames, and a video."""

from __future__ import annotations

import io
import itertools
from collections.abc import Sequence

import numpy as np

from defi_client.recording.h264 import encode_h264

GAP = 2
"""White pixels between frames."""
VIDEO_FPS = 4
"""Slow enough to compare; the time between a clip's frames depends on its video."""


def image_grid(rows: Sequence[np.ndarray]) -> bytes:
    """A PNG of clips, each in `len(rows)` rows of frames.

    Args:
        rows: uint8 (B, T, H, W, 3) each; such as truth and prediction.
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


def encode_video(rows: Sequence[np.ndarray]) -> bytes:
    """An H.264 mp4 of clips, one below the other, with the `rows` as columns.

    Args:
        rows: uint8 (B, T, H, W, 3) each.
    """
    clips, frames, height, width, _ = rows[0].shape
    # H.264 wants even sides.
    tall, wide = (side + side % 2 for side in (clips * (height + GAP), len(rows) * (width + GAP)))
    canvas = np.full((frames, tall, wide, 3), 255, np.uint8)
    for clip, column in itertools.product(range(clips), range(len(rows))):
        top, left = clip * (height + GAP), column * (width + GAP)
        canvas[:, top : top + height, left : left + width] = rows[column][clip]
    return encode_h264(list(canvas), VIDEO_FPS)
