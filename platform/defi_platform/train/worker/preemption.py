"""Preemption notices: a node with workers, such as a spot instance, is about to go, time for one more checkpoint."""

from __future__ import annotations

import time

import ray.train

POLL_EVERY_S = 5.0
"""As often as Ray Train itself does; polling is a call to one actor by every worker."""


class PreemptionNotices:
    """One rank's side.

    Args:
        preemptible: whether nodes of this cluster can be preempted at all.
        is_rank_zero: whether this is the rank that decides when all poll.
    """

    def __init__(self, preemptible: bool, is_rank_zero: bool) -> None:
        self._decides = preemptible and is_rank_zero
        self._polled = time.monotonic()
        self._known: set[str] = set()

    def due(self) -> bool:
        """True on rank 0 when all ranks should poll now."""
        return self._decides and time.monotonic() - self._polled > POLL_EVERY_S

    def poll(self) -> bool:
        """True when there is a notice for another node than before.

        Collective: Ray lets every worker wait for the others and gives all the same answer.
        """
        self._polled = time.monotonic()
        info = ray.train.get_preemption_info()
        nodes = set(info.preempted_node_ids) if info else set()
        new, self._known = nodes - self._known, self._known | nodes
        return bool(new)
