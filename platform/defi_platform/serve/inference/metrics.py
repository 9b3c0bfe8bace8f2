"""Metrics of one replica for Ray's Prometheus endpoint."""

from __future__ import annotations

from collections import Counter as Counts
from collections.abc import Mapping

from defi_platform.metrics import catalogue
from defi_platform.serve.inference.load import ServiceLoad


class ServiceMetrics:
    """Latencies and batch sizes as answers are given, everything else as often as `publish` is called.

    Args:
        digest: of the policy folder, the label of every metric.
    """

    def __init__(self, digest: str) -> None:
        self._digest = digest
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
            catalogue.SERVE_LATENCY.observe(value / 1000, policy_digest=self._digest, phase=phase)
        catalogue.SERVE_BATCH.observe(batch_size, policy_digest=self._digest)

    def decoded(self, milliseconds: float) -> None:
        """Records how long reading an observation took."""
        catalogue.SERVE_LATENCY.observe(milliseconds / 1000, policy_digest=self._digest, phase="decode")

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
        digest = self._digest
        if load.answered > self._answered:
            catalogue.SERVE_ANSWERS.add(load.answered - self._answered, policy_digest=digest)
            self._answered = load.answered
        for reason, count in load.refusals.items():
            if count > self._published[reason]:
                new = count - self._published[reason]
                catalogue.SERVE_REFUSALS.add(new, policy_digest=digest, reason=reason)
                self._published[reason] = count
        for event, count in (sockets or {}).items():
            if count > self._socket_events[event]:
                new = count - self._socket_events[event]
                catalogue.SERVE_SOCKET_EVENTS.add(new, policy_digest=digest, event=event)
                self._socket_events[event] = count
        catalogue.SERVE_QUEUED.set(load.queued, policy_digest=digest)
        catalogue.SERVE_IN_FLIGHT.set(load.in_flight, policy_digest=digest)
        catalogue.SERVE_OLDEST_WAIT.set(load.oldest_wait_ms / 1000, policy_digest=digest)
        catalogue.SERVE_SOCKETS.set(sessions, policy_digest=digest)
        if gpu_bytes is not None:
            catalogue.SERVE_GPU_BYTES.set(gpu_bytes, policy_digest=digest)
