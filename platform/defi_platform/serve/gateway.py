"""The HTTP ingress: its deployment and routes; websocket_session.py serves the sockets.

Serve sends this class to its replicas by value, taken at the moment of decoration. So there is no
`from __future__ import annotations` here (FastAPI could not resolve `WebSocket`, and would answer every
handshake with 403), and no function that is defined further down.
"""

from typing import Any

from fastapi import FastAPI, WebSocket
from fastapi.responses import JSONResponse
from ray import serve
from ray.serve.handle import DeploymentHandle

from defi_platform.serve.websocket_session import WebSocketSessions

api = FastAPI(title="DeFI policy", docs_url=None, redoc_url=None, openapi_url=None)


@serve.ingress(api)
class Gateway:
    """Holds the clients' sockets; each is one ongoing request of Serve for as long as it is open."""

    def __init__(self, policy: DeploymentHandle[Any], max_connections: int) -> None:
        self._sessions = WebSocketSessions(policy, max_connections)

    @api.websocket("/")
    async def websocket(self, socket: WebSocket) -> None:
        """The openpi protocol; openpi-client connects to ws://host:port without a path."""
        await self._sessions.serve(socket)

    @api.get("/healthz")
    async def healthz(self) -> JSONResponse:
        """200 once a replica holds the policy; 503 while the server drains."""
        if self._sessions.draining:
            return JSONResponse({"status": "draining"}, status_code=503)
        await self._sessions.greeting()
        return JSONResponse({"status": "ok", "connections": self._sessions.open})

    @api.get("/metadata")
    async def metadata(self) -> JSONResponse:
        """The greeting of a websocket, as JSON."""
        return JSONResponse(await self._sessions.greeting())

    async def drain(self) -> int:
        """Takes no new client and closes each socket once its answer is sent.

        Returns:
            The number of open sockets.
        """
        return self._sessions.drain()
