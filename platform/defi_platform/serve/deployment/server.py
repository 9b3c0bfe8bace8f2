"""A policy server that jobs start, find again, renew and stop."""

from __future__ import annotations

import dataclasses
import logging
import secrets
import ssl
import threading
import time
import urllib.request
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from ray import serve

from defi_platform.cluster.requirements import announce
from defi_platform.config import ServeConfig
from defi_platform.errors import ServeError
from defi_platform.serve.app import application, record, replica_settings
from defi_platform.serve.deployment.policy_digest import policy_digest
from defi_platform.serve.deployment.standing import (
    PREFIX,
    clear,
    delete_unknown,
    find_standing,
    is_abandoned,
    same_address,
    this_job,
)
from defi_platform.serve.deployment.startup_checks import (
    check_before_start,
    head_node,
    replica_demand,
    resolve_port_on_head,
    start_serve,
)
from defi_platform.serve.listener import registry
from defi_platform.serve.listener.actor import ask_all, ensure_listener, wait_for_port
from defi_platform.serve.listener.registry import Deployment
from defi_platform.serve.listener.relay import SECRET_BYTES
from defi_platform.serve.replica import DRAIN_DEADLINE_S, ReplicaSettings

START_DEADLINE_S = 600.0
PORT_DEADLINE_S = 60.0
ANSWER_DEADLINE_S = 60.0
"""Seconds in which a server that was found again may start a dead replica or listener."""
CLOSING = "the policy server is shutting down"

log = logging.getLogger(__name__)


@dataclass
class PolicyServer:
    """A policy that is being served; a context manager that shuts it down."""

    host: str
    """A name or address that clients can use."""
    port: int
    tls: bool
    deployment: Deployment = field(repr=False)
    metadata: dict[str, Any] = field(default_factory=dict)
    """The greeting of clients."""
    _retirement: threading.Thread | None = field(default=None, repr=False)
    _ending: threading.Event = field(default_factory=threading.Event, repr=False)

    @property
    def url(self) -> str:
        """The address for openpi clients."""
        return f"{'wss' if self.tls else 'ws'}://{self._authority}"

    @property
    def http_url(self) -> str:
        """The address of /v1/act, /healthz and /metadata."""
        return f"{'https' if self.tls else 'http'}://{self._authority}"

    @property
    def _authority(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def states(self) -> list[dict[str, Any]]:
        """The state of each node's listener: see `Listener.state`."""
        return ask_all("state")

    def redeploy(self, config: ServeConfig) -> None:
        """Serves another policy at the same address; see `deploy`.

        Args:
            config: of the successor; its host and port must be the same.
        """
        successor = deploy(dataclasses.replace(config, host=self.deployment.host, port=self.port))
        self._ending.set()  # the successor's thread ends what this one was ending
        self.deployment, self.metadata, self.tls = successor.deployment, successor.metadata, successor.tls
        self._retirement, self._ending = successor._retirement, successor._ending

    def wait_for_retirement(self) -> None:
        """Waits until older applications have finished their episodes and are gone."""
        if self._retirement is not None:
            self._retirement.join()

    def shutdown(self) -> None:
        """Answers what is in flight, closes the sockets and stops Serve. A second call does nothing."""
        if self._ending.is_set():
            return
        self._ending.set()
        standing = registry.read()
        if standing is not None and standing.owner != self.deployment.owner:
            print(
                f"the server at {self.url} goes on: another job has taken it over (policy {standing.policy})",
                flush=True,
            )
            return
        if standing is not None:
            # Whoever finds the rest of it, should this job be killed now, must not take it for a server.
            registry.write(dataclasses.replace(standing, ending=True))
        try:
            _close_sockets()
        finally:
            clear(serve.status().applications)

    def __enter__(self) -> PolicyServer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shutdown()


def deploy(config: ServeConfig, *, guest: bool = False) -> PolicyServer:
    """Serves a policy on the connected Ray cluster and returns once it answers.

    Where the cluster serves a policy at this address already, the same policy with the same settings is found
    again and left running; another one is started beside the old one and takes its place once it answers. Episodes
    that run then end on the old one, see `ServeConfig.redeploy`. A deployment whose job was killed is taken over at the
    same address, and replaced at another.

    Args:
        config: of the policy.
        guest: a policy that a living job serves, this one included, is used and left as it is, and never replaced.

    Raises:
        CheckpointError: the folder holds no complete policy.
        ServeError: the port is in use, another job serves a policy at another address (for a guest: another policy), or
            replicas do not come up.
    """
    check_before_start(config)
    digest = policy_digest(config.policy, config.acting)
    # Serve announces each of its steps; a job's output is for what the job says.
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    standing = find_standing()
    if standing is not None and guest and not is_abandoned(standing):
        return _visit(standing, digest)
    if standing is None:
        return _deploy_first(config, digest)
    # Any free port was asked for, and has been found: that of the server whose job was killed.
    again = dataclasses.replace(config, port=config.port or standing.port)
    settings = replica_settings(again, digest, bytes.fromhex(standing.secret))
    same = standing.digest == digest and standing.config == registry.plain(settings.config)
    listens_there = (standing.host, standing.port) == (config.host, config.port)
    if not (same or listens_there) and is_abandoned(standing):
        print(f"replacing the policy {standing.policy}, which a killed job has left", flush=True)
        clear(serve.status().applications)
        return _deploy_first(config, digest)
    same_address(standing, again if same else config)
    if same:
        adopted = dataclasses.replace(standing, owner=_new_owner(), job=this_job())
        registry.write(adopted)
        _wait_until_running(adopted.application, found_again=True)
        server = _reached(adopted)
    else:
        server = _replace(standing, settings)
    if server.deployment.retiring:
        server._retirement = threading.Thread(
            target=_retire, args=(server, config), name="retirement", daemon=True
        )
        server._retirement.start()
    return server


def _visit(standing: Deployment, digest: str) -> PolicyServer:
    """The server of a living job, which goes on after the visit. Raises: ServeError when it serves another policy."""
    if standing.digest != digest:
        raise ServeError(
            f"this Ray cluster serves the policy {standing.policy} at {standing.host}:{standing.port}, which an "
            "evaluation does not replace while its job lives. Evaluate that one (url=), stop it, or leave out "
            "ray.address to evaluate on a cluster of your own."
        )
    server = _reached(standing)
    server._ending.set()  # there is nothing to shut down for a guest
    return server


def _deploy_first(config: ServeConfig, digest: str) -> PolicyServer:
    announce([replica_demand(config)])
    port = resolve_port_on_head(config.host, config.port)
    start_serve()
    settings = replica_settings(
        dataclasses.replace(config, port=port), digest, secrets.token_bytes(SECRET_BYTES)
    )
    name = _application_name(settings)
    deployment = record(name, settings, owner=_new_owner(), job=this_job())
    registry.write(deployment)
    try:
        listener = ensure_listener(settings.listener, head_node()["NodeID"], stays=True)
        wait_for_port(listener, PORT_DEADLINE_S)
        _run(name, settings)
        return _reached(deployment)
    except BaseException:
        clear(serve.status().applications)
        raise


def _replace(standing: Deployment, settings: ReplicaSettings) -> PolicyServer:
    """Starts the successor of an application beside it, and sends new clients there."""
    delete_unknown(standing)
    name = _application_name(settings)
    try:
        _run(name, settings)
    except BaseException:
        serve.delete(name)
        raise
    retiring = (*standing.retiring, standing.application)
    deployment = record(name, settings, owner=_new_owner(), job=this_job(), retiring=retiring)
    registry.write(deployment)
    ask_all("serve_generation", deployment.generation)
    return _reached(deployment)


def _retire(server: PolicyServer, config: ServeConfig) -> None:
    """Ends the applications before this one, once their episodes are over or their time is up."""
    old = server.deployment.retiring
    deadline = time.monotonic() + config.redeploy.finish_episodes_s
    when = "answers" if config.redeploy.at_once else "episodes"
    try:
        for application_name in old:
            ask_all("order_move", application_name, when)
        while _sockets(server.states(), old) and not server._ending.wait(0.2):
            if time.monotonic() > deadline:
                break
        # Where all replicas of the successor have died meanwhile, the old ones go on until one is back.
        while not _replicas(server.states(), server.deployment.application) and not server._ending.wait(0.2):
            pass
        if server._ending.is_set():
            return
        for application_name in old:
            serve.delete(application_name)  # its replicas pass on between answers what is left
        current = registry.read()
        if current is not None and current.owner == server.deployment.owner:
            registry.write(dataclasses.replace(current, retiring=()))
    except Exception:
        log.exception("the policy before this one could not be ended; the same command tries again")


def _replicas(states: list[dict[str, Any]], application: str) -> int:
    return sum(r["application"] == application for state in states for r in state["replicas"])


def _sockets(states: list[dict[str, Any]], applications: tuple[str, ...]) -> int:
    return sum(
        r["sockets"] for state in states for r in state["replicas"] if r["application"] in applications
    )


def _close_sockets() -> None:
    ask_all("order_close", CLOSING, timeout_s=5.0)
    deadline = time.monotonic() + DRAIN_DEADLINE_S
    while time.monotonic() < deadline:
        states = ask_all("state", timeout_s=5.0)
        if not any(replica["sockets"] for state in states for replica in state["replicas"]):
            return
        time.sleep(0.05)
    log.warning("sockets were still open %g s after the shutdown began", DRAIN_DEADLINE_S)


def _application_name(settings: ReplicaSettings) -> str:
    return f"{PREFIX}{settings.digest[:8]}-{settings.generation}"


def _new_owner() -> str:
    return secrets.token_hex(8)


def _run(name: str, settings: ReplicaSettings) -> None:
    target = serve.RunTarget(application(settings), name=name, route_prefix=None)
    serve.run_many([target], wait_for_applications_running=False)
    _wait_until_running(name)


def _wait_until_running(name: str, *, found_again: bool = False) -> None:
    deadline = time.monotonic() + START_DEADLINE_S
    reported = ""
    while True:
        status = serve.status().applications.get(name)
        if status is None:
            raise ServeError(
                "the policy is not served: another command has stopped or replaced it meanwhile."
            )
        if status.status == "RUNNING":
            return
        waiting = "\n".join(d.message for d in status.deployments.values() if d.message)
        # UNHEALTHY: a replica that has served is being started again.
        if status.status == "UNHEALTHY" and found_again:
            return
        if status.status in ("DEPLOY_FAILED", "UNHEALTHY") or time.monotonic() > deadline:
            detail = _last_error(f"{status.message}\n{waiting}") or "it did not start in time"
            raise ServeError(f"the policy could not be served: {detail}")
        if waiting != reported and "taken more than" in waiting:
            reported = waiting
            print(f"still waiting for the policy to start: {waiting}", flush=True)
        time.sleep(0.1)


def _last_error(message: str) -> str:
    """The last line of a traceback that names an error; else the message's first line."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    named = [line.rpartition("errors.")[2] for line in lines if "Error: " in line.partition("(")[0]]
    return named[-1] if named else (lines[0] if lines else "")


def _reached(deployment: Deployment) -> PolicyServer:
    """The server, once it has answered here. Raises: ServeError when it does not."""
    tls = bool(deployment.config["security"]["tls_cert"])
    server = PolicyServer(_reachable_host(deployment.host), deployment.port, tls, deployment)
    _ask_health(server)
    found = [s["metadata"] for s in server.states() if s["metadata"]]
    if not found:
        raise ServeError(f"the policy was deployed but no replica of it is known at {server.http_url}.")
    server.metadata = found[0]
    return server


def _ask_health(server: PolicyServer) -> None:
    # A proxy of the environment is for other servers than one's own, and the certificate names the host that
    # robots use, which need not be the one used here.
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    opener = urllib.request.build_opener(
        urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context)
    )
    deadline = time.monotonic() + ANSWER_DEADLINE_S
    while True:
        try:
            opener.open(f"{server.http_url}/healthz", timeout=30).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise ServeError(
                    f"the policy was deployed but does not answer at {server.http_url}: {error}. "
                    "Check that host is an address of the cluster's head node that this machine can reach."
                ) from error
            time.sleep(0.2)


def _reachable_host(host: str) -> str:
    """An address clients on any node can use: the head node's when the server listens on every interface."""
    return str(head_node()["NodeManagerAddress"]) if host in ("0.0.0.0", "::", "") else host
