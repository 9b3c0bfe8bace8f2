"""Messages that once took gigabytes or seconds are refused in a few words and next to nothing else."""

from __future__ import annotations

import asyncio
import time
import tracemalloc
from typing import Any

import msgpack
import numpy as np
import pytest
from hostile_messages import HURTFUL
from replica_in_process import DIGEST, SPEC, state_as_actions
from robot_messages import observation

from defi_platform.serve.inference.service import ActionService
from defi_platform.serve.observation import Observation
from defi_platform.serve.protocols import openpi
from defi_platform.serve.protocols.openpi_wire import OpenpiWire
from defi_platform.serve.protocols.wire import ClientInfo, Reply

ACCEPTED = {"an image of one row", "an image of one column", "a state of huge integers"}
"""May be answered, as long as that costs nothing."""


def replies(service: ActionService, *messages: bytes) -> list[Reply]:
    async def talk() -> list[Reply]:
        wire = OpenpiWire(service, ClientInfo())
        return [await wire.answer(message) for message in messages]

    return asyncio.run(talk())


def service() -> ActionService:
    return ActionService(state_as_actions, SPEC, DIGEST)


@pytest.mark.parametrize("name", HURTFUL)
def test_a_hurtful_message_is_refused_in_words_for_next_to_nothing(name: str) -> None:
    message, good = HURTFUL[name](), openpi.pack(observation(1))
    replies(service(), good)  # what is imported and built once is not the message's doing
    tracemalloc.start()
    begun = time.process_time()
    bad, after = replies(service(), message, good)
    seconds, (_, peak) = time.process_time() - begun, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert bad.data is not None and len(bad.data) < 2500 and bad.close is None
    assert isinstance(bad.data, str) or name in ACCEPTED, name
    assert peak < 64 * 2**20, f"{peak / 2**20:.0f} MB"
    assert seconds < 1.0
    assert isinstance(after.data, bytes), "the dialogue does not go on"


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1e39])
def test_actions_that_are_not_finite_never_leave_and_are_counted(bad: float) -> None:
    def forward(observations: list[Observation]) -> list[np.ndarray]:
        actions = state_as_actions(observations)
        with np.errstate(over="ignore"):
            actions[0][3, 2] = np.float32(bad)
        return actions

    broken = ActionService(forward, SPEC, DIGEST)
    (reply,) = replies(broken, openpi.pack(observation(1)))
    assert isinstance(reply.data, str) and "No action was sent" in reply.data
    assert broken.snapshot().refusals == {"policy": 1}


def test_every_greeting_and_answer_names_the_policy_that_made_it() -> None:
    serving = service()
    greeting = msgpack.unpackb(OpenpiWire(serving, ClientInfo()).greeting())
    (reply,) = replies(serving, openpi.pack(observation(1)))
    assert isinstance(reply.data, bytes)
    answer: Any = openpi.unpack(reply.data)
    assert greeting["policy_digest"] == answer["policy_digest"] == DIGEST
    assert answer["server_timing"]["total_ms"] > 0


def test_an_echoed_seed_is_short() -> None:
    (reply,) = replies(service(), openpi.pack(observation(1, seed="7" * 60_000)))
    assert isinstance(reply.data, str) and "'seed'" in reply.data and len(reply.data) < 500


def test_a_missing_state_is_named_although_an_image_key_is_nearer() -> None:
    message = observation(1)
    del message["observation/state"]
    (reply,) = replies(service(), openpi.pack(message | {"observation/sate": np.zeros(4)}))
    assert isinstance(reply.data, str)
    assert "'observation/state' is missing" in reply.data and "'observation/sate'" in reply.data
