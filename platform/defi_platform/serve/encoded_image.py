"""PNG and JPEG images from strangers: what they would take is read from their headers before they are decoded."""

from __future__ import annotations

import io
import warnings

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from defi_platform.serve.refusals import ObservationError
from defi_platform.serve.wording import shown

FORMATS = ("PNG", "JPEG")
MAX_SIDE = 4096
"""Pixels of a side: a decoded image has at most 48 MiB."""
MAX_ASPECT = 16
"""Long side over short side; no camera has more, and a resize that covers its target costs by it."""

MAX_READS = 50_000
"""Reads of one file. Pillow walks chunks of a PNG and segments of a JPEG file in Python with some three reads each: 16 MiB
of empty ones are six seconds, in which the replica's other sockets wait for the interpreter."""
MAX_SCANS = 50
"""Passes over the pixels of a progressive JPEG file; encoders make some ten. One may have a few bytes and costs as much as
the picture is large: 16 MiB of them would keep a thread busy for an hour."""

# The limits above are ours and are checked before a pixel is decoded; Pillow's own would only warn.
Image.MAX_IMAGE_PIXELS = MAX_SIDE * MAX_SIDE


def decode(data: bytes, key: str) -> NDArray[np.uint8]:
    """The picture of an encoded image.

    Args:
        data: a PNG or JPEG file.
        key: of the observation, for the message.

    Returns: (h, w, 3) uint8 RGB; grey images are repeated over the channels, transparency and
        the orientation that a camera noted (EXIF) are left out, as in training.

    Raises:
        ObservationError: another format, damaged, too large or too narrow, of more than 8 bits of grey, or made to be
            slow.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(_Reader(data, key), formats=FORMATS) as image:
                check_size((image.height, image.width), key)
                if image.mode[0] in "IF":
                    # Pillow would cut every value off at 255: depth, for one, would be a white picture.
                    raise ObservationError(
                        f"'{key}' has grey values of more than 8 bits; send 8 bits a channel."
                    )
                if image.format != "PNG" and data.count(b"\xff\xda") > MAX_SCANS:
                    raise ObservationError(
                        f"'{key}' is a JPEG file of more than {MAX_SCANS} scans; save it anew."
                    )
                return np.asarray(image.convert("RGB"))
    except ObservationError:
        raise
    except Image.DecompressionBombError as error:
        raise ObservationError(
            f"'{key}' has far too many pixels; at most {MAX_SIDE} a side are read. Send smaller images."
        ) from error
    except (
        Exception
    ) as error:  # Pillow raises whatever its decoders do: OSError, SyntaxError, struct.error, ...
        # Of what it does not know it names the object it read from, not the fault.
        why = "" if isinstance(error, UnidentifiedImageError) else f": {shown(str(error), 120)}"
        raise ObservationError(
            f"'{key}' is {len(data)} bytes that are no {' or '.join(FORMATS)} image{why}."
        ) from error


class _Reader(io.BytesIO):
    """A file that ends the reading of one with too many parts."""

    def __init__(self, data: bytes, key: str) -> None:
        super().__init__(data)
        self._key = key
        self._left = MAX_READS

    def read(self, size: int | None = -1, /) -> bytes:
        """Some bytes of it, as `io.BytesIO.read`."""
        self._left -= 1
        if self._left < 0:
            raise ObservationError(f"'{self._key}' is a file of too many parts to be read; save it anew.")
        return super().read(size)


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
