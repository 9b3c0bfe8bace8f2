"""The HTTP side of a replica as an ASGI application."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response

from defi_platform.serve.http import pages
from defi_platform.serve.http.act import (
    JSON,
    media_type,
    read_body,
    reply_body,
    reply_of,
    status,
    with_images,
)
from defi_platform.serve.http.schema import act_operation
from defi_platform.serve.observation_keys import OWN
from defi_platform.serve.protocols.openpi_wire import BATCH_KEY, batch_of
from defi_platform.serve.protocols.wire import SPEND, WireSettings
from defi_platform.serve.refusals import BusyError, DeadlineError, PolicyFailure, Refusal
from defi_platform.serve.sessions.decoding import RESIZE_AT_ONCE, in_thread
from defi_platform.serve.sessions.options import CHUNK
from defi_platform.serve.sessions.session import Session, SessionAnswer

if TYPE_CHECKING:
    from defi_platform.serve.inference.service import ActionService


def http_app(
    service: ActionService,
    wires: WireSettings | None = None,
    ready: Callable[[], str | None] = lambda: None,
) -> FastAPI:
    """POST /v1/act, /healthz (readiness), /livez, /metadata, /openapi.json, /docs, and a page to try the policy at /.

    HTTP has no sessions: every answer is a whole chunk, and an observation without a seed gets a random one.

    Args:
        service: answers observations; runs on the loop of this application.
        wires: keys of observations; the defaults when None.
        ready: why no new client should come here now, in words; None: it may.
    """
    keys = (wires or WireSettings()).keys or OWN
    options = replace((wires or WireSettings()).session, answers=CHUNK, seed=None)
    app = FastAPI(
        title="DeFI policy",
        description="Actions of a robot policy for an observation. See /metadata for the policy that is served.",
        version="1",
        docs_url=None,
        redoc_url=None,
    )

    def decode(body: bytes, content_type: str) -> tuple[bool, list[Any]]:
        message = read_body(body, content_type)
        batch = isinstance(message, dict) and BATCH_KEY in message
        observations = batch_of(message) if batch else [message]
        if (media_type(content_type) or JSON) == JSON:
            observations = [with_images(seen, service.spec, keys) for seen in observations]
        return batch, observations

    @app.post("/v1/act", **act_operation(service.spec, keys))
    async def act(request: Request) -> Response:
        """Actions for one observation, or for each of a batch."""
        content_type = request.headers.get("content-type", "")
        body = await request.body()
        session = Session(service, options, keys, answers=CHUNK, client=_client(request))
        try:
            small = len(body) <= RESIZE_AT_ONCE
            batch, observations = (
                decode(body, content_type) if small else await in_thread(lambda: decode(body, content_type))
            )
            if (spend := request.scope.get(SPEND)) is not None:
                spend(len(observations) - 1)
            answers = await _unless_hung_up(
                request,
                session.answer_batch(observations) if batch else _alone(session.answer(observations[0])),
            )
            if answers is None:
                return Response(status_code=499)  # for nobody
        except Refusal as refusal:
            if not isinstance(refusal, BusyError | DeadlineError | PolicyFailure):
                service.count(refusal)
            return _refused(refusal)
        content, kind = reply_body(
            reply_of(answers, service.digest, batch=batch), content_type, request.headers.get("accept", "")
        )
        return Response(content, media_type=kind)

    @app.head("/healthz", include_in_schema=False)
    @app.get("/healthz", summary="Readiness")
    async def healthz() -> Response:
        """200 where new clients are welcome; 503 while the server starts or drains."""
        why = ready()
        if why is not None:
            return JSONResponse({"status": why}, status_code=503, headers={"retry-after": "1"})
        return JSONResponse({"status": "ok", "policy_digest": service.digest})

    @app.head("/-/healthz", include_in_schema=False)
    @app.get("/-/healthz", include_in_schema=False)
    async def serve_health() -> Response:
        """Readiness as Ray Serve's own proxy says it: KubeRay asks each pod for it and looks for this word."""
        why = ready()
        return PlainTextResponse("success" if why is None else why, status_code=200 if why is None else 503)

    @app.head("/livez", include_in_schema=False)
    @app.get("/livez", summary="Liveness")
    async def livez() -> Response:
        """200 as long as the process answers at all."""
        return JSONResponse({"status": "alive"})

    @app.get("/metadata", summary="The policy")
    async def metadata() -> Response:
        """What a websocket is greeted with, and the keys of an observation."""
        content = {**service.metadata(), "keys": keys.described(service.spec.cameras)}
        return Response(json.dumps(content, default=str), media_type=JSON)

    pages.add_to(app)
    return app


async def _alone(answer: Awaitable[SessionAnswer]) -> list[SessionAnswer]:
    return [await answer]


async def _unless_hung_up(
    request: Request, answering: Coroutine[Any, Any, list[SessionAnswer]]
) -> list[SessionAnswer] | None:
    """Answers; None, and their places in the queue are free, where the client hangs up before that."""

    async def hung_up() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    answers, gone = asyncio.ensure_future(answering), asyncio.ensure_future(hung_up())
    try:
        await asyncio.wait((answers, gone), return_when=asyncio.FIRST_COMPLETED)
        return answers.result() if answers.done() else None
    finally:
        answers.cancel()
        gone.cancel()


def _client(request: Request) -> tuple[str, int] | None:
    return None if request.client is None else (request.client.host, request.client.port)


def _refused(refusal: Refusal) -> Response:
    headers = {}
    if isinstance(refusal, BusyError):
        headers["retry-after"] = str(max(1, math.ceil(refusal.retry_after_s)))
    content: dict[str, Any] = {"error": str(refusal), "reason": refusal.reason}
    return JSONResponse(content, status_code=status(refusal), headers=headers)
