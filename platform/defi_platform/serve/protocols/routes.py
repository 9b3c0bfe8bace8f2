"""Protocols of websockets, by the path of the handshake."""

from __future__ import annotations

from defi_platform.serve.protocols.openpi_wire import OpenpiWire
from defi_platform.serve.protocols.vla_eval import VlaEvalWire
from defi_platform.serve.protocols.wire import Wire
from defi_platform.serve.protocols.xpolicylab import XPolicyLabWire

WIRES: dict[str, type[Wire]] = {
    "/": OpenpiWire,
    "/openpi": OpenpiWire,
    "/vla-eval": VlaEvalWire,
    "/xpolicylab": XPolicyLabWire,
}
"""Protocols by path; openpi-client connects without one."""


def wire_class(path: str) -> type[Wire] | None:
    """The protocol at a path; None where there is none.

    Args:
        path: of a handshake, without the query; one slash at its end changes nothing.
    """
    return WIRES.get(path.removesuffix("/") or "/")
