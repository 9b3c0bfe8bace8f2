"""The start of Serve and the checks before it, since its proxy and replicas fail late and in many lines."""

from __future__ import annotations

import errno
import socket
from collections.abc import Mapping
from typing import Any

import ray
from ray import serve
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from safetensors import SafetensorError, safe_open

from defi_models.errors import ModelFolderError
from defi_models.pretrained.folder import CONFIG_FILE, WEIGHTS_FILE, read_header
from defi_platform import storage
from defi_platform.config import ServeConfig
from defi_platform.errors import CheckpointError, ServeError

QUIET_LOGS = {"log_level": "WARNING", "enable_access_log": False}
HEAD_RESOURCE = "node:__internal_head__"

_FIX = "A policy folder is what jobs/finetune_policy.py leaves in <output>/model."


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
    """`resolve_port` on the head node of the connected cluster, where Serve's proxy will listen."""
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


def stop_idle_serve() -> None:
    """Shuts an idle Serve down: its address is fixed when it starts.

    Raises:
        ServeError: the connected cluster serves something already.
    """
    status = serve.status()
    if status.applications:
        names = ", ".join(f"'{name}'" for name in sorted(status.applications))
        raise ServeError(
            f"this Ray cluster already serves {names}. Query that one (its url), stop it with "
            "`serve shutdown`, or leave out ray.address to start a cluster of your own."
        )
    if status.proxies:
        serve.shutdown()


def start_serve(host: str, port: int) -> None:
    """Starts Serve on the connected cluster, listening on its head node."""
    serve.start(
        proxy_location="HeadOnly", http_options={"host": host, "port": port}, logging_config=QUIET_LOGS
    )


def start_serve_for_command(config: ServeConfig, options: Mapping[str, Any], *, address_given: bool) -> None:
    """Connects to Ray and starts Serve for `serve run`, which would do so next, with the port checked.

    Serve that runs already is used as it is. With a runtime environment among the command's options Ray
    must be connected by the command itself, so nothing is done here.

    Args:
        config: its host and port.
        options: of the command line of `serve run`, by name.
        address_given: whether the user set the host or the port.

    Raises:
        ServeError: a host or port that the user set cannot be had.
    """
    environments = ("runtime_env", "runtime_env_json", "working_dir")
    environment = next((name for name in environments if options.get(name)), None)
    if environment:
        if address_given:
            raise ServeError(
                f"host and port cannot be combined with --{environment.replace('_', '-')}; "
                "run `serve start --http-host HOST --http-port PORT` on the cluster first."
            )
        return
    if not ray.is_initialized():
        ray.init(address=options.get("address"), namespace="serve")
    if serve.status().proxies:
        if address_given:
            raise ServeError(
                "Serve runs on this cluster already and keeps its address; leave out host and port, "
                "or stop it first with `serve shutdown`."
            )
        return
    start_serve(config.host, resolve_port_on_head(config.host, config.port))


def _reason(error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return "the port is in use. Stop the program that holds it, or set another port (0: any)."
    if error.errno == errno.EACCES:
        return "ports below 1024 are reserved. Set another port (0: any)."
    if error.errno == errno.EADDRNOTAVAIL:
        return "this machine has no such address. Use host=127.0.0.1, or 0.0.0.0 for every interface."
    return f"{error.strerror}."
