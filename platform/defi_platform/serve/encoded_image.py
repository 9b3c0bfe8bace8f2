"""PNG and JPEG images from strangers: what they would take is read from their headers before they are decoded."""

from __future__ import annotations

import io
import warnings

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from defi_platform.serve.refusals import ObservationError
from defi_platform.serve.wording import shown

FORMATS = ("PNG", "JPEG")
MAX_SIDE = 4096
"""Pixels of a side: a decoded image has at most 48 MiB."""
MAX_ASPECT = 16
"""Long side over short side; no camera has more, and a resize that covers its target costs by it."""

# The limits above are ours and are checked before a pixel is decoded; Pillow's own would only warn.
Image.MAX_IMAGE_PIXELS = MAX_SIDE * MAX_SIDE


def decode(data: bytes, key: str) -> NDArray[np.uint8]:
    """The picture of an encoded image.

    Args:
        data: a PNG or JPEG file.
        key: of the observation, for the message.

    Returns: (h, w, 3) uint8 RGB; grey images are repeated over the channels, transparency is dropped.

    Raises:
        ObservationError: another format, damaged, too large or too narrow.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                check_size((image.height, image.width), key)
                return np.asarray(image.convert("RGB"))
    except ObservationError:
        raise
    except (
        Exception
    ) as error:  # Pillow raises whatever its decoders do: OSError, SyntaxError, struct.error, ...
        raise ObservationError(
            f"'{key}' is {len(data)} bytes that are no {' or '.join(FORMATS)} image: {shown(str(error), 120)}"
        ) from error


def check_size(size: tuple[int, int], key: str) -> None:
    """Checks the height and width of a picture.

    Args:
        size: (h, w) in pixels.
        key: of the observation, for the message.

    Raises:
        ObservationError: a side of 0 or over `MAX_SIDE`, or sides further apart than `MAX_ASPECT`.
    """
    long, short = max(size), min(size)
    if long > MAX_SIDE:
        raise ObservationError(
            f"'{key}' is {size[1]}x{size[0]} pixels; at most {MAX_SIDE} a side are read. Send smaller images."
        )
    if short < 1 or long > MAX_ASPECT * short:
        raise ObservationError(
            f"'{key}' is {size[1]}x{size[0]} pixels; its sides may differ by a factor of {MAX_ASPECT} at most."
        )
