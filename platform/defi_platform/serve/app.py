"""The served policy as a Ray Serve application, and as a server that jobs start and stop."""

from __future__ import annotations

import json
import logging
import os
import signal
import threading
import time
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import click
import ray
from ray import serve
from ray.serve import Application
from ray.serve.handle import DeploymentHandle

from defi_models.inputs.action_contract import UNKNOWN
from defi_platform import storage
from defi_platform.cluster import ray_session
from defi_platform.config import ServeConfig
from defi_platform.config.loader import from_mapping
from defi_platform.errors import ConfigError, ServeError, UserError
from defi_platform.serve.gateway import Gateway
from defi_platform.serve.observation import ANY_CAMERA, IMAGE_PREFIX, PROMPT_KEY, SEED_KEY, STATE_KEY
from defi_platform.serve.replica import PolicyReplica
from defi_platform.serve.startup_checks import (
    QUIET_LOGS,
    check_policy_folder,
    head_node,
    resolve_port,
    resolve_port_on_head,
    start_serve,
    start_serve_for_command,
    stop_idle_serve,
)

APPLICATION = "policy"
START_DEADLINE_S = 600.0
DRAIN_DEADLINE_S = 10.0

GATEWAY_CPUS = 0.1


def build_app(args: dict[str, Any]) -> Application:
    """Builder for `serve run defi_platform.serve.app:build_app policy=PATH [key=value ...]`.

    Args:
        args: fields of ServeConfig; `host` and `port` work with `serve run` as long as Serve is not running
            yet (in a Serve config file they belong under http_options).

    Raises:
        UserError: the configuration, the policy folder or the address is not usable; under the `serve`
            command line as its one-line error.
    """
    command = click.get_current_context(silent=True)
    try:
        config = from_mapping(ServeConfig, args, "serve run")
        check_policy_folder(config.policy)
        address_keys = {"host", "port"} & args.keys()
        if command is not None and command.info_name == "run":
            start_serve_for_command(config, command.params, address_given=bool(address_keys))
        elif address_keys:
            keys = " and ".join(sorted(address_keys))
            raise ConfigError(f"{keys}: set this under http_options of the Serve config file.")
        return application(config)
    except UserError as error:
        if command is None:
            raise
        raise click.ClickException(f"{type(error).__name__}: {error}") from error


def application(config: ServeConfig) -> Application:
    """The application of gateway and replicas, bound together; nothing runs yet."""
    policy = serve.deployment(
        name="PolicyReplica",
        num_replicas=config.replicas,
        ray_actor_options={"num_cpus": config.replica_cpus, "num_gpus": config.replica_gpus},
        # Waiting happens in the replica's own queue, where batches form, and not in the gateway's router.
        max_ongoing_requests=max(config.max_connections, 2 * config.max_batch_size),
        graceful_shutdown_wait_loop_s=0.2,
        graceful_shutdown_timeout_s=DRAIN_DEADLINE_S,
        max_constructor_retry_count=2,  # a folder that cannot be loaded does not get better
        logging_config=QUIET_LOGS,
    )(PolicyReplica).bind(
        storage.absolute(config.policy),
        max_batch_size=config.max_batch_size,
        threads=config.threads,
        gpu=config.replica_gpus > 0,
    )
    return serve.deployment(
        name="Gateway",
        ray_actor_options={"num_cpus": GATEWAY_CPUS},
        # Serve counts an open websocket as an ongoing request, and its default of 5 leaves a sixth robot
        # waiting without an answer. Some more than the gateway takes, so that it can turn clients away itself
        # and still be asked for its health.
        max_ongoing_requests=config.max_connections + 16,
        graceful_shutdown_wait_loop_s=0.2,
        graceful_shutdown_timeout_s=DRAIN_DEADLINE_S,
        logging_config=QUIET_LOGS,
    )(Gateway).bind(policy, config.max_connections)


@dataclass
class PolicyServer:
    """A policy that is being served; a context manager that shuts it down."""

    host: str
    port: int
    metadata: dict[str, Any]
    """The greeting of clients."""
    gateway: DeploymentHandle[Any] = field(repr=False)
    _running: bool = field(default=True, repr=False)

    @property
    def url(self) -> str:
        """The address for openpi clients."""
        return f"ws://{self._authority}"

    @property
    def http_url(self) -> str:
        """The address of /healthz and /metadata."""
        return f"http://{self._authority}"

    @property
    def _authority(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def shutdown(self) -> None:
        """Answers what is in flight, closes the sockets and stops Serve. A second call does nothing."""
        if not self._running:
            return
        self._running = False
        try:
            self._drain()
        finally:
            serve.shutdown()

    def _drain(self) -> None:
        deadline = time.monotonic() + DRAIN_DEADLINE_S
        try:
            while time.monotonic() < deadline and self.gateway.drain.remote().result(timeout_s=5):
                time.sleep(0.05)
        except Exception as error:  # noqa: BLE001 - a gateway that is gone has no sockets left to close
            logging.getLogger(__name__).warning("the gateway was gone before it could be drained: %s", error)

    def __enter__(self) -> PolicyServer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shutdown()


def deploy(config: ServeConfig) -> PolicyServer:
    """Serves a policy on the connected Ray cluster and returns once it answers.

    Raises:
        CheckpointError: the folder holds no complete policy.
        ServeError: the port is in use, the cluster serves something already, or replicas do not come up.
    """
    check_policy_folder(config.policy)
    stop_idle_serve()
    port = resolve_port_on_head(config.host, config.port)
    # Serve announces each of its steps; a job's output is for what the job says.
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    start_serve(config.host, port)
    try:
        target = serve.RunTarget(application(config), name=APPLICATION, route_prefix="/")
        gateway = serve.run_many([target], wait_for_applications_running=False)[0]
        _wait_until_running()
        server = PolicyServer(_reachable_host(config.host), port, {}, gateway)
        server.metadata = _fetch_metadata(server)
        return server
    except BaseException:
        serve.shutdown()
        raise


def serve_policy(config: ServeConfig) -> int:
    """Serves a policy until Ctrl-C or SIGTERM, then drains.

    Returns:
        The job's exit code.

    Raises:
        UserError: as `deploy`; a bad folder and a taken port are found before Ray is started.
    """
    check_policy_folder(config.policy)
    if not (config.ray.address or os.environ.get("RAY_ADDRESS") or ray.is_initialized()):
        resolve_port(config.host, config.port)
    with ray_session(config.ray), deploy(config) as server:
        print(_how_to_call(server, config), flush=True)
        _wait_for_signal()
        print("shutting down: answering what is in flight, closing the sockets", flush=True)
    print("stopped", flush=True)
    return 0


def _how_to_call(server: PolicyServer, config: ServeConfig) -> str:
    about = server.metadata
    height, width = about["image_size"]
    cameras = ["<name>" if camera == ANY_CAMERA else camera for camera in about["cameras"]]
    keys = [f'"{IMAGE_PREFIX}{camera}": uint8 (h, w, 3)' for camera in cameras]
    if about["state_dim"]:
        keys.append(f'"{STATE_KEY}": float32 ({about["state_dim"]},)')
    keys += [f'"{PROMPT_KEY}": str', f'"{SEED_KEY}": int, optional']
    return (
        f"{about['preset']} policy {config.policy} is served at {server.url}\n"
        f"  {config.replicas} replica(s), up to {config.max_batch_size} observations per forward pass; "
        f"images are resized to {height}x{width}\n"
        "  from openpi_client.websocket_client_policy import WebsocketClientPolicy\n"
        f'  WebsocketClientPolicy("{server.url}").infer(observation)["actions"]'
        f"  # float32 ({about['chunk']}, {about['action_dim']})\n"
        f"  observation: {{{', '.join(keys)}}}\n"
        f"  actions: {_action_line(about['action'])}\n"
        f"  {server.http_url}/healthz  {server.http_url}/metadata\n"
        "Ctrl-C stops."
    )


def _action_line(action: Mapping[str, Any]) -> str:
    """The meaning of the actions in one line."""
    names, units = ([] if action[key] == UNKNOWN else action[key] for key in ("names", "units"))
    entries = (
        [f"{name} ({unit})" for name, unit in zip(names, units, strict=True)] if units and names else names
    )
    return (
        f"{', '.join(entries) or 'entries without names'}; kind {action['kind']}; gripper: {action['gripper']}; "
        f"at {action['control_hz']} Hz; carry out {action['execute_steps']} of a chunk"
    )


def _wait_for_signal() -> None:
    """Waits for SIGINT or SIGTERM, the normal end of a server."""
    stop = threading.Event()
    before = {s: signal.signal(s, lambda *_: stop.set()) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        while not stop.wait(1.0):
            pass  # a wait without end would not let the handlers run
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait_until_running() -> None:
    deadline = time.monotonic() + START_DEADLINE_S
    reported = ""
    while True:
        status = serve.status().applications[APPLICATION]
        if status.status == "RUNNING":
            return
        waiting = "\n".join(d.message for d in status.deployments.values() if d.message)
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


def _fetch_metadata(server: PolicyServer) -> dict[str, Any]:
    try:
        with urllib.request.urlopen(f"{server.http_url}/metadata", timeout=30) as response:
            return dict(json.load(response))
    except (OSError, ValueError) as error:
        raise ServeError(
            f"the policy was deployed but does not answer at {server.http_url}: {error}. "
            "Check that host is an address of the cluster's head node that this machine can reach."
        ) from error


def _reachable_host(host: str) -> str:
    """An address clients on any node can use: the head node's when the server listens on every interface."""
    return str(head_node()["NodeManagerAddress"]) if host in ("0.0.0.0", "::", "") else host
