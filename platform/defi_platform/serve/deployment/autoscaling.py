"""The number of replicas that the load needs. Serve's controller calls it with what the replicas report.

Serve sends this module by value to its controller, which need not have this package: it imports nothing of it.
"""

from __future__ import annotations

import math
from typing import Any

IN_FLIGHT, WAIT_MS = "in_flight", "wait_ms"
DOWNSCALE_AT = 0.7
"""Share of the target below which fewer replicas would do, so that they are not taken away and added in turns."""


class ObservationScaling:
    """Scales with observations in flight and their waiting time.

    Serve's own signal counts ongoing requests of its proxy, of which there are none here; and a count of websockets
    would scale up for a fleet that stands still.
    """

    def __init__(self, target_in_flight: float, max_wait_ms: float) -> None:
        self._target, self._max_wait_ms = target_in_flight, max_wait_ms

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        """The number of replicas that the load needs; Serve applies delays and bounds.

        Args:
            context: Serve's `AutoscalingContext`; its metrics are means over the last seconds.

        Returns: the number, and no state.
        """
        metrics = context.aggregated_metrics or {}
        in_flight = sum(metrics.get(IN_FLIGHT, {}).values())
        wait_ms = max(metrics.get(WAIT_MS, {}).values(), default=0.0)
        running, target = context.current_num_replicas, context.target_num_replicas
        if not metrics.get(IN_FLIGHT):
            return target, {}
        needed = max(1, math.ceil(in_flight / self._target))
        if running < target:  # those asked for are starting, and will change what is measured
            return max(needed, target), {}
        if wait_ms > self._max_wait_ms:
            return max(needed, target + 1), {}
        if needed < target:
            return min(target, max(1, math.ceil(in_flight / (DOWNSCALE_AT * self._target)))), {}
        return needed, {}
