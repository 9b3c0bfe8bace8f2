"""Which protocol a websocket speaks: decided by the path of its handshake."""

from __future__ import annotations

from defi_platform.serve.protocols.openpi_wire import OpenpiWire
from defi_platform.serve.protocols.wire import Wire

WIRES: dict[str, type[Wire]] = {
    "/": OpenpiWire,
    "/openpi": OpenpiWire,
}
"""Protocols by path; openpi-client connects without one."""


def wire_class(path: str) -> type[Wire] | None:
    """The protocol at a path; None where there is none.

    Args:
        path: of a handshake, without the query; one slash at its end changes nothing.
    """
    return WIRES.get(path.removesuffix("/") or "/")
