"""The websocket sessions of a gateway: a greeting, then an answer or an error for each observation."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any

from fastapi import WebSocket, WebSocketDisconnect
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from defi_platform.serve.observation import (
    Answer,
    Observation,
    PolicySpec,
    read_observation,
)
from defi_platform.serve.protocols import openpi
from defi_platform.serve.refusals import ObservationError

log = logging.getLogger("ray.serve")

REPLICA_ATTEMPTS = 3
"""Replicas asked for one action. It is a pure function of observation and seed, so another may answer when one dies."""

GOING_AWAY, TRY_AGAIN_LATER = 1001, 1013


class WebSocketSessions:
    """All sockets of one gateway."""

    def __init__(self, policy: DeploymentHandle[Any], max_connections: int) -> None:
        """Prepares for clients.

        Args:
            policy: the deployed `PolicyReplica`.
            max_connections: open sockets; the next client is turned away.
        """
        self._policy = policy
        self._max_connections = max_connections
        self._spec: PolicySpec | None = None
        self._shutting_down = asyncio.Event()
        self.open = 0
        """Sockets that have been greeted and not closed."""

    @property
    def draining(self) -> bool:
        """The server is shutting down: new clients are turned away."""
        return self._shutting_down.is_set()

    def drain(self) -> int:
        """Takes no new client and closes each socket once its answer is sent.

        Returns:
            The number of open sockets.
        """
        self._shutting_down.set()
        return self.open

    async def greeting(self) -> dict[str, Any]:
        """The metadata sent to a client on connecting. Waits until a replica holds the policy."""
        return {"protocol": openpi.PROTOCOL, **(await self._policy_spec()).metadata()}

    async def serve(self, socket: WebSocket) -> None:
        """Serves one client, from handshake to hang-up."""
        await socket.accept()
        # openpi-client cannot read a text where it expects the greeting, but it shows a close reason.
        if self.draining:
            await socket.close(GOING_AWAY, "the policy server is shutting down")
            return
        if self.open >= self._max_connections:
            reason = f"all {self._max_connections} connections are taken (max_connections)"
            await socket.close(TRY_AGAIN_LATER, reason)
            return
        self.open += 1
        try:
            await socket.send_bytes(openpi.pack(await self.greeting()))
            await self._answer_until_disconnect(socket)
        except WebSocketDisconnect:
            pass  # the client hung up while it was being answered
        finally:
            self.open -= 1

    async def _answer_until_disconnect(self, socket: WebSocket) -> None:
        shutting_down = asyncio.ensure_future(self._shutting_down.wait())
        try:
            while True:
                receiving = asyncio.ensure_future(socket.receive())
                await asyncio.wait({receiving, shutting_down}, return_when=asyncio.FIRST_COMPLETED)
                if not receiving.done():
                    receiving.cancel()
                    await socket.close(GOING_AWAY, "the policy server is shutting down")
                    return
                message = receiving.result()
                if message["type"] == "websocket.disconnect":
                    return
                answer = await self._answer(message.get("bytes"))
                # openpi-client takes a text message for an error and bytes for an answer.
                await (socket.send_text(answer) if isinstance(answer, str) else socket.send_bytes(answer))
        finally:
            shutting_down.cancel()

    async def _answer(self, data: bytes | None) -> bytes | str:
        arrived = time.perf_counter()
        spec = await self._policy_spec()
        if data is None:
            return "an observation is one binary message (msgpack); got a text message."
        try:
            # Large images take milliseconds to decode and resize, which no other socket need wait for.
            observation = await asyncio.to_thread(lambda: read_observation(openpi.unpack(data), spec))
        except (openpi.ProtocolError, ObservationError) as error:
            return str(error)
        try:
            answer = await self._act(observation)
        except (RayServeException, RayTaskError, RayActorError) as error:
            log.warning("no action for an observation: %s", error)
            return f"the policy failed on this observation: {_cause(error)}"
        reply: dict[str, Any] = {
            "actions": answer.actions,
            "seed": observation.seed,
            "server_timing": {
                "queue_ms": answer.queue_ms,
                "infer_ms": answer.infer_ms,
                "batch_size": answer.batch_size,
                "total_ms": (time.perf_counter() - arrived) * 1e3,
            },
        }
        if observation.ignored:
            reply["ignored"] = list(observation.ignored)
        return openpi.pack(reply)

    async def _act(self, observation: Observation) -> Answer:
        attempt = 1
        while True:
            try:
                answer: Answer = await self._policy.act.remote(observation)
                return answer
            except RayActorError as error:
                if attempt == REPLICA_ATTEMPTS:
                    raise
                log.warning("a replica died under an observation (attempt %d): %s", attempt, error)
                attempt += 1

    async def _policy_spec(self) -> PolicySpec:
        if self._spec is None:
            self._spec = await self._policy.spec.remote()
        return self._spec


def _cause(error: Exception) -> str:
    cause = getattr(error, "cause", None) or error
    return f"{type(cause).__name__}: {cause}".splitlines()[0]
