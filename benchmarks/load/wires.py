"""The bytes that a simulated robot sends in each protocol, made once, and what is read of an answer.

A request is always the same bytes, mask included, so that a client costs next to nothing and 64 of them fit
beside the server on two cores. Every client's state holds its own number, which the sleeping policy copies
into its actions: an answer that belongs to another client is seen by its bytes.
"""

from __future__ import annotations

import base64
import io
import json
import os
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgpack
import numpy as np
from PIL import Image
from websockets.frames import Frame, Opcode

CAMERAS = {"front": (200, 200), "wrist": (84, 84)}
IMAGE_SIZE = (64, 64)
"""What the policy sees of each."""
STATE_DIM, CHUNK, ACTION_DIM = 4, 10, 4
PROMPT = "open the drawer"


@dataclass(frozen=True)
class Request:
    """What one client sends."""

    opening: bytes
    """HTTP upgrade of a websocket; empty for plain HTTP."""
    hello: bytes
    """Sent once the socket is open, and answered once; may be empty."""
    greeted: bool
    """The server speaks first."""
    before: bytes
    """Sent once before the first message, and not answered; may be empty."""
    message: bytes
    """One observation, as it goes onto the socket."""
    tag: bytes
    """Bytes that every right answer contains and no other client's does."""
    http: bool = False


def state(number: int) -> np.ndarray:
    """The state of client `number`: (STATE_DIM,) float32 that the sleeping policy copies into its actions."""
    return np.full(STATE_DIM, number + 0.5, np.float32)


def pictures(number: int, sizes: dict[str, tuple[int, int]] | None = None) -> dict[str, np.ndarray]:
    """Camera -> uint8 (h, w, 3), smooth so that JPEG is as small as that of a real picture."""
    found = {}
    for name, (height, width) in (CAMERAS if sizes is None else sizes).items():
        y, x = np.mgrid[:height, :width]
        channels = [127 + 120 * np.sin((x * (1 + c) + y + 13 * number) / 23) for c in range(3)]
        found[name] = np.stack(channels, axis=2).astype(np.uint8)
    return found


def jpeg(image: np.ndarray) -> bytes:
    """The picture as JPEG of quality 95."""
    out = io.BytesIO()
    Image.fromarray(image).save(out, format="JPEG", quality=95)
    return out.getvalue()


def frame(data: bytes, opcode: Opcode = Opcode.BINARY) -> bytes:
    """One masked websocket frame."""
    return Frame(opcode, data).serialize(mask=True)


def upgrade(path: str, port: int, token: str | None = None) -> bytes:
    """The opening handshake of a websocket."""
    key = base64.b64encode(os.urandom(16)).decode()
    lines = [
        f"GET {path} HTTP/1.1",
        f"Host: 127.0.0.1:{port}",
        "Upgrade: websocket",
        "Connection: Upgrade",
        f"Sec-WebSocket-Key: {key}",
        "Sec-WebSocket-Version: 13",
    ]
    if token:
        lines.append(f"Authorization: Api-Key {token}")
    return "\r\n".join([*lines, "", ""]).encode()


def _array(value: np.ndarray, keys: Callable[[str], Any]) -> dict[Any, Any]:
    return {
        keys("__ndarray__"): True,
        keys("data"): value.tobytes(),
        keys("dtype"): value.dtype.str,
        keys("shape"): list(value.shape),
    }


def openpi(number: int, port: int, images: str = "raw", token: str | None = None) -> Request:
    """openpi's websocket: keys of arrays are bytes; an encoded picture is its file's bytes."""
    sent = {
        f"observation/images/{name}": _array(each, str.encode) if images == "raw" else jpeg(each)
        for name, each in pictures(number).items()
    }
    observation = sent | {
        "observation/state": _array(state(number), str.encode),
        "prompt": PROMPT,
        "seed": number,
    }
    return Request(
        opening=upgrade("/", port, token),
        hello=b"",
        greeted=True,
        before=b"",
        message=frame(msgpack.packb(observation)),
        tag=state(number).tobytes(),
    )


def vla_eval(number: int, port: int, images: str = "raw", token: str | None = None) -> Request:
    """vla-eval's websocket: HELLO is answered, EPISODE_START is not, then an ACTION for each OBSERVATION.

    Ours would by itself carry a chunk out step by step; the query asks for a forward pass each time, as of the peer.
    """

    def packed(kind: str, payload: dict[str, Any], seq: int) -> bytes:
        return frame(msgpack.packb({"type": kind, "payload": payload, "seq": seq, "timestamp": time.time()}))

    def picture(image: np.ndarray) -> dict[Any, Any]:
        if images == "raw":
            return _array(image, str)
        return {"__image__": True, "format": "jpeg", "data": jpeg(image), "shape": list(image.shape)}

    observation = {
        "images": {name: picture(each) for name, each in pictures(number).items()},
        "states": _array(state(number), str),
        "state": _array(state(number), str),
        "task_description": PROMPT,
    }
    return Request(
        opening=upgrade("/vla-eval?answers=chunk", port, token),
        hello=packed("hello", {"harness_version": "0.8.0", "protocol_version": 1}, 0),
        greeted=False,
        before=packed("episode_start", {"task": {"name": "load"}}, 1),
        message=packed("observation", observation, 2),
        tag=state(number).tobytes(),
    )


def http(number: int, port: int, images: str = "raw", token: str | None = None) -> Request:
    """POST /v1/act: msgpack with raw pictures, JSON with base64 of JPEG."""
    if images == "raw":
        kind, body = "application/msgpack", msgpack.packb(_observation_map(number))
        tag = state(number).tobytes()
    else:
        kind = "application/json"
        values = {
            f"observation/images/{n}": base64.b64encode(jpeg(p)).decode() for n, p in pictures(number).items()
        }
        body = json.dumps(
            values | {"observation/state": state(number).tolist(), "prompt": PROMPT, "seed": number}
        )
        body = body.encode()
        tag = json.dumps(state(number).tolist()).encode()
    key = f"Authorization: Bearer {token}\r\n" if token else ""
    head = (
        f"POST /v1/act HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: {kind}\r\n{key}"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    return Request(b"", b"", False, b"", head.encode() + body, tag, http=True)


def _observation_map(number: int) -> dict[str, Any]:
    images = {f"observation/images/{n}": _array(p, str.encode) for n, p in pictures(number).items()}
    return images | {"observation/state": _array(state(number), str.encode), "prompt": PROMPT, "seed": number}


PROTOCOLS: dict[str, Callable[..., Request]] = {"openpi": openpi, "vla-eval": vla_eval, "http": http}


def frames(buffer: bytearray) -> list[tuple[int, bytes]]:
    """Takes the whole frames of a server (never masked) off the front of a buffer: (opcode, data) each."""
    found = []
    while len(buffer) >= 2:
        size, head = buffer[1] & 0x7F, 2
        if size == 126:
            head = 4
            if len(buffer) < head:
                break
            (size,) = struct.unpack_from("!H", buffer, 2)
        elif size == 127:
            head = 10
            if len(buffer) < head:
                break
            (size,) = struct.unpack_from("!Q", buffer, 2)
        if len(buffer) < head + size:
            break
        found.append((buffer[0] & 0x0F, bytes(buffer[head : head + size])))
        del buffer[: head + size]
    return found
