"""What runs on a cluster, whatever its kind: commands of jobs, environment of processes, labels of nodes."""

from __future__ import annotations

from collections import Counter
from importlib.metadata import version
from typing import Any

from defi_platform.roles import LABEL, MAXIMUM
from rendering.values import ClusterValues, JobValues, NodeValues

GIB = 2**30
RAY_VERSION = version("ray")


def arguments(job: JobValues) -> list[str]:
    """A job's name and arguments, as `defi` takes them."""
    config = ["--config", job.config] if job.config else []
    return [job.job, *config, *job.overrides]


def command(job: JobValues) -> list[str]:
    """The command of a job on a machine that has the package."""
    return ["defi", *arguments(job)]


def environment(values: ClusterValues) -> dict[str, str]:
    """Environment variables of every process, without secrets."""
    return {"DEFI_HOME": values.home, **values.env}


def node_labels(node: NodeValues) -> dict[str, str]:
    """Ray's labels of a node."""
    return {LABEL: node.role}


def head_labels(nodes: dict[str, NodeValues]) -> dict[str, str]:
    """Ray's labels of a head: how much the nodes of each role can have together, which no node can tell before it starts."""
    most: Counter[str] = Counter()
    for node in nodes.values():
        most[f"{MAXIMUM}.{node.role}.CPU"] += node.max * node.cpus
        most[f"{MAXIMUM}.{node.role}.GPU"] += node.max * node.gpus
    return {label: str(count) for label, count in sorted(most.items()) if count}


def resources(node: NodeValues) -> dict[str, int]:
    """Ray's resources of a node, as its autoscaler counts them."""
    return {"CPU": node.cpus, "memory": node.memory_gib * GIB} | ({"GPU": node.gpus} if node.gpus else {})


def object_store_bytes(node: NodeValues) -> int:
    """Bytes of a node's object store."""
    return int(node.memory_gib * node.object_store * GIB)


def chosen(values: ClusterValues, names: list[str]) -> dict[str, NodeValues]:
    """The named types of node; all where none is named."""
    return {name: node for name, node in values.nodes.items() if not names or name in names}


def without_empty(mapping: dict[str, Any]) -> dict[str, Any]:
    """A mapping without the entries that are null or empty."""
    return {key: value for key, value in mapping.items() if value not in (None, "", [], {})}
