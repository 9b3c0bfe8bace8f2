"""The cluster's record of the policy that it serves: kept with the cluster's head, beyond the life of any job."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any

from ray.experimental import internal_kv

_SPACE = b"defi_serve"
_DEPLOYMENT = b"deployment"
_LISTENER = b"listener:"


@dataclass(frozen=True, kw_only=True)
class Deployment:
    """The policy that a cluster serves, or is about to."""

    application: str
    """Serve's name of it."""
    generation: int
    """Milliseconds since 1970 of its start; higher than that of any before it."""
    digest: str
    policy: str
    host: str
    port: int
    secret: str
    """Hex digits; known to listeners and replicas only."""
    owner: str
    """Names the job that stops it at its end."""
    job: str = ""
    """Ray's id of that job; empty where Serve's own command started it, which needs no job to go on."""
    config: dict[str, Any] = field(default_factory=dict)
    """The whole ServeConfig but its `ray`."""
    retiring: tuple[str, ...] = ()
    """Older applications that still finish episodes."""
    ending: bool = False
    """Its job has begun to shut it down."""


def read() -> Deployment | None:
    """The record of the connected cluster; None where it serves nothing of ours."""
    stored = internal_kv._internal_kv_get(_DEPLOYMENT, namespace=_SPACE)
    if stored is None:
        return None
    values = json.loads(stored)
    return Deployment(**{**values, "retiring": tuple(values["retiring"])})


def write(deployment: Deployment) -> None:
    """Replaces the record."""
    value = json.dumps(dataclasses.asdict(deployment)).encode()
    internal_kv._internal_kv_put(_DEPLOYMENT, value, overwrite=True, namespace=_SPACE)


def clear() -> None:
    """Removes the record and all announcements of listeners."""
    internal_kv._internal_kv_del(_DEPLOYMENT, namespace=_SPACE)
    for key in internal_kv._internal_kv_list(_LISTENER, namespace=_SPACE):
        internal_kv._internal_kv_del(key, namespace=_SPACE)


def announce(node: str, announcement: dict[str, Any] | None) -> None:
    """Publishes what a listener says to those of other machines; None: it has ended.

    Args:
        node: Ray's id of its node.
        announcement: plain values; see `Listener.announcement`.
    """
    key = _LISTENER + node.encode()
    if announcement is None:
        internal_kv._internal_kv_del(key, namespace=_SPACE)
    else:
        value = json.dumps(announcement).encode()
        internal_kv._internal_kv_put(key, value, overwrite=True, namespace=_SPACE)


def announcements(besides: str) -> dict[str, dict[str, Any]]:
    """The announcements of all listeners but that of the node `besides`, by Ray's id of their node."""
    found = {}
    for key in internal_kv._internal_kv_list(_LISTENER, namespace=_SPACE):
        value = internal_kv._internal_kv_get(key, namespace=_SPACE)
        if key != _LISTENER + besides.encode() and value is not None:
            found[key.removeprefix(_LISTENER).decode()] = json.loads(value)
    return found


def plain(config: Any) -> dict[str, Any]:
    """A ServeConfig as plain values, without the connection to Ray: what two deployments are compared by."""
    values = json.loads(json.dumps(dataclasses.asdict(config)))
    del values["ray"]
    return dict(values)
