"""The openpi websocket format: msgpack maps in which NumPy arrays are maps of their own.

An array travels as {b"__ndarray__": True, b"data": bytes, b"dtype": "<f4", b"shape": [..]}, a NumPy scalar as
{b"__npgeneric__": True, b"data": value, b"dtype": "<f4"}; both are what `openpi_client.msgpack_numpy` reads
and writes. On connecting the server greets with a metadata map; then every observation map is answered by
one map of actions. A *text* message from the server is an error, which openpi-client raises.

Nothing here unpickles: object, structured and complex arrays are rejected in both directions.
"""

from __future__ import annotations

import math
from typing import Any

import msgpack
import numpy as np

PROTOCOL = "openpi-websocket"

MESSAGE_LIMIT = 15 * 2**20
"""Bytes of one message. Serve's proxy cuts the connection (close code 1009) at 16 MiB; below that the client
gets an answer that says what is wrong."""

_DTYPE_KINDS = "biufSU"
_MAX_DIMENSIONS = 32


class ProtocolError(ValueError):
    """A message that is not in the format; the client gets the error's text."""


def pack(message: Any) -> bytes:
    """Encodes a message; arrays may sit anywhere in it.

    Raises:
        ProtocolError: it holds an object, structured, complex or time array, or a value msgpack does not know.
    """
    try:
        packed: bytes = msgpack.packb(message, default=_pack_array)
        return packed
    except (TypeError, OverflowError) as error:
        raise ProtocolError(f"this message cannot be sent: {error}.") from error


def unpack(data: bytes | bytearray | memoryview, limit: int = MESSAGE_LIMIT) -> Any:
    """Decodes a message; its arrays are read-only views of its bytes.

    Args:
        data: one message.
        limit: bytes of a message, at most.

    Raises:
        ProtocolError: the message is longer than `limit`, truncated, not msgpack, or holds a bad array.
    """
    if len(data) > limit:
        raise ProtocolError(f"message of {len(data)} bytes; at most {limit} are read. Send smaller images.")
    try:
        return msgpack.unpackb(data, object_hook=_unpack_array)
    except ProtocolError:
        raise
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise ProtocolError(f"message of {len(data)} bytes is not msgpack: {error}") from error


def _pack_array(value: Any) -> Any:
    if not isinstance(value, np.ndarray | np.generic):
        raise ProtocolError(f"this message cannot be sent: msgpack has no form for a {type(value).__name__}.")
    if value.dtype.kind not in _DTYPE_KINDS:
        raise ProtocolError(f"arrays of dtype {value.dtype} are not sent; use a plain number dtype.")
    if isinstance(value, np.generic):
        return {b"__npgeneric__": True, b"data": value.item(), b"dtype": value.dtype.str}
    return {b"__ndarray__": True, b"data": value.tobytes(), b"dtype": value.dtype.str, b"shape": value.shape}


def _unpack_array(entries: dict[Any, Any]) -> Any:
    if b"__ndarray__" in entries:
        return _array(entries)
    if b"__npgeneric__" in entries:
        try:
            return _dtype(entries).type(entries[b"data"])
        except (KeyError, ValueError, TypeError, OverflowError) as error:
            raise ProtocolError(f"bad NumPy scalar: {error!r}.") from error
    return entries


def _array(entries: dict[Any, Any]) -> np.ndarray:
    data, shape = entries.get(b"data"), entries.get(b"shape")
    if not isinstance(data, bytes):
        raise ProtocolError(f"bad array: 'data' is {type(data).__name__}, expected bytes.")
    if not isinstance(shape, list | tuple) or not all(type(n) is int and n >= 0 for n in shape):
        raise ProtocolError(f"bad array: 'shape' is {shape!r}, expected a list of sizes.")
    if len(shape) > _MAX_DIMENSIONS:
        raise ProtocolError(f"bad array: {len(shape)} dimensions, at most {_MAX_DIMENSIONS}.")
    dtype = _dtype(entries)
    expected = math.prod(shape) * dtype.itemsize
    if len(data) != expected:
        raise ProtocolError(
            f"bad array: {len(data)} bytes, but shape {tuple(shape)} of {dtype} takes {expected} bytes."
        )
    return np.frombuffer(data, dtype=dtype).reshape(shape)


def _dtype(entries: dict[Any, Any]) -> np.dtype:
    name = entries.get(b"dtype")
    if not isinstance(name, str):
        raise ProtocolError(f"bad array: 'dtype' is {name!r}, expected a string such as '<f4' or '|u1'.")
    try:
        dtype = np.dtype(name)
    except (TypeError, ValueError, SyntaxError) as error:
        raise ProtocolError(f"bad array: NumPy has no dtype {name!r}.") from error
    if dtype.kind not in _DTYPE_KINDS or dtype.itemsize == 0:
        raise ProtocolError(f"bad array: dtype {name!r} is not accepted; send numbers, booleans or strings.")
    return dtype
