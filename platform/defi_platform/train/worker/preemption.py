"""Notices that a node with workers is about to be taken away, as spot instances are: time for one more checkpoint."""

from __future__ import annotations

import time

import ray.train

ASK_EVERY_S = 5.0
"""As often as Ray Train itself looks; asking is a call to one actor by every worker."""


class PreemptionNotices:
    """One rank's side.

    Args:
        wanted: whether nodes of this cluster can be announced to go away at all.
        first: whether this is the rank that says when to ask.
    """

    def __init__(self, wanted: bool, first: bool) -> None:
        self._says_when = wanted and first
        self._asked = time.monotonic()
        self._known: set[str] = set()

    def due(self) -> bool:
        """On the first rank: whether all ranks should ask now."""
        return self._says_when and time.monotonic() - self._asked > ASK_EVERY_S

    def new(self) -> bool:
        """Whether a node has been announced that was not before (collective: Ray lets every worker wait for the
        others and gives all the same answer)."""
        self._asked = time.monotonic()
        info = ray.train.get_preemption_info()
        nodes = set(info.preempted_node_ids) if info else set()
        fresh, self._known = nodes - self._known, self._known | nodes
        return bool(fresh)
