"""The openpi websocket format: msgpack maps in which NumPy arrays are maps of their own.

An array travels as {b"__ndarray__": True, b"data": bytes, b"dtype": "<f4", b"shape": [..]}, a NumPy scalar as
{b"__npgeneric__": True, b"data": value, b"dtype": "<f4"}; both are what `openpi_client.msgpack_numpy` reads
and writes. On connecting the server greets with a metadata map; then every observation map is answered by
one map of actions. A *text* message from the server is an error, which openpi-client raises.

Nothing here unpickles: object, structured, complex and text arrays are rejected in both directions.
"""

from __future__ import annotations

from typing import Any

from defi_client import errors, wire
from defi_platform.serve.protocols import messages
from defi_platform.serve.protocols.messages import ProtocolError

PROTOCOL = "openpi-websocket"

__all__ = ["PROTOCOL", "ProtocolError", "pack", "unpack"]


def pack(message: Any) -> bytes:
    """Encodes a message; arrays may sit anywhere in it.

    Raises:
        ProtocolError: it holds an object, structured, complex, text or time array, or a value msgpack does not know.
    """
    try:
        return wire.pack(message)
    except errors.ProtocolError as error:
        raise ProtocolError(str(error)) from error


def unpack(data: bytes | bytearray | memoryview) -> Any:
    """Decodes a message; its arrays are read-only views of its bytes.

    Args:
        data: one message.

    Raises:
        ProtocolError: truncated, not msgpack, over the limits of `messages`, or with a bad array.
    """
    return messages.unpack(data, _unpack_array)


def _unpack_array(entries: dict[Any, Any]) -> Any:
    if b"__ndarray__" in entries:
        return messages.array(entries.get(b"data"), entries.get(b"dtype"), entries.get(b"shape"))
    if b"__npgeneric__" in entries:
        return messages.scalar(entries.get(b"data"), entries.get(b"dtype"))
    return entries
