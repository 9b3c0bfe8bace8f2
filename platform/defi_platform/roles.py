"""Roles of a cluster's nodes: work goes to the nodes that are set aside for it, wherever a cluster has such nodes.

A node's role is its Ray label `defi.role`. Nodes that an autoscaler is still to add have no label that could be read,
so the head node says how much of a resource the nodes of a role can have together: `defi.max.decode.CPU=64`.
On a cluster without either label (a laptop, one `ray start --head`) no work asks for one, and the same config runs.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from typing import Any, Final, Literal

import ray

from defi_platform.errors import UserError

Role = Literal["decode", "train"]

DECODE: Final = "decode"
"""Nodes with CPUs: opening and decoding of videos, ingest, simulators."""
TRAIN: Final = "train"
"""Nodes with accelerators: training workers, encoders, validation beside a training, replicas of served policies."""

LABEL: Final = "defi.role"
MAXIMUM: Final = "defi.max"
"""Start of the head node's labels `defi.max.<role>.<resource>`, whose values are numbers."""

VARIABLE: Final = "DEFI_ROLES"
"""Environment variable that is `off` in the processes of a job whose config says ray.roles=off."""


class RoleError(UserError):
    """A label of a node from which no role can be read."""


def options(role: Role, *, share: float | None = None) -> dict[str, Any]:
    """Options with which Ray runs a task or an actor on the nodes of a role.

    Args:
        role: of the work.
        share: logical CPUs asked for where no nodes are set aside for the role, so that the work fits beside what
            holds the rest. On nodes of its own it asks for a whole CPU, by which an autoscaler counts it. None:
            `num_cpus` is not among the options.

    Returns: keyword arguments for `ray.remote`, `.options`, Ray Data's `map_batches` and Serve's `ray_actor_options`;
        {} where the connected cluster has no such nodes, or where none is connected, and `share` is None.
    """
    selector = label_selector(role)
    chosen: dict[str, Any] = {"label_selector": selector} if selector else {}
    if share is not None:
        chosen["num_cpus"] = 1.0 if selector else share
    return chosen


@contextlib.contextmanager
def switched(used: bool) -> Iterator[None]:
    """Whether roles are used, in this process and those that it starts meanwhile.

    Args:
        used: False: work runs on any node. True leaves it as it is, which is used unless the variable says `off`.
    """
    before = os.environ.get(VARIABLE)
    if not used:
        os.environ[VARIABLE] = "off"
    try:
        yield
    finally:
        if not used:
            os.environ.pop(VARIABLE)
            if before is not None:
                os.environ[VARIABLE] = before


def label_selector(role: Role) -> dict[str, str]:
    """Ray's label selector of a role; {} where the connected cluster has no such nodes, or with ray.roles=off."""
    if os.environ.get(VARIABLE) == "off" or not ray.is_initialized():
        return {}
    nodes = _labels()
    known = any(labels.get(LABEL) == role for labels in nodes.values()) or _maxima(role, nodes)
    return {LABEL: role} if known else {}


def capacity(role: Role, resource: str) -> float:
    """The most of a Ray resource that work of a role can get; of all nodes where none are set aside for it.

    Nodes that an autoscaler is still to add are included as far as the head node's labels tell of them.
    """
    allowed = node_ids(role)
    present = sum(
        float(node["Resources"].get(resource, 0.0))
        for node in ray.nodes()
        if node["Alive"] and (allowed is None or node["NodeID"] in allowed)
    )
    return present if allowed is None else max(present, _maxima(role, _labels()).get(resource, 0.0))


def node_ids(role: Role) -> frozenset[str] | None:
    """Ray's ids of the living nodes on which work of a role may run; None: on all of them."""
    if not label_selector(role):
        return None
    return frozenset(node for node, labels in _labels().items() if labels.get(LABEL) == role)


def _labels() -> dict[str, Mapping[str, str]]:
    """Node id -> Ray labels, of the living nodes."""
    return {node["NodeID"]: node.get("Labels") or {} for node in ray.nodes() if node["Alive"]}


def _maxima(role: Role, nodes: Mapping[str, Mapping[str, str]]) -> dict[str, float]:
    """Resource -> the most of it that the nodes of a role can have together, as a head node says."""
    start = f"{MAXIMUM}.{role}."
    found = {}
    for labels in nodes.values():
        for label, value in labels.items():
            if label.startswith(start):
                try:
                    found[label.removeprefix(start)] = float(value)
                except ValueError:
                    raise RoleError(
                        f"a node has the Ray label {label}={value}; its value is to be a number."
                    ) from None
    return found
