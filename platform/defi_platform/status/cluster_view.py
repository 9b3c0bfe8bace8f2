"""State of a cluster: its nodes, the platform's jobs on it, and the policy that it serves."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray._private.worker import get_dashboard_url

from defi_platform import roles
from defi_platform.errors import one_line
from defi_platform.serve.deployment.command import live_line
from defi_platform.serve.listener import registry
from defi_platform.serve.listener.actor import ask_all
from defi_platform.status.run_status import duration
from defi_platform.supervise.ray_jobs import last_line

MAX_JOBS = 20
"""Ended jobs that are listed, the newest; the others are counted."""


@dataclass(frozen=True)
class Job:
    """A job of a cluster, as Ray's job API has it."""

    name: str
    command: str
    status: str
    message: str
    started: float
    """Unix time."""
    ended: float | None

    def line(self, now: float) -> str:
        """The job on one line."""
        lasted = duration((self.ended or now) - self.started)
        # Of a message the reason is enough; the rest of it is the job's log.
        why = f": {last_line(self.message)}" if self.status == "FAILED" and self.message else ""
        return f"{self.name}  {self.status.lower()}  {lasted}  {self.command}{why}"


def cluster_lines(now: float | None = None) -> list[str]:
    """The state of the connected cluster, line by line.

    Args:
        now: Unix time; None: of this machine's clock.
    """
    lines = [f"nodes: {nodes_line(ray.nodes())}"]
    pending = _pending()
    if pending:
        lines.append(f"autoscaler: {pending}")
    try:
        lines += [f"job {line}" for line in job_lines(_jobs(), time.time() if now is None else now)]
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        lines.append(f"jobs: not known, the dashboard does not answer ({one_line(error)[:200]})")
    served = registry.read()
    if served is not None:
        lines.append(f"policy {served.policy} ({served.digest[:8]}) at {served.host}:{served.port}")
        lines.append(f"  {live_line(ask_all('state'))}")
    return lines


def nodes_line(nodes: Sequence[Mapping[str, Any]]) -> str:
    """Living nodes by role with their resources; dead ones are counted.

    Args:
        nodes: as `ray.nodes` returns them.
    """
    alive: dict[str, list[Mapping[str, Any]]] = {}
    for node in nodes:
        if node["Alive"]:
            head = "node:__internal_head__" in node["Resources"]
            role = (node.get("Labels") or {}).get(roles.LABEL) or ("head" if head else "worker")
            alive.setdefault(role, []).append(node)
    parts = []
    for role, members in sorted(alive.items(), key=lambda item: item[0] != "head"):
        total: Counter[str] = Counter()
        for node in members:
            total.update({name: node["Resources"].get(name, 0) for name in ("CPU", "GPU")})
        amounts = ", ".join(f"{amount:g} {name}" for name, amount in total.items() if amount)
        parts.append(f"{len(members)} {role}" + (f" ({amounts})" if amounts else ""))
    dead = sum(not node["Alive"] for node in nodes)
    return ", ".join(parts) + (f"; {dead} have left" if dead else "")


def job_lines(jobs: Sequence[Job], now: float) -> list[str]:
    """Jobs, those that run first, then the newest that have ended.

    Args:
        jobs: in any order.
        now: Unix time.
    """
    running = sorted((job for job in jobs if job.ended is None), key=lambda job: job.started)
    ended = sorted((job for job in jobs if job.ended is not None), key=lambda job: -(job.ended or 0))
    lines = [job.line(now) for job in [*running, *ended[:MAX_JOBS]]]
    if len(ended) > MAX_JOBS:
        lines.append(f"and {len(ended) - MAX_JOBS:,} older ones")
    return lines


def _jobs() -> list[Job]:
    from ray.job_submission import JobSubmissionClient

    dashboard = get_dashboard_url()
    if not dashboard:
        return []
    client = JobSubmissionClient(dashboard if "://" in dashboard else f"http://{dashboard}")
    own = ray.get_runtime_context().get_job_id()
    return [
        Job(
            found.submission_id or f"driver {found.job_id}",
            found.entrypoint,
            str(getattr(found.status, "value", found.status)),
            found.message or "",
            (found.start_time or 0) / 1000,
            found.end_time / 1000 if found.end_time else None,
        )
        for found in client.list_jobs()
        if found.job_id != own
    ]


def _pending() -> str:
    """Nodes that the autoscaler is starting, or could not start; "" for none, or without an autoscaler."""
    from ray.autoscaler.v2.sdk import get_cluster_status

    try:
        status = get_cluster_status(ray.get_runtime_context().gcs_address)
    except (RuntimeError, ray.exceptions.RayError):  # a cluster without an autoscaler of this version
        return ""
    starting = Counter(node.ray_node_type_name for node in status.pending_nodes)
    for launch in status.pending_launches:
        starting[launch.ray_node_type_name] += launch.count
    failed = Counter(f"{launch.ray_node_type_name}: {launch.details}" for launch in status.failed_launches)
    parts = [f"{count} {kind} starting" for kind, count in starting.items()]
    parts += [f"{count} could not be started ({why[:200]})" for why, count in failed.items()]
    return ", ".join(parts)
