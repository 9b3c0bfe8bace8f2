"""Messages between a simulator's process and its owner: msgpack in frames with a length, arrays included.

No pickle: either side may have another Python. Images do not travel here; they lie in memory that both share.
"""

from __future__ import annotations

import struct
from typing import Any

import msgpack
import numpy as np

_HEAD = struct.Struct("<4sI")
_MAGIC = b"DSIM"
MAX_BYTES = 64 << 20
"""Of a frame."""
_ARRAY = 1
_KINDS = "biuf"


class WireError(ValueError):
    """Bytes that are no frame."""


def pack(message: dict[str, Any]) -> bytes:
    """A message as one frame; its values are what JSON has, bytes, and arrays of numbers or booleans."""
    body: bytes = msgpack.packb(message, default=_packed_array)
    return _HEAD.pack(_MAGIC, len(body)) + body


def unpack(buffer: bytearray) -> dict[str, Any] | None:
    """Takes the first message off a buffer.

    Args:
        buffer: bytes as they came; a whole frame is removed from it.

    Returns: The message; None when more bytes are needed.

    Raises:
        WireError: these bytes are no frame.
    """
    if len(buffer) < _HEAD.size:
        return None
    magic, size = _HEAD.unpack_from(buffer)
    if magic != _MAGIC or size > MAX_BYTES:
        raise WireError(f"{bytes(buffer[:16])!r} is no start of a frame")
    if len(buffer) < _HEAD.size + size:
        return None
    body = bytes(buffer[_HEAD.size : _HEAD.size + size])
    del buffer[: _HEAD.size + size]
    try:
        message = msgpack.unpackb(body, ext_hook=_array)
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise WireError(f"a frame of {size} bytes is no msgpack: {error}") from error
    if not isinstance(message, dict):
        raise WireError(f"a frame holds {type(message).__name__} in the place of a map")
    return message


def _packed_array(value: Any) -> msgpack.ExtType:
    if isinstance(value, np.generic):
        value = np.asarray(value)
    if not isinstance(value, np.ndarray) or value.dtype.kind not in _KINDS:
        raise TypeError(f"{type(value).__name__} cannot be sent: {value!r:.80}")
    described = msgpack.packb([value.dtype.str, list(value.shape), value.tobytes()])
    return msgpack.ExtType(_ARRAY, described)


def _array(code: int, data: bytes) -> Any:
    if code != _ARRAY:
        raise ValueError(f"extension type {code} is unknown")
    name, shape, content = msgpack.unpackb(data)
    dtype = np.dtype(name)
    if dtype.kind not in _KINDS:
        raise ValueError(f"dtype {name} is not of numbers")
    return np.frombuffer(content, dtype).reshape(shape).copy()
