"""Kinds of metrics: how one is named and described, and how its values reach Ray's Prometheus endpoint."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_made: dict[str, Any] = {}
"""Name -> Ray's object, made in this process by the first value."""


def _connected() -> bool:
    # Not imported: decoder processes and readers of files use what is declared here, and need no Ray.
    ray = sys.modules.get("ray")
    return ray is not None and ray.is_initialized()


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A declared metric; its values are recorded where this process is connected to Ray, and nowhere else."""

    name: str
    """`defi_PART_WHAT_UNIT`, with `_total` at the end of a counter's."""
    help: str
    """One sentence."""
    unit: str
    """seconds | bytes | ratio | loss | what is counted."""
    panel: str
    """Title of the panel that shows it; metrics with the same title share one."""
    labels: tuple[str, ...] = ()
    """Each of few values: a label per video or sample would be a series per video or sample."""

    @property
    def series(self) -> str:
        """The metric's name in Prometheus, which Ray puts a prefix to."""
        return f"ray_{self.name}"

    @property
    def part(self) -> str:
        """The part of the platform that it is about, the second word of its name."""
        return self.name.split("_")[1]

    def _ray_metric(self, labels: Mapping[str, str]) -> Any:
        """Ray's object for this metric; None in a process without a connection."""
        if labels.keys() != set(self.labels):
            raise ValueError(f"{self.name} has the labels {self.labels}, not {tuple(labels)}")
        if not _connected():
            return None
        made = _made.get(self.name)
        if made is None:
            made = _made[self.name] = self._create()
        return made

    def _create(self) -> Any:
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Counter(Metric):
    """A number that only grows; panels show its rate."""

    def add(self, value: float = 1, **labels: str) -> None:
        """Adds to the count; nothing for 0."""
        metric = self._ray_metric(labels)
        if metric is not None and value:
            metric.inc(value, labels)

    def _create(self) -> Any:
        from ray.util import metrics

        return metrics.Counter(self.name, self.help, tag_keys=self.labels)


@dataclass(frozen=True, kw_only=True)
class Gauge(Metric):
    """A number as it is now, until its process ends."""

    over: str = "max"
    """How a panel puts the values of several processes together: max | sum | min."""

    def set(self, value: float, **labels: str) -> None:
        """Replaces the value."""
        metric = self._ray_metric(labels)
        if metric is not None:
            metric.set(value, labels)

    def _create(self) -> Any:
        from ray.util import metrics

        return metrics.Gauge(self.name, self.help, tag_keys=self.labels)


@dataclass(frozen=True, kw_only=True)
class Histogram(Metric):
    """A distribution; panels show its median and 99th percentile."""

    buckets: tuple[float, ...]
    """Upper bounds, rising."""

    def observe(self, value: float, **labels: str) -> None:
        """Counts a value in its bucket."""
        metric = self._ray_metric(labels)
        if metric is not None:
            metric.observe(value, labels)

    def _create(self) -> Any:
        from ray.util import metrics

        return metrics.Histogram(self.name, self.help, list(self.buckets), tag_keys=self.labels)
