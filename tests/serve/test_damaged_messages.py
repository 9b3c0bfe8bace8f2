"""Damaged and hostile messages of every protocol, offline."""

from __future__ import annotations

import asyncio
import random
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import msgpack
import numpy as np
import pytest
from dialogues import IMAGE, LAB_OBSERVATION, lab_frame, replies, vla_eval_image, vla_message, wire_of
from sleeping_policy import SPEC, SleepingService, observation

from defi_platform.serve.protocols import openpi, vla_eval, xpolicylab
from defi_platform.serve.protocols.messages import MAX_DEPTH, MAX_ITEMS
from defi_platform.serve.protocols.openpi_wire import OpenpiWire
from defi_platform.serve.protocols.vla_eval import VlaEvalWire
from defi_platform.serve.protocols.wire import Wire
from defi_platform.serve.protocols.xpolicylab import XPolicyLabWire


def messages_of(kind: str) -> list[bytes]:
    """Good messages of a protocol."""
    if kind == "openpi":
        scalars = observation(2) | {"seed": np.int64(3), "deadline_ms": np.float32(9), "episode": "a"}
        return [openpi.pack(observation(1)), openpi.pack({"batch": [observation(1)]}), openpi.pack(scalars)]
    if kind == "vla_eval":
        raw = {
            "__image__": True,
            "format": "raw",
            "data": IMAGE.tobytes(),
            "dtype": "|u1",
            "shape": list(IMAGE.shape),
        }
        png = {"__image__": True, "format": "png", "data": vla_eval_image(IMAGE, "png"), "shape": [24, 32, 3]}
        return [
            vla_message("observation", {"images": {"front": image}, "task_description": "go"})
            for image in (raw, png)
        ] + [vla_message(other) for other in ("hello", "episode_start", "episode_end")]
    return [lab_frame("infer", {"observation": LAB_OBSERVATION}), lab_frame("hello"), lab_frame("reset")]


def mutated(data: bytes, draw: random.Random) -> bytes:
    """A message with some damage: bytes changed, cut, doubled, or a header that lies."""
    damaged = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 5))):
        at = draw.randrange(len(damaged) + 1)
        match draw.randrange(6):
            case 0:
                damaged[at : at + 1] = bytes([draw.randrange(256)])
            case 1:
                del damaged[at : at + draw.randrange(1, 40)]
            case 2:
                damaged[at:at] = damaged[at : at + draw.randrange(1, 40)]
            case 3:
                damaged[at:at] = draw.choice(
                    (
                        b"\xdd\xff\xff\xff\xff",
                        b"\xdf\x7f\xff\xff\xff",
                        b"\xc6\xff\xff\xff\xff",
                        b"\xc7\x01\x05x",
                        b"\xcf" + b"\xff" * 8,
                    )
                )
            case 4:
                word, other = draw.choice(WORDS), draw.choice(WORDS)
                place = damaged.find(word)
                if place >= 0:
                    damaged[place : place + len(word)] = other
            case 5:
                del damaged[at:]
        if not damaged:
            return b""
    return bytes(damaged)


WORDS = (
    b"<f4",
    b"|u1",
    b"|O8",
    b"<U9",
    b"<c8",
    b"data",
    b"seed",
    b"type",
    b"raw",
    b"png",
    b"nd",
    b"prompt",
    b"front",
)
KINDS: dict[str, type[Wire]] = {"openpi": OpenpiWire, "vla_eval": VlaEvalWire, "xpolicylab": XPolicyLabWire}
READERS: dict[str, Callable[[bytes], Any]] = {
    "openpi": openpi.unpack,
    "vla_eval": vla_eval.unpack,
    "xpolicylab": xpolicylab.unpack,
}
MUTATIONS = 17_000
FUZZ_S = 12.0
"""A bound for slow machines; what was done is asserted to be most."""


@pytest.mark.parametrize("kind", KINDS)
def test_thousands_of_damaged_messages_are_answered_or_refused_in_words(kind: str) -> None:
    good, draw = messages_of(kind), random.Random(kind)
    service = SleepingService()
    service.spec = replace(SPEC, cameras=("*",))
    wire = wire_of(KINDS[kind], service)
    deadline, done, refused = time.process_time() + FUZZ_S, 0, 0

    async def talk() -> None:
        nonlocal done, refused
        while done < MUTATIONS:
            done += 1
            reply = await wire.answer(mutated(draw.choice(good), draw))
            assert reply.data is None or len(reply.data) < 8000
            refused += isinstance(reply.data, str) or b"error" in (reply.data or b"")
            if time.process_time() > deadline:
                break

    asyncio.run(talk())
    assert done > MUTATIONS * 0.5 and refused > done * 0.3
    assert all(reply.close is None for reply in replies(wire, good[0]))
    assert service.asked > 0


HOSTILE: dict[str, bytes] = {
    "15 MiB of empty maps": b"\xdd" + (15 * 2**20).to_bytes(4, "big") + b"\x80" * (15 * 2**20),
    "lists that say they have millions of entries": b"\xdd\x00\xe0\x00\x00" * 3_000_000,
    "maps in maps": b"\x81\xa1a" * 1_000_000 + b"\xc0",
    "100,000 names": msgpack.packb({f"observation/images/frnt{number}": 1 for number in range(100_000)}),
    "one huge string": msgpack.packb({"prompt": "x" * 10_000_000}),
    "a scalar that is 1 GB of text": msgpack.packb(
        {"seed": {b"__npgeneric__": True, b"data": 5, b"dtype": "<U268435455"}}
    ),
    "a shape of 2**200 pixels": msgpack.packb(
        {"a": {b"__ndarray__": True, b"data": b"", b"dtype": "|u1", b"shape": [2**62, 2**62, 0]}}
    ),
    "a long name": msgpack.packb({"k" * 60_000: 1}),
}


@pytest.mark.parametrize("what", HOSTILE)
@pytest.mark.parametrize("kind", KINDS)
def test_small_messages_that_would_become_large_cost_nothing(kind: str, what: str) -> None:
    wire = wire_of(KINDS[kind])
    replies(wire, b"\xc0")
    tracemalloc.start()
    started = time.process_time()
    try:
        (reply,) = replies(wire, HOSTILE[what])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert reply.data is not None and len(reply.data) < 3000
    assert peak < 4 * 2**20 and time.process_time() - started < 2.0


def test_limits_are_not_in_the_way_of_what_robots_send() -> None:
    nested: Any = 1
    for _ in range(MAX_DEPTH - 1):
        nested = {"a": nested}
    assert openpi.unpack(msgpack.packb(nested)) == nested
    with pytest.raises(openpi.ProtocolError, match=f"{MAX_DEPTH} deep"):
        openpi.unpack(msgpack.packb({"a": {"b": nested}}))
    assert len(openpi.unpack(msgpack.packb([1] * (MAX_ITEMS - 1)))) == MAX_ITEMS - 1
    with pytest.raises(openpi.ProtocolError, match=f"at most {MAX_ITEMS}"):
        openpi.unpack(msgpack.packb([1] * MAX_ITEMS))
