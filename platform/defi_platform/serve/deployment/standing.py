"""The deployment that a cluster has already: found, or cleared away where it is only what a job left."""

from __future__ import annotations

from typing import Any

import ray
from ray import serve
from ray._private import state

from defi_platform.config import ServeConfig
from defi_platform.errors import ServeError
from defi_platform.serve.listener import registry
from defi_platform.serve.listener.actor import stop_listeners
from defi_platform.serve.listener.registry import Deployment

PREFIX = "policy-"
"""Of the names of applications that `jobs/serve_policy.py` starts."""


def find_standing() -> Deployment | None:
    """The record of what the connected cluster serves; what is left of a server that has been stopped is cleared away.

    So is one whose job was killed while it shut down: its listeners refuse, its replicas have closed their sockets.
    """
    found = registry.read()
    if found is None:
        stop_listeners()
        return None
    applications = serve.status().applications
    status = applications[found.application].status if found.application in applications else "gone"
    if not found.ending and status not in ("gone", "DEPLOY_FAILED", "DELETING"):
        return found
    clear(applications)
    return None


def this_job() -> str:
    """Ray's id of the job that this process is or belongs to."""
    return str(ray.get_runtime_context().get_job_id())


def serves_for_another(standing: Deployment) -> bool:
    """True when a job other than this one, which has not ended, has deployed it; also for Serve's own command."""
    if not standing.job:
        return True
    if standing.job == this_job():
        return False
    return any(job["JobID"] == standing.job and not job["IsDead"] for job in state.jobs())


def is_abandoned(standing: Deployment) -> bool:
    """True when the job that has deployed it ended without stopping it: it was killed."""
    return standing.job != this_job() and not serves_for_another(standing)


def same_address(standing: Deployment, config: ServeConfig) -> None:
    """Checks that a successor is to listen where the cluster serves already.

    Raises:
        ServeError: it is another address.
    """
    if (standing.host, standing.port) != (config.host, config.port):
        raise ServeError(
            f"this Ray cluster already serves the policy {standing.policy} at {standing.host}:{standing.port}. "
            f"Query that one, replace it with host={standing.host} port={standing.port}, stop it with "
            "`serve shutdown`, or leave out ray.address to start a cluster of your own."
        )


def delete_unknown(standing: Deployment) -> None:
    """Ends successors of a deployment whose jobs were killed before they took over."""
    for name in serve.status().applications:
        if name.startswith(PREFIX) and name not in (standing.application, *standing.retiring):
            serve.delete(name)


def clear(applications: Any) -> None:
    """Ends all applications of ours, the listeners and the record; Serve too, unless it serves something else.

    Args:
        applications: of Serve, by name.
    """
    standing = registry.read()
    named = () if standing is None else (standing.application, *standing.retiring)
    ours = [name for name in applications if name.startswith(PREFIX) or name in named]
    if set(applications) <= set(ours):
        serve.shutdown()
    else:
        for name in ours:
            serve.delete(name)
    stop_listeners()
    registry.clear()
