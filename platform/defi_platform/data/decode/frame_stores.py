"""Readers of episodes that are not video files: encoded or raw pictures in TFRecords, npz files and HDF5.

Each has the interface of `video_readers.Reader`.
"""

from __future__ import annotations

import abc
import io
import math
import zipfile
from collections.abc import Callable
from typing import Any, Final

import numpy as np
from PIL import Image, UnidentifiedImageError

from defi_platform import storage
from defi_platform.data.rejection import BadVideo
from defi_platform.data.sources.hdf5 import IMAGES, own_dataset
from defi_platform.data.sources.rlds.tfrecord import DamagedRecord, parse_example, read_record
from defi_platform.data.sources.uri import VideoUri

LARGEST_FRAME = 1 << 30
"""Bytes that a frame may say it has before any of it is read."""


class FrameStore(abc.ABC):
    """A series of pictures that are read one by one."""

    num_frames: int
    codec: str
    """jpeg | png | npz | raw"""

    def picture(self, index: int) -> Image.Image:
        """Reads one frame in its own size. Raises: BadVideo."""
        if index >= self.num_frames:
            raise BadVideo("short", f"frame {index} asked, {self.num_frames} there")
        return self._picture(index)

    @abc.abstractmethod
    def _picture(self, index: int) -> Image.Image:
        """Reads a frame that is there."""

    def close(self) -> None:  # noqa: B027  only HDF5 keeps a file open
        """Closes open files."""


class RldsStore(FrameStore):
    """One camera of one RLDS episode."""

    def __init__(self, uri: VideoUri, verify: bool = False) -> None:
        offset, length = uri.span
        camera = uri.where[2]
        try:
            with storage.open_seekable(uri.path) as file:
                features = parse_example(read_record(file, offset, length, verify))
        except DamagedRecord as error:
            raise BadVideo("corrupt", str(error)) from error
        name = camera if camera.startswith("steps/") else f"steps/observation/{camera}"
        images = features.get(name)
        if not isinstance(images, list):
            raise BadVideo("corrupt", f"the record has no {name}")
        self._images = images
        self.num_frames = len(images)
        self.codec = "png" if images and bytes(images[0][:4]) == b"\x89PNG" else "jpeg"

    def _picture(self, index: int) -> Image.Image:
        return decoded_image(self._images[index], f"step {index}")


class CalvinStore(FrameStore):
    """One camera of a run of CALVIN frames, one npz file each."""

    codec = "npz"

    def __init__(self, uri: VideoUri, verify: bool = False) -> None:
        self._folder = uri.path
        self._first, last = uri.span
        self._camera = uri.where[2]
        self.num_frames = last - self._first + 1

    def _picture(self, index: int) -> Image.Image:
        name = f"episode_{self._first + index:07d}.npz"
        try:
            content = io.BytesIO(storage.read_bytes(storage.join(self._folder, name)))
            with np.load(content, allow_pickle=False) as frame:
                return raw_image(frame[self._camera], name)
        except FileNotFoundError as error:
            raise BadVideo("missing", f"{name} is not there") from error
        except (ValueError, KeyError, OSError, TypeError, EOFError, zipfile.BadZipFile) as error:
            raise BadVideo("corrupt", f"{name}: {error}") from error


class Hdf5Store(FrameStore):
    """One camera of one HDF5 episode: frames, or JPEG bytes per frame where `compress` is set."""

    def __init__(self, uri: VideoUri, verify: bool = False) -> None:
        import h5py

        camera = uri.where[0]
        try:
            self._source = storage.open_seekable(uri.path)
            self._file = h5py.File(self._source, "r")
            self._images: Any = own_dataset(self._file, f"{IMAGES}/{camera}")
            self.num_frames = len(self._images)
        except (OSError, KeyError, ValueError, RuntimeError) as error:
            if isinstance(error, FileNotFoundError):
                raise
            raise BadVideo("unreadable", f"HDF5: {error}") from error
        frame_bytes = self._images.dtype.itemsize * math.prod(self._images.shape[1:])
        if frame_bytes > LARGEST_FRAME:
            raise BadVideo("memory", f"a frame of {frame_bytes:,} bytes")
        self._compressed = bool(self._file.attrs.get("compress", False) or self._images.ndim < 3)
        self.codec = "jpeg" if self._compressed else "raw"

    def _picture(self, index: int) -> Image.Image:
        try:
            value = self._images[index]
        except OSError as error:
            raise BadVideo("corrupt", f"frame {index}: {error}") from error
        if self._compressed:
            return decoded_image(
                value.tobytes() if hasattr(value, "tobytes") else bytes(value), f"frame {index}"
            )
        return raw_image(value, f"frame {index}")

    def close(self) -> None:
        """Closes the file."""
        self._file.close()
        self._source.close()


STORES: Final[dict[str, Callable[[VideoUri, bool], FrameStore]]] = {
    "rlds": RldsStore,
    "calvin": CalvinStore,
    "hdf5": Hdf5Store,
}
"""Kind of URI -> what opens it."""


def open_store(uri: VideoUri, verify: bool = False) -> FrameStore:
    """Opens the episode that `uri` names.

    Args:
        uri: a parsed URI of kind rlds, calvin or hdf5.
        verify: compares records with their checksums, where the format has any.

    Raises: BadVideo, FileNotFoundError, StorageError.
    """
    return STORES[uri.kind](uri, verify)


def decoded_image(content: bytes | memoryview, what: str) -> Image.Image:
    """Decodes JPEG or PNG bytes to an RGB picture; `what` names it in errors. Raises: BadVideo."""
    try:
        image = Image.open(io.BytesIO(content))
        if image.mode[0] in "IF":
            # Pillow would cut every value off at 255: depth, for one, would be a white picture.
            raise BadVideo("corrupt", f"{what}: grey values of more than 8 bits are no picture")
        return image.convert("RGB")
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise BadVideo("corrupt", f"{what}: {error}") from error


def raw_image(values: np.ndarray, what: str) -> Image.Image:
    """The RGB picture of (h, w), (h, w, 1), (h, w, 3) or (h, w, 4) values 0 to 255; the fourth, alpha, is left out.

    Args:
        values: of any type of number.
        what: names it in errors.

    Raises: BadVideo.
    """
    pixels = values.reshape(*values.shape, 1) if values.ndim == 2 else values
    if pixels.ndim != 3 or pixels.shape[2] not in (1, 3, 4):
        raise BadVideo("corrupt", f"{what}: values of shape {values.shape} are no picture")
    if pixels.dtype != np.uint8:
        # Depth and pictures from 0 to 1 would come out as another picture, without an error.
        if pixels.dtype.kind not in "biuf" or not ((pixels >= 0) & (pixels <= 255) & (pixels % 1 == 0)).all():
            raise BadVideo("corrupt", f"{what}: its {pixels.dtype} values are not all whole numbers 0 to 255")
        pixels = pixels.astype(np.uint8)
    pixels = np.repeat(pixels, 3, axis=2) if pixels.shape[2] == 1 else pixels[:, :, :3]
    return Image.fromarray(np.ascontiguousarray(pixels))
