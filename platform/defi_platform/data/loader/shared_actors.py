"""The actors that all executions of Ray Data in a cluster share; without torch, for the drivers of jobs."""

from __future__ import annotations

from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import (
    get_or_create_autoscaling_coordinator,
)
from ray.data._internal.execution.node_trackers.actor_location import get_or_create_actor_location_tracker
from ray.data._internal.stats import get_or_create_stats_actor
from ray.data._internal.usage.actor import get_or_create_usage_collection_actor
from ray.data._internal.usage.collector import usage_collection_disabled


def start_shared_actors() -> None:
    """Starts them on the node of this process, a job's driver, where they are not there yet.

    Otherwise the first training worker that decodes starts them on its own node. They outlive the job, so that an
    autoscaler would never release that node.
    """
    get_or_create_autoscaling_coordinator()
    get_or_create_actor_location_tracker()
    get_or_create_stats_actor()
    if not usage_collection_disabled():
        get_or_create_usage_collection_actor()
