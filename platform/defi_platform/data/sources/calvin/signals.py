"""Actions and proprioception of CALVIN frames: two small members of each npz file, without inflating its pictures."""

from __future__ import annotations

import functools
import io
import struct
import zipfile
import zlib
from typing import IO, Any, Final

import numpy as np

from defi_platform import storage
from defi_platform.data.sources.records import SignalNames, Signals
from defi_platform.data.sources.uri import parse
from defi_platform.errors import CorpusError
from defi_platform.storage.parallel_read import side_by_side

ACTION, STATE = "rel_actions.npy", "robot_obs.npy"

SIGNAL_NAMES: Final = SignalNames(
    action=("x", "y", "z", "roll", "pitch", "yaw", "gripper"),
    state=(
        *("x", "y", "z", "roll", "pitch", "yaw", "gripper_opening"),
        *(f"joint_{number}" for number in range(7)),
        "gripper_action",
    ),
)
"""Entries of `rel_actions` and `robot_obs`, by the dataset's own description; angles are Euler angles in radians."""

HEAD_BYTES: Final = 4096
"""The signals come before the pictures in files as the dataset's own recorder writes them."""

LARGEST_MEMBER: Final = 1 << 16
"""Bytes; 15 numbers take 248."""

LOCAL_HEADER: Final = struct.Struct("<4sHHHHHIIIHH")
ZIP64, MARK = 1, 0xFFFFFFFF
STORED, DEFLATED = 0, 8

DAMAGE = (ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError)


def signal_names(root: str) -> SignalNames:
    """Names of the entries of actions and states: the same in every CALVIN dataset."""
    return SIGNAL_NAMES


def frame_name(number: int) -> str:
    """Name of the file of a frame."""
    return f"episode_{number:07d}.npz"


def read_signals(uri: str, episode_id: str) -> Signals:
    """Reads `rel_actions` (n, 7) and `robot_obs` (n, 15). Raises: CorpusError naming the frame; StorageError."""
    where = parse(uri)
    first, last = where.span
    uris = (storage.join(where.path, frame_name(number)) for number in range(first, last + 1))
    frames = [members for _, members in side_by_side(_members, uris, storage.is_remote(where.path))]
    actions, states = ([frame[name] for frame in frames] for name in (ACTION, STATE))
    for values in (actions, states):
        widths = {len(one) for one in values}
        if len(widths) > 1:
            raise CorpusError(f"{uri}: frames of {' and of '.join(map(str, sorted(widths)))} values.")
    return Signals(np.stack(actions), np.stack(states))


def _members(uri: str) -> dict[str, np.ndarray]:
    """The signals of one frame, float32 each."""
    try:
        with storage.open_seekable(uri, HEAD_BYTES) as file:
            return _from_head(file.read(HEAD_BYTES)) or _from_index(file)
    except storage.StorageError:
        raise
    except DAMAGE as error:
        raise CorpusError(f"{uri}: {error}. Restore it or run the ingest again.") from error


def _from_head(head: bytes) -> dict[str, np.ndarray]:
    """The signals by the first local headers of the file; {} where they do not hold them."""
    found: dict[str, np.ndarray] = {}
    start = 0
    while len(found) < 2 and start + LOCAL_HEADER.size <= len(head):
        magic, _, flags, method, _, _, checksum, size, raw, name_length, extra_length = (
            LOCAL_HEADER.unpack_from(head, start)
        )
        name_at = start + LOCAL_HEADER.size
        content_at = name_at + name_length + extra_length
        # Bit 0: encrypted; bit 3: the sizes follow the content.
        if magic != b"PK\x03\x04" or flags & 9 or method not in (STORED, DEFLATED):
            return {}
        if MARK in (size, raw):
            kind, length = struct.unpack_from(
                "<HH", head.ljust(name_at + name_length + 4), name_at + name_length
            )
            if kind != ZIP64 or length < 16 or content_at > len(head):
                return {}
            raw, size = struct.unpack_from("<QQ", head, name_at + name_length + 4)
        name = head[name_at : name_at + name_length].decode("utf-8", "replace")
        if name in (ACTION, STATE):
            content = head[content_at : content_at + size]
            if len(content) < size:
                return {}
            if method == DEFLATED:
                content = zlib.decompressobj(-15).decompress(content, LARGEST_MEMBER)
            if len(content) != raw or zlib.crc32(content) != checksum:
                raise ValueError(f"{name} is damaged")
            found[name] = _vector(content, name)
        start = content_at + size
    return found if len(found) == 2 else {}


def _from_index(file: IO[bytes]) -> dict[str, np.ndarray]:
    """The signals by the index at the end of the file."""
    found = {}
    with zipfile.ZipFile(file) as archive:
        for name in (ACTION, STATE):
            if archive.getinfo(name).file_size > LARGEST_MEMBER:
                raise ValueError(f"{name} has {archive.getinfo(name).file_size} bytes")
            found[name] = _vector(archive.read(name), name)
    return found


def _vector(content: bytes, name: str) -> np.ndarray:
    """The numbers of an npy file, float32."""
    version = content[6:8]
    start = 10 + int.from_bytes(content[8:10], "little")
    if content[:6] != np.lib.format.MAGIC_PREFIX or version != b"\x01\x00":
        raise ValueError(f"{name} is no npy file of version 1.0")
    kind, count = _header(content[8:start], name)
    return np.frombuffer(content, kind, count, start).astype(np.float32)


@functools.lru_cache(maxsize=64)
def _header(header: bytes, name: str) -> tuple[np.dtype[Any], int]:
    """(dtype, number of values) by the header of an npy file: the same for every frame, and slow to parse."""
    shape, _, kind = np.lib.format.read_array_header_1_0(io.BytesIO(header), max_header_size=1024)
    if len(shape) != 1 or kind.kind not in "fiu":
        raise ValueError(f"{name} has shape {shape} and dtype {kind}; a list of numbers is expected")
    return kind, shape[0]
