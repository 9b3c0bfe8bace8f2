"""The one resize of pictures: training, caches, validation, serving and clients see the same bytes.

Definition: of a source (h, w), the largest centred box with the aspect of the target (H, W) is scaled to (H, W) by
Pillow's BILINEAR filter (`Image.resize(box=...)`), which is widened by the scale on the way down (antialias) and
reaches over the box's edges into the rest of the picture. That is "scale until the target is covered, then crop the
centre" without rounding to whole pixels; where the aspects are equal it is torchvision's antialiased Resize. A picture
that has the target's size comes back bit for bit.

Runs in decoder processes and in clients: imports NumPy and Pillow only.
"""

from __future__ import annotations

import functools
import math

import numpy as np
from numpy.typing import NDArray
from PIL import Image, _imaging

# Pillow gives every picture's memory back to the system by default; one block that it keeps (16 MB) spares small
# pictures a third of their time.
_imaging.set_blocks_max(max(1, _imaging.get_blocks_max()))


def resize(picture: NDArray[np.uint8] | Image.Image, size: tuple[int, int]) -> NDArray[np.uint8]:
    """Resized picture: covers the target with its aspect kept, centre cut out.

    Args:
        picture: RGB, uint8 (h, w, 3) or a Pillow image of mode RGB; left as it is.
        size: (H, W) in pixels.

    Returns: uint8 (H, W, 3); may be read-only, and is the array passed in where that has the size already.
    """
    if isinstance(picture, Image.Image):
        assert picture.mode == "RGB", picture.mode
        width, height = picture.size
    else:
        assert picture.dtype == np.uint8 and picture.shape[2:] == (3,), (picture.dtype, picture.shape)
        height, width = picture.shape[:2]
    if (height, width) == size:
        return np.asarray(picture)
    top, bottom, above, below = _span(height, width, *size)
    left, right, before, behind = _span(width, height, size[1], size[0])
    # Arrays and images are cut alike before they are scaled: it saves most of a wide picture's cost, and Pillow's
    # rounding depends on the size of what it is given.
    region = (left, top, right, bottom)
    image = picture.crop(region) if isinstance(picture, Image.Image) else _image(picture, region)
    return np.asarray(image.resize(size[::-1], Image.Resampling.BILINEAR, (before, above, behind, below)))


@functools.lru_cache(maxsize=4096)
def _span(length: int, across: int, target: int, target_across: int) -> tuple[int, int, float, float]:
    """Needed part of one side: (first, end) in whole pixels, and the box's edges counted from `first`."""
    kept = min(float(length), across * target / target_across)
    start = (length - kept) / 2
    reach = math.ceil(max(1.0, kept / target)) + 1
    first = max(0, math.floor(start) - reach)
    end = length - first
    return first, end, start - first, length - start - first


def _image(array: NDArray[np.uint8], region: tuple[int, int, int, int]) -> Image.Image:
    """Pillow image of a region (left, top, right, bottom) of (h, w, 3): one copy, which Pillow's layout needs."""
    left, top, right, bottom = region
    rows = np.ascontiguousarray(array[top:bottom]).reshape(-1)
    stride = array.shape[1] * 3
    return Image.frombuffer("RGB", (right - left, bottom - top), rows[left * 3 :], "raw", "RGB", stride, 1)
