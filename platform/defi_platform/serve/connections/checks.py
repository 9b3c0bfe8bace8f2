"""The settings of sockets, checked before anything starts."""

from __future__ import annotations

import dataclasses
import math

from defi_platform.config import LimitsConfig, SecurityConfig
from defi_platform.errors import ConfigError
from defi_platform.serve.connections.access import Access
from defi_platform.serve.connections.tls import server_context

SHORTEST_STALL_S = 5.0
"""Replicas report twice a second, on a loaded machine more rarely."""


def check_connections(limits: LimitsConfig, security: SecurityConfig, max_connections: int) -> None:
    """Reads the files and looks at the numbers.

    Args:
        limits: of sockets.
        security: tokens, TLS and rate.
        max_connections: open websockets of a replica.

    Raises:
        ConfigError: a file or a number does not fit; names its key.
    """
    if max_connections < 1:
        raise ConfigError(f"max_connections is {max_connections}; it must be 1 or more.")
    for field in dataclasses.fields(limits):
        value = getattr(limits, field.name)
        if field.name != "action_margin" and not value > 0:
            raise ConfigError(f"limits.{field.name} is {value}; it must be above 0.")
    if not SHORTEST_STALL_S <= limits.stalled_after_s < math.inf:
        raise ConfigError(
            f"limits.stalled_after_s is {limits.stalled_after_s:g}; it must be {SHORTEST_STALL_S:g} or more: a replica "
            "that is only busy would be ended."
        )
    if limits.memory_mib < 2 * limits.max_message_mib:
        raise ConfigError(
            f"limits.memory_mib is {limits.memory_mib}; it must hold two messages of limits.max_message_mib "
            f"({limits.max_message_mib})."
        )
    Access(security)
    server_context(security.tls_cert, security.tls_key)
