"""Messages that a broken or hostile client sends: the ones that once hurt a server, and endless mutations of good ones."""

from __future__ import annotations

import io
import random
import struct
import zlib
from collections.abc import Callable
from typing import Any

import msgpack
import numpy as np
from openpi_client import msgpack_numpy
from PIL import Image
from robot_messages import observation

EMPTY_MAPS = 15 * 2**20 - 64


def scalar(data: object, dtype: str) -> dict[bytes, object]:
    return {b"__npgeneric__": True, b"data": data, b"dtype": dtype}


def array(data: bytes, dtype: str, shape: object) -> dict[bytes, object]:
    return {b"__ndarray__": True, b"data": data, b"dtype": dtype, b"shape": shape}


def image(height: int, width: int) -> dict[str, Any]:
    return observation(1, **{"observation/images/front": np.zeros((height, width, 3), np.uint8)})


def png_bomb(side: int) -> bytes:
    """A valid PNG of side x side black pixels: 3 * side**2 bytes from a few thousand."""

    def piece(kind: bytes, data: bytes) -> bytes:
        return struct.pack("!I", len(data)) + kind + data + struct.pack("!I", zlib.crc32(kind + data))

    head = struct.pack("!IIBBBBB", side, side, 8, 2, 0, 0, 0)
    squeeze = zlib.compressobj(9)
    row = b"\0" * (1 + 3 * side)
    rows = b"".join(squeeze.compress(row) for _ in range(side)) + squeeze.flush()
    return b"\x89PNG\r\n\x1a\n" + piece(b"IHDR", head) + piece(b"IDAT", rows) + piece(b"IEND", b"")


def picture(size: int = 64, form: str = "JPEG") -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (size, size, 3), np.uint8)).save(
        out, format=form
    )
    return out.getvalue()


def _packed(message: object) -> bytes:
    return bytes(msgpack_numpy.packb(message))


HURTFUL: dict[str, Callable[[], bytes]] = {
    # 42 bytes that became 1 GB: bytes(10**9) through a scalar of a string dtype.
    "a scalar that is a gigabyte": lambda: msgpack.packb({"a": scalar(10**9, "|S1")}),
    "a scalar of a long string dtype": lambda: msgpack.packb({"a": scalar("x", "<U100000000")}),
    # 8 s and 1.1 GB.
    "15 MiB of empty maps": lambda: b"\x81\xa1a\xdd" + EMPTY_MAPS.to_bytes(4, "big") + b"\x80" * EMPTY_MAPS,
    # The error repeated every key, and each was compared with the missing one.
    "100,000 keys that nearly fit": lambda: msgpack.packb(
        {f"observation/images/fron{i}": 0 for i in range(10**5)}
    ),
    "a key of a megabyte": lambda: _packed(observation(1) | {"k" * 10**6: 1}),
    "a seed of 5 MB": lambda: _packed(observation(1, seed="9" * 5 * 10**6)),
    "a prompt of 5 MB": lambda: _packed(observation(1, prompt="9" * 5 * 10**6)),
    "a dtype of 5 MB": lambda: msgpack.packb({"a": array(b"", "z" * 5 * 10**6, [1])}),
    "a shape of a million sizes": lambda: msgpack.packb({"a": array(b"", "<f4", list(range(10**6)))}),
    "a shape beyond all memory": lambda: msgpack.packb({"a": array(b"", "<f4", [2**62, 2**62])}),
    "a shape of 2**60 empty rows": lambda: _packed(
        observation(1, **{"observation/state": array(b"", "<f4", [2**60, 0])})
    ),
    "lists in lists": lambda: b"\x91" * 10**6 + b"\x01",
    "maps in maps": lambda: b"\x81\xa1a" * 10**6 + b"\x01",
    # 9 s and 2.4 GB.
    "an image of one row": lambda: _packed(image(1, 4096)),
    "an image of one column": lambda: _packed(image(4096, 1)),
    "an image of no pixels": lambda: _packed(image(0, 64)),
    # Infinite once cast to float32, and NaN actions after that.
    "a state beyond float32": lambda: _packed(observation(1, **{"observation/state": np.full(4, 1e39)})),
    "a state of NaN": lambda: _packed(
        observation(1, **{"observation/state": np.full(4, np.nan, np.float32)})
    ),
    "a state of huge integers": lambda: _packed(
        observation(1, **{"observation/state": [2**63, 10**18, 0, 0]})
    ),
    "a PNG that unpacks to 1.2 GB": lambda: _packed(
        observation(1, **{"observation/images/front": png_bomb(20_000)})
    ),
    "a cut JPEG": lambda: _packed(observation(1, **{"observation/images/front": picture()[:500]})),
    "an extension type": lambda: msgpack.packb({"a": msgpack.ExtType(5, b"x" * 100)}),
    "a map as a key": lambda: b"\x81\x81\x01\x02\x03",
    "nothing": lambda: b"",
    "the beginning of a list of 2**32 entries": lambda: b"\xdd\xff\xff\xff\xff",
    "the beginning of a map of 2**32 entries": lambda: b"\xdf\xff\xff\xff\xff",
    "the beginning of 4 GB": lambda: b"\xc6\xff\xff\xff\xff",
}
"""Name -> openpi message. What is said of each was measured on the server before this one."""

ODD_VALUES: tuple[Any, ...] = (
    None, True, -1, 2**63, 2**64 - 1, 1e39, float("nan"), float("inf"), "", "x" * 3000, b"", b"\0" * 100, [], {},
    [[]], [1, "a", None], {"a": {"b": {}}}, {b"__ndarray__": True}, {b"__npgeneric__": True}, {"__image__": True},
    scalar("x", "<f4"), scalar(3, "|O"), array(b"\0" * 12, "|u1", [2, 2, 3]), array(b"\0" * 8, "<f8", [1]),
    array(b"", "|S0", [3]), array(b"\0", "|b1", [-1]), array(b"\0" * 12, "|u1", ["2", 2, 3]),
    {"__image__": True, "format": "png", "data": b"\x89PNG", "shape": [2, 2, 3]},
    {"__image__": True, "format": "raw", "data": b"", "dtype": "|O", "shape": [2]},
    msgpack.ExtType(1, b"x"), msgpack.Timestamp(1, 1),
)  # fmt: skip


def mutated(message: Any, draw: random.Random) -> bytes:
    """One mutation of a message of plain values: of its structure, of its bytes, or of both."""
    kind = draw.random()
    changed = _changed(message, draw) if kind < 0.6 else message
    data = msgpack.packb(changed)
    return data if kind < 0.45 else damaged(data, draw)


def damaged(data: bytes, draw: random.Random) -> bytes:
    """Some bytes flipped, cut out, doubled or put in."""
    out = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 5))):
        # The heads of maps, keys and arrays are at the front; the rest is mostly pixels.
        at = draw.randrange(min(len(out), draw.choice((8, 64, 256, len(out)))) or 1)
        action = draw.randrange(5)
        if action == 0 and out:
            out[at] ^= 1 << draw.randrange(8)
        elif action == 1:
            out[at : at + 1] = draw.randbytes(draw.randrange(1, 9))
        elif action == 2:
            del out[at : at + draw.choice((1, 4, 100))]
        elif action == 3:
            out[at:at] = out[at : at + draw.choice((4, 50))]
        else:
            del out[at:]
    return bytes(out)


def _changed(value: Any, draw: random.Random) -> Any:
    if isinstance(value, dict) and value and draw.random() < 0.85:
        out = dict(value)
        key = draw.choice(list(out))
        action = draw.random()
        if action < 0.6:
            out[key] = _changed(out[key], draw)
        elif action < 0.75:
            del out[key]
        elif action < 0.9:
            out[draw.choice(("x" * draw.randrange(50), b"k", 3, None, str(key) + "x"))] = draw.choice(
                ODD_VALUES
            )
        else:
            other = draw.choice(list(out))
            out[key], out[other] = out[other], out[key]
        return out
    return draw.choice(ODD_VALUES)
