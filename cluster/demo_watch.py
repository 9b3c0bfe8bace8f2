"""Watches a cluster while the demo runs: its nodes, the replicas of the served policy, and the progress of work."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from local import LocalCluster, LocalClusterError

POLL_S = 0.5


class Timeline:
    """What a function returned over time; it is asked every `POLL_S` in the background.

    Args:
        ask: returns a count per name, or None where there is nothing to know.
    """

    def __init__(self, ask: Callable[[], Counter[str] | None]):
        self.points: list[tuple[float, Counter[str]]] = []
        """Monotonic time and counts."""
        self._ask = ask
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._poll, daemon=True)
        self._thread.start()

    def _poll(self) -> None:
        while not self._ended.wait(POLL_S):
            counts = self._ask()
            if counts is not None:
                self.points.append((time.monotonic(), counts))

    def close(self) -> None:
        """Asks no more."""
        self._ended.set()
        self._thread.join()

    def now(self) -> Counter[str]:
        """The newest counts."""
        return self.points[-1][1] if self.points else Counter()

    def first(self, name: str, count: int, since: float) -> float | None:
        """When there were `count` of `name` or more, after `since`; None: never."""
        return next((moment for moment, seen in self.points if moment >= since and seen[name] >= count), None)

    def last_above(self, name: str, count: int, since: float) -> float | None:
        """When there were more than `count` of `name` for the last time after `since`; None: never."""
        moments = [moment for moment, seen in self.points if moment >= since and seen[name] > count]
        return moments[-1] if moments else None

    def most(self, name: str, since: float) -> int:
        """The most of `name` that there were at once after `since`."""
        return max((seen[name] for moment, seen in self.points if moment >= since), default=0)

    def total_s(self, name: str, since: float, until: float) -> float:
        """Seconds that each of `name` was there between two moments, added up."""
        spans = zip(self.points, self.points[1:], strict=False)
        return sum(
            seen[name] * (min(after, until) - max(moment, since))
            for (moment, seen), (after, _) in spans
            if after > since and moment < until
        )


def count_nodes(cluster: LocalCluster) -> Counter[str] | None:
    """Living nodes by type, those without work again as `idle TYPE`; None while no head answers."""
    try:
        status = cluster.cluster_status()
    except LocalClusterError:
        return None
    counts: Counter[str] = Counter(node.ray_node_type_name for node in status.active_nodes)
    for node in status.idle_nodes:
        counts[node.ray_node_type_name] += 1
        counts[f"idle {node.ray_node_type_name}"] += 1
    return counts


def count_replicas(url: str) -> Counter[str] | None:
    """Replicas of the served policy by state, such as RUNNING; None while Serve does not answer.

    Args:
        url: of the dashboard.
    """
    from ray.dashboard.modules.serve.sdk import ServeSubmissionClient

    try:
        applications = ServeSubmissionClient(url).get_serve_details()["applications"]
    except (OSError, RuntimeError, KeyError):
        return None
    deployments = [one for app in applications.values() for one in app["deployments"].values()]
    return Counter(replica["state"] for one in deployments for replica in one["replicas"])


class Progress:
    """How far a piece of work is, and the longest time without any.

    Args:
        measure: returns a number that grows.
        end: its last value, after which nothing more is expected; None: it has none.
    """

    def __init__(self, measure: Callable[[], int], end: int | None = None):
        self.measure, self._end = measure, end

    @contextmanager
    def longest_pause(self) -> Iterator[list[float]]:
        """Yields a list whose only value is the longest time without new progress inside, in seconds, at its end."""
        pause, ended = [0.0], threading.Event()

        def poll() -> None:
            best, since = self.measure(), time.monotonic()
            while (self._end is None or best < self._end) and not ended.wait(0.1):
                now = self.measure()
                pause[0] = max(pause[0], time.monotonic() - since)
                if now > best:
                    best, since = now, time.monotonic()

        poller = threading.Thread(target=poll, daemon=True)
        poller.start()
        try:
            yield pause
        finally:
            ended.set()
            poller.join()


def opened_blocks(manifest: Path, corpus: str) -> int:
    """Blocks of opened files that an ingest under way has stored."""
    return len(list((manifest / "corpora" / corpus / "probed").glob("*.parquet")))


def trained_step(run: Path) -> int:
    """The newest step in a run's metrics."""
    return max((row["step"] for row in train_rows(run)), default=0)


def train_rows(run: Path) -> list[dict[str, Any]]:
    """The rows of the training split in a run's metrics; a line that is still being written is left out."""
    file = run / "metrics.jsonl"
    if not file.exists():
        return []
    lines = file.read_text().split("\n")[:-1]
    return [row for row in map(json.loads, filter(None, lines)) if row["split"] == "train"]


def checkpoint_step(run: Path) -> int:
    """The newest step with a committed checkpoint."""
    from defi_platform.train.checkpoint.format import committed

    found = committed(str(run))
    return found[0].step if found else 0


def episodes_of(output: Path) -> Iterator[tuple[dict[str, Any], tuple[float, float]]]:
    """Yields the row of each finished episode, and the Unix times between which it ran."""
    for file in sorted((output / "episodes").glob("*_*_*.json")):
        row = json.loads(file.read_text())
        end = file.stat().st_mtime
        yield row, (end - row["wall_s"], end)
