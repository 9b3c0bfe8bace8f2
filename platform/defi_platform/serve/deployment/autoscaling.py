"""The number of replicas that the load needs. Serve's controller calls it with what the replicas report.

Serve sends this module by value to its controller, which need not have this package: it imports nothing of it.
"""

from __future__ import annotations

import math
from typing import Any

IN_FLIGHT, WAIT_MS, CAPACITY = "in_flight", "wait_ms", "capacity"
DOWNSCALE_AT = 0.7
"""Share of the target below which fewer replicas would do, so that they are not taken away and added in turns."""


def capacity(largest_batch: int, pass_ms: float, each_ms: float, max_wait_ms: float, most: int) -> float:
    """The observations in flight that one replica carries without a long wait, for the device or for their company.

    Args:
        largest_batch: observations of the largest forward pass that pays; 0: not known.
        pass_ms: milliseconds of it.
        each_ms: milliseconds that each observation adds to a pass.
        max_wait_ms: see `ScalingConfig.max_wait_ms`.
        most: observations of a forward pass, at most.

    Returns:
        A running pass, the next one, and those that can run before it, but no more than `most`.
    """
    if not largest_batch or pass_ms <= 0:
        return float(most)
    batch = float(largest_batch)
    if each_ms > 0:
        batch = min(batch, 1.0 + max_wait_ms / each_ms)
    left_ms = max(0.0, max_wait_ms - each_ms * (batch - 1.0))
    return min(float(most), batch * (2.0 + left_ms / pass_ms))


class ObservationScaling:
    """Scales with observations in flight and their waiting time.

    Serve's own signal counts ongoing requests of its proxy, of which there are none here; and a count of websockets
    would scale up for a fleet that stands still.
    """

    def __init__(self, target_in_flight: float | None, max_wait_ms: float) -> None:
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
        reported = metrics.get(CAPACITY, {}).values()
        aim = self._target or max(1.0, sum(reported) / max(1, len(reported)))
        needed = max(1, math.ceil(in_flight / aim))
        if running < target:  # those asked for are starting, and will change what is measured
            return max(needed, target), {}
        if wait_ms > self._max_wait_ms:
            return max(needed, target + 1), {}
        if needed < target:
            return min(target, max(1, math.ceil(in_flight / (DOWNSCALE_AT * aim)))), {}
        return needed, {}
