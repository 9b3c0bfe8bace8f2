"""Pages for people, whole in themselves: no script, style or picture comes from another host."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from importlib import resources
from typing import Final

from fastapi import FastAPI
from fastapi.responses import Response

_PAGES: Final = {
    "/": ("try.html", "text/html; charset=utf-8"),
    "/docs": ("docs.html", "text/html; charset=utf-8"),
    "/pages/try.js": ("try.js", "text/javascript; charset=utf-8"),
    "/pages/docs.js": ("docs.js", "text/javascript; charset=utf-8"),
    "/pages/page.css": ("page.css", "text/css; charset=utf-8"),
}
PATHS: Final = tuple(_PAGES)
"""They tell nothing of a policy, and are shown without a token: the page asks for it."""
_HEADERS: Final = {
    # Whatever a policy's metadata says, a page runs no script but its own and talks to nobody but this server.
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src blob: data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


def add_to(app: FastAPI) -> None:
    """Adds the pages to an application.

    Args:
        app: of a replica.
    """
    folder = resources.files(__package__) / "templates"
    for path, (name, kind) in _PAGES.items():
        app.add_api_route(path, _page((folder / name).read_bytes(), kind), include_in_schema=False)


def _page(content: bytes, kind: str) -> Callable[[], Awaitable[Response]]:
    async def page() -> Response:
        return Response(content, media_type=kind, headers=_HEADERS)

    return page
