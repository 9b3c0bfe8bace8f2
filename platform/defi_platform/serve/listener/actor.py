"""The listener as a Ray actor: one per machine, which outlives jobs and is started again when it dies."""

from __future__ import annotations

import logging
import os
import threading
import time
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from defi_platform.errors import ServeError
from defi_platform.serve.listener import registry
from defi_platform.serve.listener.channel import socket_path
from defi_platform.serve.listener.listener import Listener, ListenerSettings

log = logging.getLogger(__name__)

NAMESPACE = "defi_serve"
_PREFIX = "listener:"
KEEP_PERIOD_S = 1.0
ABANDONED_AFTER_S = 20.0
"""Seconds without replicas after which a listener ends where Serve has ended (`serve shutdown` does not know it), or
where its machine should be free to go: to Ray an actor is work, and a machine that works is not given back."""
FAREWELL_S = 10.0
"""Seconds that the clients of such a machine's port, which are served on others, get from then on."""
KEEP_PERIOD_PER_PEER_S = 0.05
"""What the head is asked grows with the square of the machines, so each asks more rarely."""


class ListenerActor:
    """Holds the listener of the node it runs on, and keeps it informed."""

    def __init__(self, settings: ListenerSettings, node: str, stays: bool) -> None:
        """Starts to listen.

        Args:
            settings: of the deployment.
            node: Ray's id of the node.
            stays: whether it is the head's, at whose address clients connect; others end when they are not needed.

        Raises:
            OSError: this machine has a listener of this deployment.
        """
        self._node, self._stays = node, stays
        self._tls_files = (settings.tls_cert, settings.tls_key)
        self._listener = Listener(settings, socket_path(settings.secret), stays=stays)
        self._follow()
        self._listener.start()
        self._stopping = False
        threading.Thread(target=self._keep, name="keeper", daemon=True).start()

    def state(self) -> dict[str, Any]:
        """See `Listener.state`; `node` and the `pid` of this process."""
        return {**self._listener.state(), "node": self._node, "pid": os.getpid()}

    def serve_generation(self, generation: int | None) -> None:
        """See `Listener.serve_generation`."""
        self._listener.serve_generation(generation)

    def order_move(self, application: str, when: str) -> int:
        """See `Listener.order_move`."""
        return self._listener.order_move(application, when)

    def order_close(self, reason: str) -> int:
        """See `Listener.order_close`."""
        return self._listener.order_close(reason)

    def stop(self) -> None:
        """Closes the port; the actor is to be killed next."""
        self._stopping = True
        self._listener.stop()

    def _keep(self) -> None:
        idle_since, period_s = time.monotonic(), KEEP_PERIOD_S
        while not self._stopping:
            time.sleep(period_s)
            try:
                self._follow()
                peers = self._meet()
                period_s = max(KEEP_PERIOD_S, KEEP_PERIOD_PER_PEER_S * peers)
                idle_since = self._end_if_idle(idle_since)
            except Exception as error:  # noqa: BLE001 - a head that restarts; sockets are passed on meanwhile
                log.warning("the cluster's head did not answer the listener: %s", error)

    def _end_if_idle(self, idle_since: float) -> float:
        """Ends this process where nobody needs it. Returns: since when that has been so."""
        state = self._listener.state()
        serves = bool(state["replicas"]) or _serve_runs()
        if state["replicas"] or (serves and self._stays):
            return time.monotonic()
        idle_s = time.monotonic() - idle_since
        if idle_s < ABANDONED_AFTER_S:
            return idle_since
        if serves and state["carried"] and idle_s < ABANDONED_AFTER_S + FAREWELL_S:
            self._listener.close_port()
            return idle_since
        if not serves:
            registry.clear()
        registry.announce(self._node, None)
        self.stop()
        ray.kill(ray.get_actor(_PREFIX + self._node, namespace=NAMESPACE), no_restart=True)
        return idle_since

    def _follow(self) -> None:
        deployment = registry.read()
        if deployment is None:
            return
        self._listener.follow(deployment.generation)
        security = deployment.config["security"]
        files = (security["tls_cert"], security["tls_key"])
        if files != self._tls_files:
            self._tls_files = files
            self._listener.use_certificate(*files)

    def _meet(self) -> int:
        """Exchanges announcements with the listeners of other machines. Returns: their number."""
        others = registry.announcements(besides=self._node)
        said = self._listener.meet(others, ray.util.get_node_ip_address())
        lost = said.pop("lost")
        registry.announce(self._node, {**said, "beat": time.time_ns() // 10**6})
        for node in lost if self._stays else []:
            registry.announce(node, None)
        return len(others)


def _serve_runs() -> bool:
    # By its name alone: its handle would bring all of Ray Serve into this process, 70 MB of it.
    named = ray.util.list_named_actors(all_namespaces=True)
    return any(actor["name"] == "SERVE_CONTROLLER_ACTOR" for actor in named)


def ensure_listener(settings: ListenerSettings, node: str, *, stays: bool) -> Any:
    """The handle of a node's listener, which is started where there is none.

    Args:
        settings: of the deployment.
        node: Ray's id of the node.
        stays: see `ListenerActor`.
    """
    return (
        ray.remote(ListenerActor)
        .options(
            name=_PREFIX + node,
            namespace=NAMESPACE,
            get_if_exists=True,
            lifetime="detached",
            num_cpus=0,
            max_restarts=-1,
            max_task_retries=3,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False),
        )
        .remote(settings, node, stays)
    )


def listeners() -> list[Any]:
    """Handles of the listeners of all machines."""
    found = []
    for actor in ray.util.list_named_actors(all_namespaces=True):
        if actor["namespace"] == NAMESPACE and actor["name"].startswith(_PREFIX):
            try:
                found.append(ray.get_actor(actor["name"], namespace=NAMESPACE))
            except ValueError:
                continue  # it ended between the two calls
    return found


def ask_all(method: str, *arguments: Any, timeout_s: float = 15.0) -> list[Any]:
    """Calls a method of every listener. Returns: the answers of those that answer in time."""
    calls = [getattr(listener, method).remote(*arguments) for listener in listeners()]
    ready, late = ray.wait(calls, num_returns=len(calls), timeout=timeout_s) if calls else ([], [])
    answers = []
    for call in ready:
        try:
            answers.append(ray.get(call))
        except ray.exceptions.RayActorError as error:
            log.warning("a listener died while it was asked for %s: %s", method, error)
    if late:
        log.warning("%d listeners do not answer %s", len(late), method)
    return answers


def stop_listeners() -> None:
    """Ends the listeners of all nodes and frees their ports."""
    ask_all("stop", timeout_s=5.0)
    for listener in listeners():
        ray.kill(listener, no_restart=True)


def wait_for_port(listener: Any, timeout_s: float) -> None:
    """Waits until a listener has its public port.

    Args:
        listener: its handle.
        timeout_s: seconds.

    Raises:
        ServeError: it does not get it, or does not start.
    """
    deadline = time.monotonic() + timeout_s
    reason = "it did not start"
    while time.monotonic() < deadline:
        try:
            state = ray.get(listener.state.remote(), timeout=max(0.1, deadline - time.monotonic()))
        except ray.exceptions.GetTimeoutError:
            break
        except ray.exceptions.RayActorError as error:
            raise ServeError(f"the listener could not start: {error}") from error
        if state["port"] is not None:
            return
        reason = state["reason"]
        time.sleep(0.1)
    raise ServeError(f"the listener does not get its port: {reason}.")
