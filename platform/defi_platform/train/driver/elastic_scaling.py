"""Numbers of workers of an elastic run: what divides the global batch, and fits beside whatever else the cluster does."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import ray
from ray.train.v2._internal.execution.scaling_policy import (
    ElasticScalingPolicy,
    ResizeDecision,
    ScalingDecision,
)

from defi_platform import logs, roles

_RESOLUTION = 1e-4
"""Of Ray's amounts of a resource."""


class FittingPolicy(ElasticScalingPolicy):
    """Ray's elastic scaling, limited to the numbers of workers into which the global batch can be divided.

    Ray counts all that nodes have but for other trainings and Ray Data. What a Serve replica or somebody's actor holds it would
    ask for again and again, and never start with less. Here only the first start after a loss goes by that count, while
    the lost workers' resources may not have come back yet.
    """

    def __init__(self, kind: str, scaling: Any, sizes: list[int]):
        """Prepares the policy.

        Args:
            kind: of the recipe, for messages.
            scaling: Ray's configuration.
            sizes: numbers of workers, ascending.
        """
        super().__init__(scaling)
        self._kind, self._sizes = kind, sizes
        self._own: Mapping[str, int] | None = None
        """Running workers by node; None: what is free does not limit."""
        self._starts = 0
        """Without success."""

    def make_decision_for_non_running_worker_group(self) -> ScalingDecision:
        """Decides about a start."""
        self._own = {} if self._starts else None
        decision = super().make_decision_for_non_running_worker_group()
        if isinstance(decision, ResizeDecision):
            self._starts += 1
            if self._starts > 1 and decision.num_workers < self._sizes[-1]:
                logs.say(
                    f"{self._kind}: starts with {decision.num_workers} of {self._sizes[-1]} workers: others use "
                    "the rest of the cluster",
                    kind=self._kind,
                )
        return decision

    def make_decision_for_running_worker_group(
        self, worker_group_state: Any, worker_group_status: Any
    ) -> ScalingDecision:
        """Decides whether to go on with more or fewer workers."""
        self._starts = 0
        self._own = Counter(worker.metadata.node_id for worker in worker_group_state.workers)
        return super().make_decision_for_running_worker_group(worker_group_state, worker_group_status)

    def _count_possible_workers(self, reserved_resources: Mapping[str, Mapping[str, float]]) -> int:
        # Ray counts the resources of all nodes, those of other roles included.
        allowed = roles.node_ids(roles.TRAIN)
        reserved = {
            node: dict(amounts)
            for node, amounts in reserved_resources.items()
            if allowed is None or node in allowed
        }
        possible = super()._count_possible_workers(reserved)
        if self._own is not None and possible:
            # Others may use what Ray has set aside for this run, and other nodes have as much.
            usable = {
                node: amounts
                for node, amounts in self._usable().items()
                if allowed is None or node in allowed
            }
            possible = min(possible, super()._count_possible_workers(usable))
        return max((size for size in self._sizes if size <= possible), default=0)

    def _usable(self) -> dict[str, dict[str, float]]:
        """Resources of each node that are free, or this run's own."""
        assert self._own is not None
        worker = self.scaling_config._resources_per_worker_not_none
        return {
            node: {
                name: free.get(name, 0.0) + self._own.get(node, 0) * worker.get(name, 0.0) + _RESOLUTION
                for name in {*free, *worker}
            }
            for node, free in ray._private.state.available_resources_per_node().items()
        }
