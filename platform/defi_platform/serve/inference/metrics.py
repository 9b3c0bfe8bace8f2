"""Metrics of one replica for Ray's Prometheus endpoint."""

from __future__ import annotations

from collections import Counter as Counts
from collections.abc import Mapping

from ray.util.metrics import Counter, Gauge, Histogram

from defi_platform.serve.inference.load import ServiceLoad

_MILLISECONDS = [
    1.0,
    2.0,
    5.0,
    10.0,
    20.0,
    50.0,
    100.0,
    200.0,
    500.0,
    1000.0,
    2000.0,
    5000.0,
    10000.0,
    30000.0,
]
_SIZES = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0]


class ServiceMetrics:
    """Latencies and batch sizes as answers are given, everything else as often as `publish` is called.

    Every metric carries the digest of the policy; Ray adds deployment and replica.
    """

    def __init__(self, digest: str) -> None:
        """Registers the metrics with Ray.

        Args:
            digest: of the policy folder.
        """
        tags = {"policy_digest": digest}

        def gauge(name: str, description: str) -> Gauge:
            made = Gauge(f"defi_serve_{name}", description, tag_keys=("policy_digest",))
            made.set_default_tags(tags)
            return made

        self._latency = Histogram(
            "defi_serve_latency_ms",
            "Milliseconds of an answered observation, by phase: queue, infer, total.",
            boundaries=_MILLISECONDS,
            tag_keys=("policy_digest", "phase"),
        )
        self._batch = Histogram(
            "defi_serve_batch_size",
            "Observations in the forward pass of an answer.",
            boundaries=_SIZES,
            tag_keys=("policy_digest",),
        )
        self._answers = Counter(
            "defi_serve_answers_total", "Observations answered with actions.", tag_keys=("policy_digest",)
        )
        self._refusals = Counter(
            "defi_serve_refusals_total",
            "Observations refused in words, by reason.",
            tag_keys=("policy_digest", "reason"),
        )
        self._sockets = Counter(
            "defi_serve_socket_events_total",
            "Sockets opened, moved, refused or closed, by event.",
            tag_keys=("policy_digest", "event"),
        )
        for metric in (self._latency, self._batch, self._answers, self._refusals, self._sockets):
            metric.set_default_tags(tags)
        self._queued = gauge("queued", "Observations that wait for a forward pass.")
        self._in_flight = gauge("in_flight", "Observations that have come and are not answered.")
        self._oldest = gauge("oldest_wait_ms", "Milliseconds that the oldest queued observation has waited.")
        self._sessions = gauge("sessions", "Open sockets of clients.")
        self._gpu = gauge("gpu_memory_bytes", "Memory of the GPU that PyTorch holds for this replica.")
        self._published: Counts[str] = Counts()
        self._socket_events: Counts[str] = Counts()
        self._answered = 0

    def answer(self, queue_ms: float, infer_ms: float, total_ms: float, batch_size: int) -> None:
        """Records one answer.

        Args:
            queue_ms: its wait for the forward pass.
            infer_ms: of the forward pass.
            total_ms: from arrival to answer.
            batch_size: observations in the forward pass.
        """
        for phase, value in (("queue", queue_ms), ("infer", infer_ms), ("total", total_ms)):
            self._latency.observe(value, {"phase": phase})
        self._batch.observe(batch_size)

    def publish(
        self,
        load: ServiceLoad,
        *,
        sessions: int,
        gpu_bytes: int | None = None,
        sockets: Mapping[str, int] | None = None,
    ) -> None:
        """Brings counters and gauges to the present.

        Args:
            load: of the service.
            sessions: open sockets.
            gpu_bytes: memory that PyTorch holds; None on a CPU.
            sockets: events of sockets since the start by name (`counts` of `SocketServer.load`).
        """
        if load.answered > self._answered:
            self._answers.inc(load.answered - self._answered)
            self._answered = load.answered
        for reason, count in load.refusals.items():
            if count > self._published[reason]:
                self._refusals.inc(count - self._published[reason], {"reason": reason})
                self._published[reason] = count
        for event, count in (sockets or {}).items():
            if count > self._socket_events[event]:
                self._sockets.inc(count - self._socket_events[event], {"event": event})
                self._socket_events[event] = count
        self._queued.set(load.queued)
        self._in_flight.set(load.in_flight)
        self._oldest.set(load.oldest_wait_ms)
        self._sessions.set(sessions)
        if gpu_bytes is not None:
            self._gpu.set(gpu_bytes)
