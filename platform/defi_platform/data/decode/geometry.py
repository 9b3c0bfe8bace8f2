"""Sizes of pictures: scaling and cropping that cover a target with the aspect kept.

T frames, H height, W width.
"""

from __future__ import annotations

import numpy as np


def fitted(source: tuple[int, int], target: tuple[int, int]) -> tuple[int, int]:
    """Scales (height, width) `source` so that it covers `target` with its aspect kept."""
    scale = max(target[0] / source[0], target[1] / source[1])
    return max(target[0], round(source[0] * scale)), max(target[1], round(source[1] * scale))


def centre_crop(frames: np.ndarray, height: int, width: int) -> np.ndarray:
    """Crops frames to their centre.

    Args:
        frames: (T, h, w, 3).
        height: at most h.
        width: at most w.

    Returns: (T, height, width, 3), a view.
    """
    top = (frames.shape[1] - height) // 2
    left = (frames.shape[2] - width) // 2
    return frames[:, top : top + height, left : left + width]
