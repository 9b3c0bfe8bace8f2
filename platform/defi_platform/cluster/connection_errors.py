"""Errors of a connection to Ray: one message that names the cause and the fix, where Ray logs for minutes."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import time
from collections.abc import Iterator

import grpc
import ray
from ray._private import ray_constants
from ray._private.authentication.authentication_utils import is_token_auth_enabled
from ray._private.services import canonicalize_bootstrap_address_or_die, get_node_ip_address

from defi_platform.errors import TRY_AGAIN, UserError, one_line

LISTEN_S = 5.0
"""Seconds in which something has to listen at a cluster's address; Ray itself would try for two minutes."""
PAUSE_S = 0.5


class ClusterError(UserError):
    """A Ray cluster that cannot be reached or lacks what a job asks for."""


class ClusterUnavailable(ClusterError):
    """A Ray cluster that does not answer for now, or lacks nodes that may still come."""

    exit_code = TRY_AGAIN


@contextlib.contextmanager
def on_loopback() -> Iterator[None]:
    """Whatever of Ray this process starts or joins meanwhile has the address 127.0.0.1, and listens there alone.

    Otherwise Ray takes the machine's outer address, listens on all interfaces, and seeks a cluster on loopback there.
    """
    name = ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR  # Ray's switch for systems that it has no clusters on
    before = ray_constants.ENABLE_RAY_CLUSTER, os.environ.get(name)
    ray_constants.ENABLE_RAY_CLUSTER, os.environ[name] = False, "0"
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before[0]
        os.environ.pop(name)
        if before[1] is not None:
            os.environ[name] = before[1]


def check_address(address: str, timeout_s: float = LISTEN_S) -> bool:
    """Checks that something listens at the address of a cluster, before Ray tries to connect.

    Args:
        address: as `ray.init` takes it.
        timeout_s: seconds to try.

    Returns: whether it listens on this machine's loopback alone, so that it is to be joined `on_loopback`.
    Raises: ClusterError for an address of another form, ClusterUnavailable where nothing listens.
    """
    if address.startswith(("http://", "https://")):
        raise ClusterError(
            f"{address} is the address of a dashboard, which takes jobs: `ray job submit --address {address} -- ...`. "
            "To join a cluster from here, set ray.address (or RAY_ADDRESS) to HOST:6379, or to auto on one of its "
            "machines."
        )
    if address == "local" or "://" in address:
        return False
    try:
        found = canonicalize_bootstrap_address_or_die(address)
    except (ConnectionError, ValueError) as error:
        raise explained(address, error) from error
    host, _, port = found.rpartition(":")
    deadline = time.monotonic() + timeout_s
    hosts = [host.strip("[]")]
    if hosts[0] == get_node_ip_address():
        hosts.append("127.0.0.1")
    while True:
        try:
            return _listening(hosts, int(port), timeout_s) != hosts[0]
        except ValueError as error:
            raise explained(address, error) from error
        except OSError as error:
            if time.monotonic() > deadline or isinstance(error, socket.gaierror):
                where = found if found == address else f"{address} ({found})"
                raise _no_answer(where, error.strerror or one_line(error)) from error
        time.sleep(PAUSE_S)


def _listening(hosts: list[str], port: int, timeout_s: float) -> str:
    """The first of the hosts that something listens on. Raises: OSError of the first where nothing does."""
    errors = []
    for host in hosts:
        try:
            with socket.create_connection((host, port), timeout=timeout_s):
                return host
        except OSError as error:
            errors.append(error)
    raise errors[0]


def check_tokens() -> None:
    """Checks that a cluster which this process has joined with a token asks for one.

    One that does not takes its calls, and sends it others without a token, which this process refuses: all of its actors
    would die before they start, "because all references to the actor were removed".

    Raises: ClusterError.
    """
    if not is_token_auth_enabled() or os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true"):
        return
    address = ray.get_runtime_context().gcs_address
    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        try:
            channel.unary_unary("/ray.rpc.NodeInfoGcsService/CheckAlive")(b"", timeout=LISTEN_S)
        except grpc.RpcError:
            return  # it asks for one; or has just gone, which the job's next call says
    raise ClusterError(
        f"the cluster at {address} asks for no token, but this client has RAY_AUTH_MODE=token and would refuse the "
        "cluster's calls. Set RAY_AUTH_MODE=disabled here, or, better, start the cluster with RAY_AUTH_MODE=token."
    )


def explained(address: str, error: Exception) -> ClusterError:
    """The error for a user of a connection that failed.

    Args:
        address: of the cluster.
        error: of `ray.init`.
    """
    texts = [str(one) for one in _chain(error)]
    versions = next((found for text in texts if (found := _VERSIONS.search(text))), None)
    if versions:
        theirs_ray, theirs_python, ours_ray, ours_python = versions.groups()
        return ClusterError(
            f"the cluster at {address} runs Ray {theirs_ray} on Python {theirs_python}, this client Ray {ours_ray} on "
            f"Python {ours_python}. Install the same releases here, or submit the job with `ray job submit`, which "
            "needs none."
        )
    if any("InvalidAuthToken" in text or isinstance(one, ray.exceptions.AuthenticationError)
           for one, text in zip(_chain(error), texts, strict=True)):  # fmt: skip
        return ClusterError(
            f"the cluster at {address} does not accept this client's token. Set RAY_AUTH_MODE=token, and copy "
            "~/.ray/auth_token from the head's machine (or name a copy with RAY_AUTH_TOKEN_PATH)."
        )
    if isinstance(error, ValueError):
        return ClusterError(
            f"ray.address is '{address}' ({one_line(error)}). Write it as HOST:6379, or auto on a machine of the cluster."
        )
    return _no_answer(address, one_line(error))


def _no_answer(address: str, reason: str) -> ClusterUnavailable:
    return ClusterUnavailable(
        f"no Ray cluster answers at {address}: {reason.rstrip('.')}. "
        "Start one with `ray start --head`, or leave out ray.address (and RAY_ADDRESS) to run here."
    )


_VERSIONS = re.compile(
    r"Version mismatch.*?Ray: (\S+)\s+Python: (\S+).*?Ray: (\S+)\s+Python: (\S+)", re.DOTALL
)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
