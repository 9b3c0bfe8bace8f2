"""Dialogues without sockets, and messages of each protocol."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import msgpack
import numpy as np
from sleeping_policy import SleepingService
from vla_eval.protocol.image_codec import encode_image

from defi_platform.serve.inference.service import ActionService
from defi_platform.serve.protocols import xpolicylab
from defi_platform.serve.protocols.wire import ClientInfo, Reply, Wire, WireSettings

IMAGE = np.random.default_rng(0).integers(0, 256, (24, 32, 3), np.uint8)


def wire_of(
    kind: type[Wire], service: SleepingService | None = None, query: str = "", **settings: Any
) -> Wire:
    client = ClientInfo("127.0.0.1:1", None, "/", query)
    return kind(cast(ActionService, service or SleepingService()), client, WireSettings(**settings))


def replies(wire: Wire, *messages: bytes | str) -> list[Reply]:
    """The replies to some messages, one after another."""

    async def talk() -> list[Reply]:
        return [await wire.answer(message) for message in messages]

    return asyncio.run(talk())


def vla_eval_image(image: np.ndarray, form: str) -> bytes:
    data: bytes = encode_image(image, form)["data"]  # type: ignore[arg-type]
    return data


def vla_message(kind: str, payload: Any = None, seq: Any = 1) -> bytes:
    packed: bytes = msgpack.packb({"type": kind, "payload": payload or {}, "seq": seq, "timestamp": 0.0})
    return packed


def lab_frame(kind: str, payload: dict[str, Any] | None = None, **fields: Any) -> bytes:
    frame = {"message_type": kind, "message_id": "m1", "evaluation_id": "e1", "step": 0, "sent_at": ""}
    return xpolicylab.pack(frame | fields | {"payload": payload or {}})


LAB_OBSERVATION = {
    "vision": {"front": {"color": IMAGE, "depth": IMAGE, "shape": [24, 32]}},
    "instruction": "open the drawer",
    "state": {"arm_joint_state": np.zeros(3, np.float32), "ee_joint_state": np.zeros(1, np.float32)},
    "seed": 3,
}
