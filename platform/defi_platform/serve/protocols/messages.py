"""Reading of msgpack from strangers: sizes, counts and depth are checked before anything is allocated.

msgpack alone believes what a message says of itself: 15 MiB of empty maps become 1.1 GB of Python objects, and a list
that says it has a million entries gets their place at once. So the headers of a message are walked first, which costs
some 0.2 µs each and stops at the first that is out of bounds.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Final

import msgpack
import numpy as np
from numpy.typing import NDArray

from defi_platform.serve.refusals import Refusal
from defi_platform.serve.wording import shown

MAX_ITEMS: Final = 20_000
"""Values and keys in one message; an observation has some fifty."""
MAX_DEPTH: Final = 16
"""Maps and lists within each other."""
MAX_TEXT: Final = 2**16
"""Bytes of one string."""
MAX_DIMENSIONS: Final = 8
"""Of an array."""

_NUMBERS: Final = "biuf"
_WIDEST: Final = 8
"""Bytes of a number: no 128-bit floats, whose layout differs between machines."""


class ProtocolError(Refusal):
    """A message that is not in the format; the client gets the error's text."""

    reason = "protocol"


def unpack(data: bytes | bytearray | memoryview, object_hook: Callable[[dict[Any, Any]], Any]) -> Any:
    """The value of a msgpack message.

    Args:
        data: the whole message.
        object_hook: makes a value of each map, innermost first; may raise `ProtocolError`.

    Raises:
        ProtocolError: not msgpack, truncated, with extension types, or over `MAX_ITEMS`, `MAX_DEPTH` or `MAX_TEXT`.
    """
    check(data)
    try:
        return msgpack.unpackb(data, object_hook=object_hook, strict_map_key=True)
    except (ValueError, TypeError, OverflowError, RecursionError, msgpack.UnpackException) as error:
        raise ProtocolError(
            f"message of {len(data)} bytes is not msgpack: {shown(str(error), 200)}"
        ) from error


# Of each first byte: a number of bytes to skip; or (bytes of the length that follows, what it counts).
_TEXT, _BYTES, _LIST, _MAP, _BAD = range(5)
_PLAIN = (
    {0xC0: 0, 0xC2: 0, 0xC3: 0, 0xCA: 4, 0xCB: 8}
    | {0xCC + power: 2**power for power in range(4)}
    | {0xD0 + power: 2**power for power in range(4)}
)
_COUNTED = {
    0xC4: (1, _BYTES), 0xC5: (2, _BYTES), 0xC6: (4, _BYTES),
    0xD9: (1, _TEXT), 0xDA: (2, _TEXT), 0xDB: (4, _TEXT),
    0xDC: (2, _LIST), 0xDD: (4, _LIST), 0xDE: (2, _MAP), 0xDF: (4, _MAP),
}  # fmt: skip


def _first_byte(byte: int) -> tuple[int, int, int]:
    """(bytes to skip, bytes of the length, what the length counts) of a header."""
    if byte <= 0x7F or byte >= 0xE0:
        return 0, 0, _BYTES
    if byte in _PLAIN:
        return _PLAIN[byte], 0, _BYTES
    if byte in _COUNTED:
        return 0, *_COUNTED[byte]
    if byte <= 0x8F:
        return byte & 0x0F, 0, _MAP
    if byte <= 0x9F:
        return byte & 0x0F, 0, _LIST
    if byte <= 0xBF:
        return byte & 0x1F, 0, _BYTES
    return 0, 0, _BAD


_HEADERS: Final = [_first_byte(byte) for byte in range(256)]


def check(data: bytes | bytearray | memoryview) -> None:
    """Walks a message's headers.

    Raises:
        ProtocolError: as `unpack`.
    """
    length, position, items, left = len(data), 0, 0, 1
    outer: list[int] = []
    while True:
        while not left:
            if not outer:
                if position != length:
                    raise _not_msgpack(length, f"{length - position} bytes are left over")
                return
            left = outer.pop()
        left -= 1
        items += 1
        if items > MAX_ITEMS:
            raise ProtocolError(f"a message holds at most {MAX_ITEMS} values; this one has more.")
        if position >= length:
            raise _not_msgpack(length, "it ends too early")
        count, size, kind = _HEADERS[data[position]]
        position += 1
        if size:
            count = int.from_bytes(data[position : position + size], "big")
            position += size
            if kind == _TEXT and count > MAX_TEXT:
                raise ProtocolError(f"a string has at most {MAX_TEXT} bytes; this one has {count}.")
        if kind <= _BYTES:
            position += count
            if position > length:
                raise _not_msgpack(length, "it ends too early")
        elif kind == _BAD:
            raise _not_msgpack(length, "extension types are not read")
        else:
            outer.append(left)
            if len(outer) > MAX_DEPTH:
                raise ProtocolError(f"maps and lists lie at most {MAX_DEPTH} deep within each other.")
            left = count * 2 if kind == _MAP else count
            if left > length - position:
                raise _not_msgpack(length, "it ends too early")


def _not_msgpack(length: int, why: str) -> ProtocolError:
    return ProtocolError(f"message of {length} bytes is not msgpack: {why}.")


def array(data: Any, dtype: Any, shape: Any) -> NDArray[Any]:
    """An array that arrived as bytes, as a read-only view of them.

    Args:
        data: bytes in C order.
        dtype: NumPy's name of a number type of at most 8 bytes: "<f4", "|u1".
        shape: sizes.

    Raises:
        ProtocolError: they do not fit each other, or are of the wrong kind.
    """
    if not isinstance(data, bytes):
        raise ProtocolError(f"bad array: 'data' is {type(data).__name__}, expected bytes.")
    if not isinstance(shape, list | tuple) or not all(type(n) is int and n >= 0 for n in shape):
        raise ProtocolError(f"bad array: 'shape' is {shown(shape)}, expected a list of sizes.")
    if len(shape) > MAX_DIMENSIONS:
        raise ProtocolError(f"bad array: {len(shape)} dimensions, at most {MAX_DIMENSIONS}.")
    kind = number_dtype(dtype)
    expected = math.prod(shape) * kind.itemsize
    if len(data) != expected:
        raise ProtocolError(
            f"bad array: {len(data)} bytes, but shape {shown(tuple(shape))} of {kind} takes {shown(expected)} bytes."
        )
    try:
        return np.frombuffer(data, dtype=kind).reshape(shape) if data else np.empty(shape, dtype=kind)
    except (ValueError, OverflowError) as error:  # sizes no array can have, beside one that is 0
        raise ProtocolError(f"bad array: NumPy has no shape {shown(tuple(shape))}.") from error


def scalar(value: Any, dtype: Any) -> np.generic:
    """A NumPy scalar.

    Args:
        value: a plain number.
        dtype: NumPy's name of a number type of at most 8 bytes.

    Raises:
        ProtocolError: no number, no number type, or one does not fit the other.
    """
    kind = number_dtype(dtype)
    if not isinstance(value, int | float):
        raise ProtocolError(f"bad NumPy scalar: 'data' is {type(value).__name__}, expected a number.")
    try:
        with np.errstate(over="ignore"):
            number: np.generic = kind.type(value)
    except (ValueError, TypeError, OverflowError) as error:
        raise ProtocolError(f"bad NumPy scalar: {shown(value)} is no {kind}.") from error
    return number


def number_dtype(name: Any) -> np.dtype[Any]:
    """A number type by NumPy's name.

    Raises:
        ProtocolError: not a string, unknown, not a number, or of more than 8 bytes.
    """
    if not isinstance(name, str) or len(name) > 16:
        raise ProtocolError(f"bad array: 'dtype' is {shown(name)}, expected a string such as '<f4' or '|u1'.")
    try:
        dtype = np.dtype(name)
    except (TypeError, ValueError, SyntaxError, OverflowError) as error:
        raise ProtocolError(f"bad array: NumPy has no dtype {name!r}.") from error
    if dtype.kind not in _NUMBERS or not 0 < dtype.itemsize <= _WIDEST:
        raise ProtocolError(f"bad array: dtype {name!r} is not accepted; send numbers or booleans.")
    return dtype
