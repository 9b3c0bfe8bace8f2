"""A policy on one set of resources, from its clients' sockets to its actions, as a deployment of Ray Serve."""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import threading
import time
from concurrent.futures import CancelledError
from dataclasses import asdict, dataclass, field
from typing import Any

import ray
from ray import serve

from defi_platform import storage
from defi_platform.config import ServeConfig
from defi_platform.errors import CheckpointError, ServeError
from defi_platform.serve.deployment import autoscaling
from defi_platform.serve.deployment.startup_checks import head_node, same_machine
from defi_platform.serve.listener.actor import ensure_listener
from defi_platform.serve.listener.channel import socket_path
from defi_platform.serve.listener.link import ReplicaLink
from defi_platform.serve.listener.listener import ListenerSettings
from defi_platform.serve.protocols import openpi
from defi_platform.serve.protocols.settings import check_against_policy, wire_settings

log = logging.getLogger("ray.serve")

REGISTER_PATIENCE_S = 60.0
LOOP_PATIENCE_S = 25.0
"""Seconds in which the loop of the sockets must have looked after its health; less than Serve's own patience."""
STALLED_EXIT_CODE = 70
CLOSED_PATIENCE_S = 60.0
"""Seconds in which a replica that was ordered to close its sockets must be ended; otherwise another takes its place."""
DRAIN_DEADLINE_S = 10.0
"""Seconds that a leaving replica has to answer what is in flight and to pass its sockets on."""


@dataclass(frozen=True, kw_only=True)
class ReplicaSettings:
    """Settings that all replicas of one application share."""

    config: ServeConfig
    digest: str
    """Of the policy folder when it was deployed; a folder of other content is not served."""
    generation: int
    """See `Deployment.generation`."""
    listener: ListenerSettings = field(repr=False)


class PolicyReplica:
    """Loads the policy, serves sockets that the node's listener passes to it, and passes them on when it leaves."""

    def __init__(self, settings: ReplicaSettings) -> None:
        """Loads the policy, warms it up and registers with the node's listener.

        Args:
            settings: of the application.

        Raises:
            CheckpointError: the folder holds no complete policy, or another one than was deployed.
            ConfigError: names of the configuration are not the policy's.
            ServeError: the listener of this node does not answer.
        """
        # Only here: whoever deploys this class need not wait for the model library to be imported.
        from defi_platform.serve.connections.server import SocketServer
        from defi_platform.serve.deployment.policy_digest import policy_digest
        from defi_platform.serve.http.app import http_app
        from defi_platform.serve.inference.forward import PolicyForward
        from defi_platform.serve.inference.metrics import ServiceMetrics
        from defi_platform.serve.inference.service import ActionService, ServiceSettings

        config = settings.config
        with storage.local_copy(config.policy) as local:
            found = policy_digest(str(local), config.acting)
            if found != settings.digest:
                raise CheckpointError(
                    f"policy folder {config.policy} has changed since it was deployed (digest {found[:8]}, deployed "
                    f"{settings.digest[:8]}). Put the old content back, or run the same command again to serve the new."
                )
            forward = PolicyForward(
                str(local),
                name=config.policy,
                gpu=config.replica_gpus > 0,
                threads=config.threads,
                max_batch_size=config.max_batch_size,
                settings=config.model,
                acting=config.acting,
            )
        service = ActionService(
            forward, forward.spec, settings.digest, ServiceSettings.of(config), warm_up=forward.warm_up
        )
        self._metrics = ServiceMetrics(settings.digest)
        service.meter.observer = self._metrics.answer
        service.meter.decode_observer = self._metrics.decoded
        self._probe, wires = forward.probe, wire_settings(config)
        check_against_policy(wires, forward.spec.cameras, forward.spec.action_dim)
        self._config, self._service, self._closed = config, service, threading.Event()
        self._closing_since: float | None = None
        self._server = SocketServer(
            service,
            http_app(service, wires, ready=self._unready),
            limits=config.limits,
            security=config.security,
            max_connections=config.max_connections,
            wires=wires,
            # Serve itself would look three times, 30 s each.
            on_stall=lambda: os._exit(STALLED_EXIT_CODE),
        )
        self._server.start()
        self._link = self._registered(settings)

    def check_health(self) -> None:
        """Called by Serve, which replaces a replica that raises or does not return.

        Raises:
            ServeError: a forward pass does not end, the policy fails on everything, or the sockets are closed and
                nobody ends the replica.
        """
        if self._leaving():
            return
        # On their loop, so that one that no longer turns is found out as well.
        check = self._service.check_health(self._probe)
        try:
            found = asyncio.run_coroutine_threadsafe(check, self._server.loop)
        except RuntimeError as error:  # the loop is closed
            check.close()
            if self._leaving():
                return
            raise ServeError("the loop of the sockets has ended.") from error
        try:
            found.result(LOOP_PATIENCE_S)
        except (TimeoutError, CancelledError) as error:
            found.cancel()
            if not self._leaving():
                raise ServeError(
                    f"the loop of the sockets has not turned for {LOOP_PATIENCE_S:g} s."
                ) from error

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Called by Serve: what `autoscaling.ObservationScaling` decides on."""
        load = self._service.snapshot()
        return {
            autoscaling.IN_FLIGHT: float(load.in_flight),
            # Whoever comes during a forward pass waits for its end, however few there are.
            autoscaling.WAIT_MS: max(0.0, load.late_ms - load.infer_ms[0]),
            autoscaling.CAPACITY: autoscaling.capacity(
                load.largest_batch,
                load.largest_batch_ms,
                load.each_ms,
                self._config.scaling.max_wait_ms,
                self._config.max_batch_size,
            ),
        }

    def __del__(self) -> None:
        """Called by Serve before the replica ends: passes its sockets on and answers what is in flight."""
        if not hasattr(self, "_link") or self._closed.is_set():
            return
        self._closed.set()
        self._link.leave()
        if not self._server.loop.is_closed():  # it has been, where the whole server shuts down
            self._server.move(None, "answers", self._link.hand_over)
            deadline = time.monotonic() + DRAIN_DEADLINE_S
            while (self._server.load()["sockets"] or self._link.passing) and time.monotonic() < deadline:
                time.sleep(0.01)
            self._server.close("this replica of the policy has ended", timeout_s=1.0)
        self._link.stop()

    def _leaving(self) -> bool:
        """Whether this replica is about to end. Raises: ServeError when it was to, and nobody did."""
        if self._closing_since is None:
            return self._closed.is_set()
        if time.monotonic() - self._closing_since > CLOSED_PATIENCE_S and not self._closed.is_set():
            raise ServeError("this replica closed its sockets, as it was ordered to, and was not ended.")
        return True

    def _unready(self) -> str | None:
        return "this replica is leaving" if self._closed.is_set() else None

    def _registered(self, settings: ReplicaSettings) -> ReplicaLink:
        node, context = ray.get_runtime_context().get_node_id(), serve.get_replica_context()
        path = socket_path(settings.listener.secret)
        starts = itertools.count()

        def start_listeners() -> None:
            head = head_node()["NodeID"]
            # It holds the address that clients are given.
            ensure_listener(settings.listener, head, stays=True)
            # Nodes with one address share its ports, unless they turn out to share no folder.
            place = same_machine(node) if next(starts) == 0 else node
            if place != head:
                ensure_listener(settings.listener, place, stays=False)

        start_listeners()
        identity = {
            "replica": context.replica_id.unique_id,
            "generation": settings.generation,
            "digest": settings.digest,
            "application": context.app_name,
            "metadata": {"protocol": openpi.PROTOCOL, **self._service.metadata()},
            "token": settings.listener.secret,
            "movable": settings.config.security.tls_cert is None,
        }
        link = ReplicaLink(path, identity, _Reporting(self), start_listeners)
        link.start()
        if not link.wait_until_registered(REGISTER_PATIENCE_S):
            raise ServeError(f"the listener of node {node} does not answer at {path}")
        return link


class _Reporting:
    """The socket server, with the service's numbers in its load report."""

    def __init__(self, replica: PolicyReplica) -> None:
        self._replica = replica
        self._server, self._service, self._metrics = replica._server, replica._service, replica._metrics
        self.adopt, self.move = self._server.adopt, self._server.move

    def load(self) -> dict[str, Any]:
        """The load report; metrics are brought to the present with it."""
        import torch  # the replica has loaded it, and whoever deploys need not

        sockets, load = self._server.load(), self._service.snapshot()
        gpu = torch.cuda.memory_reserved() if torch.cuda.is_available() else None
        self._metrics.publish(load, sessions=sockets["websockets"], gpu_bytes=gpu, sockets=sockets["counts"])
        return {**sockets, "service": asdict(load)}

    def close(self, reason: str) -> None:
        """Closes every connection after its answer, while reports go on."""
        self._replica._closing_since = time.monotonic()
        threading.Thread(target=self._server.close, args=(reason,), name="closing", daemon=True).start()
