"""Openpi's message format: msgpack maps in which NumPy arrays are maps of their own.

An array travels as {b"__ndarray__": True, b"data": bytes, b"dtype": "<f4", b"shape": [..]}, a NumPy scalar as
{b"__npgeneric__": True, b"data": value, b"dtype": "<f4"}. Nothing here unpickles: object, structured, complex and
text arrays are rejected in both directions.
"""

from __future__ import annotations

from typing import Any

import msgpack
import numpy as np

from defi_client.errors import ProtocolError

NUMBER_KINDS = "biuf"
"""Kinds of NumPy's dtypes that are sent: booleans, integers, floats."""


def pack(message: Any) -> bytes:
    """Encodes a message; arrays may sit anywhere in it.

    Raises:
        ProtocolError: it holds an object, structured, complex, text or time array, or a value msgpack does not know.
    """
    try:
        packed: bytes = msgpack.packb(message, default=_pack_array)
        return packed
    except (TypeError, ValueError, OverflowError) as error:
        raise ProtocolError(f"this message cannot be sent: {error}.") from error


def unpack(data: bytes | bytearray | memoryview) -> Any:
    """Decodes a message; its arrays are read-only views of its bytes.

    Raises:
        ProtocolError: truncated, not msgpack, or with an array that is none.
    """
    try:
        return msgpack.unpackb(data, object_hook=_unpack_array, strict_map_key=True)
    except (ValueError, TypeError, OverflowError, RecursionError, msgpack.UnpackException) as error:
        raise ProtocolError(f"message of {len(data)} bytes is not msgpack with arrays: {error}") from error


def _pack_array(value: Any) -> Any:
    if not isinstance(value, (np.ndarray, np.generic)):
        raise ProtocolError(f"this message cannot be sent: msgpack has no form for a {type(value).__name__}.")
    if value.dtype.kind not in NUMBER_KINDS:
        raise ProtocolError(f"arrays of dtype {value.dtype} are not sent; use a plain number dtype.")
    if isinstance(value, np.generic):
        return {b"__npgeneric__": True, b"data": value.item(), b"dtype": value.dtype.str}
    return {b"__ndarray__": True, b"data": value.tobytes(), b"dtype": value.dtype.str, b"shape": value.shape}


def _unpack_array(entries: dict[Any, Any]) -> Any:
    if b"__ndarray__" in entries:
        dtype = _number_dtype(entries)
        return np.frombuffer(entries[b"data"], dtype).reshape(entries[b"shape"])
    if b"__npgeneric__" in entries:
        return _number_dtype(entries).type(entries[b"data"])
    return entries


def _number_dtype(entries: dict[Any, Any]) -> np.dtype[Any]:
    missing = {b"data", b"dtype"} - entries.keys()
    if missing or (b"__ndarray__" in entries and b"shape" not in entries):
        raise ValueError("an array lacks its data, dtype or shape")
    dtype: np.dtype[Any] = np.dtype(entries[b"dtype"])
    if dtype.kind not in NUMBER_KINDS:
        raise ValueError(f"dtype {dtype} is not accepted")
    return dtype
