"""The start of Serve and the checks before it, since its replicas fail late and in many lines."""

from __future__ import annotations

import errno
import ipaddress
import socket
import sys
from collections.abc import Mapping
from typing import Any

import ray
from ray import serve
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from safetensors import SafetensorError, safe_open

from defi_models.errors import ModelFolderError
from defi_models.pretrained.folder import CONFIG_FILE, WEIGHTS_FILE, read_header
from defi_platform import roles, storage
from defi_platform.cluster.requirements import Demand
from defi_platform.config import ServeConfig
from defi_platform.config.serve import replica_range
from defi_platform.errors import CheckpointError, ConfigError, ServeError
from defi_platform.serve.acting import acting_of, with_config
from defi_platform.serve.connections.checks import check_connections
from defi_platform.serve.inference.checks import check_inference
from defi_platform.serve.observation import camera_names
from defi_platform.serve.protocols.settings import check_against_policy, wire_settings

QUIET_LOGS = {"log_level": "WARNING", "enable_access_log": False}
HEAD_RESOURCE = "node:__internal_head__"

_FIX = "A policy folder is what jobs/finetune_policy.py leaves in <output>/model."


def check_before_start(config: ServeConfig) -> None:
    """Checks everything that can be known before Ray is started.

    Raises:
        UserError: the policy folder, a file or a number of the settings cannot be used.
    """
    replica_range(config.replicas)
    check_connections(config.limits, config.security, config.max_connections)
    check_inference(config)
    wires = wire_settings(config)
    check_policy_folder(config.policy)
    package = config.model.package
    if package and (storage.is_folder(package) or not storage.exists(package)):
        raise ConfigError(
            f"model.package={package} is no file. Make one with jobs/export_model.py package.path=."
        )
    if not storage.is_remote(config.policy):  # the replica looks again
        model = read_header(storage.local_path(config.policy))["config"]
        try:
            action_dim = model["adapter"]["head"]["action_dim"]
            cameras = camera_names(model["cameras"], model["views"])
        except (KeyError, TypeError):
            return  # of another version: what reads all of it says which field does not fit
        check_against_policy(wires, cameras, action_dim)
        own = acting_of(storage.local_path(config.policy))
        with_config(own, config.acting)
        if not own.said:
            print(
                f"policy folder {config.policy} does not say how it acts (an older version wrote it); it acts as it did: "
                f"{own.text()}. acting.* changes it, and exporting it again writes it down.",
                flush=True,
            )


def replica_demand(config: ServeConfig) -> Demand:
    """The resources of the replicas that a policy is served by at the least."""
    return Demand(
        name="replicas",
        resources={"CPU": config.replica_cpus, "GPU": config.replica_gpus},
        count=replica_range(config.replicas)[0],
        role=roles.TRAIN,
        fix="Set replicas, replica_cpus or replica_gpus lower.",
    )


def warn_if_public(config: ServeConfig) -> None:
    """Says loudly where anybody in the network may command the policy."""
    if config.security.tokens is None and not is_loopback(config.host):
        print(
            f"WARNING: {config.host}:{config.port} can be reached from other machines and asks for no token: whoever "
            "reaches it can use this policy. Set security.tokens=FILE (one `name: token` per line), or "
            "host=127.0.0.1.",
            file=sys.stderr,
            flush=True,
        )


def is_loopback(host: str) -> bool:
    """Whether only this machine can connect to a server that listens on `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_policy_folder(folder: str) -> None:
    """Reads the config and the weight file's table of contents, not the weights.

    Args:
        folder: local or remote.

    Raises:
        CheckpointError: the folder is absent, partial, truncated or of another model.
        StorageError: its upload was cut short.
    """
    storage.ensure_complete(folder)
    if storage.is_remote(folder):
        if not storage.exists(storage.join(folder, CONFIG_FILE)):
            raise CheckpointError(f"policy folder {folder} has no {CONFIG_FILE}. {_FIX}")
        return
    local = storage.local_path(folder)
    weights = local / WEIGHTS_FILE
    try:
        header = read_header(local)
        if header["model"] != "policy":
            raise CheckpointError(
                f"{local} holds a '{header['model']}' model, and only a policy is served. {_FIX}"
            )
        if not weights.is_file():
            raise CheckpointError(f"{local} has no {WEIGHTS_FILE}, so it is not complete. {_FIX}")
        with safe_open(weights, "pt"):
            pass  # opening compares the table of contents with the file's length
    except PermissionError as error:
        raise CheckpointError(
            f"{error.filename or local} may not be read by this user. Its owner can allow it: chmod -R a+rX {local}."
        ) from error
    except ModelFolderError as error:
        raise CheckpointError(f"{error} {_FIX}") from error
    except (SafetensorError, OSError) as error:
        size = weights.stat().st_size
        raise CheckpointError(
            f"{weights} ({size:,} bytes) is damaged or cut short: {error}. Copy the folder again."
        ) from error


def resolve_port(host: str, port: int) -> int:
    """Checks on this machine that `port` can be listened on; 0 picks a free one.

    Args:
        host: name or address to listen on.
        port: 0 to 65535.

    Returns:
        The port.

    Raises:
        ServeError: the port is taken or reserved, or `host` is no address of this machine.
    """
    if not 0 <= port <= 65535:
        raise ServeError(f"port {port} does not exist; choose one from 1 to 65535, or 0 for any free one.")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            # As the server will: a connection that has just been closed does not hold the port.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            probe.listen(1)
            return int(probe.getsockname()[1])
    except socket.gaierror as error:
        raise ServeError(f"host '{host}' has no address: {error.strerror}. Try 127.0.0.1.") from error
    except OSError as error:
        raise ServeError(f"cannot listen on {host}:{port}: {_reason(error)}") from error


def resolve_port_on_head(host: str, port: int) -> int:
    """`resolve_port` on the head node of the connected cluster, where clients connect."""
    head = head_node()
    if head["NodeID"] == ray.get_runtime_context().get_node_id():
        return resolve_port(host, port)
    on_head = NodeAffinitySchedulingStrategy(head["NodeID"], soft=False)
    task = ray.remote(resolve_port).options(num_cpus=0, max_retries=0, scheduling_strategy=on_head)
    try:
        return int(ray.get(task.remote(host, port)))
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, ServeError):
            raise error.cause from None
        raise


def head_node() -> dict[str, Any]:
    """Ray's record of the connected cluster's head node."""
    alive = [node for node in ray.nodes() if node["Alive"]]
    return next((node for node in alive if HEAD_RESOURCE in node["Resources"]), alive[0])


def same_machine(node: str) -> str:
    """The node that holds the public port for all nodes with the address of `node`: the head, else the first by its id.

    Args:
        node: Ray's id of a node.
    """
    alive = {n["NodeID"]: n["NodeManagerAddress"] for n in ray.nodes() if n["Alive"]}
    there = [other for other, address in alive.items() if address == alive.get(node)]
    head = head_node()["NodeID"]
    return head if head in there else min(there, default=node)


def start_serve() -> None:
    """Starts Serve on the connected cluster, where it does not run yet, without its HTTP proxies."""
    serve.start(proxy_location="Disabled", logging_config=QUIET_LOGS)


def start_serve_for_command(options: Mapping[str, Any]) -> None:
    """Connects to Ray and starts Serve for `serve run`, which would do so next, with HTTP proxies of its own.

    With a runtime environment among the command's options Ray must be connected by the command itself, so nothing is
    done here.

    Args:
        options: of the command line of `serve run`, by name.
    """
    if any(options.get(name) for name in ("runtime_env", "runtime_env_json", "working_dir")):
        return
    if not ray.is_initialized():
        ray.init(address=options.get("address"), namespace="serve")
    start_serve()


def _reason(error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return "the port is in use. Stop the program that holds it, or set another port (0: any)."
    if error.errno == errno.EACCES:
        return "ports below 1024 are reserved. Set another port (0: any)."
    if error.errno == errno.EADDRNOTAVAIL:
        return "this machine has no such address. Use host=127.0.0.1, or 0.0.0.0 for every interface."
    return f"{error.strerror}."
