"""The door: holds the clients' sockets, speaks their protocol, and passes observations on to the replicas."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any

from fastapi import FastAPI, WebSocket, WebSocketDisconnect
from fastapi.responses import JSONResponse
from ray import serve
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from defi_platform.serve.observation import ObservationError, PolicySpec, read_observation
from defi_platform.serve.protocols import openpi
from defi_platform.serve.replica import Answer

log = logging.getLogger("ray.serve")

REPLICA_ATTEMPTS = 3
"""An action is a pure function of observation and seed, so another replica may answer when one dies."""

GOING_AWAY, TRY_AGAIN_LATER = 1001, 1013

api = FastAPI(title="DeFI policy", docs_url=None, redoc_url=None, openapi_url=None)


@serve.ingress(api)
class Gateway:
    """Ingress deployment. One websocket is one ongoing request of Serve for as long as it is open."""

    def __init__(self, policy: DeploymentHandle, max_connections: int) -> None:
        self._policy = policy
        self._max_connections = max_connections
        self._connections = 0
        self._draining = asyncio.Event()
        self._spec: PolicySpec | None = None

    @api.get("/healthz")
    async def healthz(self) -> JSONResponse:
        """200 once a replica holds the policy; 503 before that and while the server drains."""
        if self._draining.is_set():
            return JSONResponse({"status": "draining"}, status_code=503)
        await self._policy_spec()
        return JSONResponse({"status": "ok", "connections": self._connections})

    @api.get("/metadata")
    async def metadata(self) -> JSONResponse:
        """What a websocket is greeted with, as JSON."""
        return JSONResponse(self._greeting(await self._policy_spec()))

    @api.websocket("/")
    async def converse(self, socket: WebSocket) -> None:
        """One client's episode after episode: greeting, then an answer or an error text per observation."""
        await socket.accept()
        if self._draining.is_set() or self._connections >= self._max_connections:
            await self._turn_away(socket)
            return
        self._connections += 1
        try:
            spec = await self._policy_spec()
            await socket.send_bytes(openpi.pack(self._greeting(spec)))
            await self._answer_until_gone(socket, spec)
        except WebSocketDisconnect:
            pass  # the client hung up while it was being answered
        finally:
            self._connections -= 1

    async def drain(self) -> int:
        """Takes no new client; closes each socket once its answer is sent. Returns: how many were open."""
        self._draining.set()
        return self._connections

    # ------------------------------------------------------------------ one connection

    async def _answer_until_gone(self, socket: WebSocket, spec: PolicySpec) -> None:
        draining = asyncio.ensure_future(self._draining.wait())
        try:
            while True:
                receiving = asyncio.ensure_future(socket.receive())
                await asyncio.wait({receiving, draining}, return_when=asyncio.FIRST_COMPLETED)
                if not receiving.done():
                    receiving.cancel()
                    await socket.close(GOING_AWAY, "the policy server is shutting down")
                    return
                message = receiving.result()
                if message["type"] == "websocket.disconnect":
                    return
                answer = await self._answer(message, spec)
                # openpi-client takes a text message for an error and bytes for an answer.
                await (socket.send_text(answer) if isinstance(answer, str) else socket.send_bytes(answer))
        finally:
            draining.cancel()

    async def _answer(self, message: dict[str, Any], spec: PolicySpec) -> bytes | str:
        arrived = time.perf_counter()
        data = message.get("bytes")
        if data is None:
            return "an observation is one binary message (msgpack); got a text message."
        try:
            # Decoding and resizing large images takes milliseconds, which the other sockets need not wait for.
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

    async def _act(self, observation: Any) -> Answer:
        for attempt in range(1, REPLICA_ATTEMPTS):
            try:
                return await self._policy.act.remote(observation)
            except RayActorError as error:
                log.warning("replica died under an observation (attempt %d), trying another: %s", attempt, error)
        return await self._policy.act.remote(observation)

    async def _turn_away(self, socket: WebSocket) -> None:
        # openpi-client cannot read a text where it expects the greeting; a close reason it shows.
        if self._draining.is_set():
            await socket.close(GOING_AWAY, "the policy server is shutting down")
            return
        await socket.close(TRY_AGAIN_LATER, f"all {self._max_connections} connections are taken (max_connections)")

    async def _policy_spec(self) -> PolicySpec:
        if self._spec is None:
            self._spec = await self._policy.spec.remote()
        return self._spec

    def _greeting(self, spec: PolicySpec) -> dict[str, Any]:
        return {"protocol": openpi.PROTOCOL, **spec.metadata()}


def _cause(error: Exception) -> str:
    cause = getattr(error, "cause", None) or error
    return f"{type(cause).__name__}: {cause}".splitlines()[0]
