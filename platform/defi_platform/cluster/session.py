"""Connection to Ray: a job joins the cluster it was submitted to, or starts one on this machine."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import ray

from defi_platform import logs, roles
from defi_platform.cluster.connection_errors import (
    ClusterError,
    check_address,
    check_tokens,
    explained,
    on_loopback,
)
from defi_platform.config import RayConfig
from defi_platform.retry import RetryPolicy, retry

STARTS = 3
"""Attempts to start Ray on this machine."""
_of_this_job = False
"""Ray is connected to the cluster of one machine that this process has started."""


@contextlib.contextmanager
def ray_session(config: RayConfig) -> Iterator[None]:
    """Connects to Ray for the duration of a job; an already connected process keeps its connection.

    The address comes from `config.address`, else from RAY_ADDRESS (which `ray job submit` sets); without
    either a cluster is started on this machine, where it listens on loopback alone, and stopped at the end.

    Raises: ClusterError when the named cluster does not answer, or none starts.
    """
    if ray.is_initialized():
        with roles.switched(config.roles):
            yield
        return
    address = config.address or os.environ.get("RAY_ADDRESS")
    loopback = check_address(address) if address else True
    with (
        on_loopback() if loopback else contextlib.nullcontext(),
        roles.switched(config.roles),
        _connection(config, address),
    ):
        yield


def is_of_this_job() -> bool:
    """True when this process has started the Ray that it uses: a cluster of this machine alone, which stays so."""
    return _of_this_job


@contextlib.contextmanager
def _connection(config: RayConfig, address: str | None) -> Iterator[None]:
    global _of_this_job
    if address:
        try:
            context = ray.init(
                address=address,
                log_to_driver=True,
                runtime_env=_environment(),
                logging_config=_rays_own_lines(),
            )
        except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
            raise explained(address, error) from error
        _check_tokens(address)
        if context.dashboard_url:
            print(f"dashboard: {job_link(context.dashboard_url)}", file=sys.stderr, flush=True)
    else:
        # Train workers, decoders and simulators each hold a share of a CPU, so a two-core machine
        # needs more logical CPUs than it has cores.
        cpus = config.local_cpus or max(4, os.cpu_count() or 1)
        _start_here(cpus)
    _of_this_job = not address
    try:
        yield
    finally:
        _of_this_job = False
        ray.shutdown()


def _check_tokens(address: str) -> None:
    if address.startswith("ray://"):
        return  # its driver runs in the cluster, as that is
    try:
        check_tokens()
    except ClusterError:
        ray.shutdown()
        raise


def job_link(dashboard: str) -> str:
    """Address of the connected job's page.

    Args:
        dashboard: host:port of the cluster's dashboard.
    """
    job = _submitted().get("metadata", {}).get("job_submission_id") or ray.get_runtime_context().get_job_id()
    return f"http://{dashboard}/#/jobs/{job}"


def _submitted() -> dict[str, Any]:
    """Settings that Ray gives to the process of a submitted job; {} in others."""
    return dict(json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR") or "{}"))


def _start_here(cpus: int) -> None:
    """Starts Ray on this machine, again if need be: its own limit of half a minute is short on a busy machine."""

    def start() -> None:
        try:
            ray.init(
                address="local",
                num_cpus=cpus,
                include_dashboard=False,
                logging_config=_rays_own_lines(),
            )
        except Exception as error:
            if _has_timed_out(error):
                ray.shutdown()
            raise

    def announce(error: Exception) -> None:
        print("Ray has not started in its half minute, trying again", file=sys.stderr, flush=True)

    policy = RetryPolicy(max_attempts=STARTS, first_pause_s=0.0)
    try:
        retry(start, policy, is_transient=_has_timed_out, before_retry=announce)
    except Exception as error:
        if not _has_timed_out(error):
            raise
        raise ClusterError(
            f"Ray did not start on this machine in {STARTS} tries of half a minute. Is it busy, or out of memory? "
            "Start one beforehand with `ray start --head` and set ray.address=auto."
        ) from error


def _rays_own_lines() -> ray.LoggingConfig | None:
    """Ray's setting for its own lines and all of Python's logging; None for text."""
    return ray.LoggingConfig(encoding="JSON", log_level="WARNING") if logs.is_json() else None


def _has_timed_out(error: Exception) -> bool:
    # Ray raises a plain Exception.
    return "timed out during startup" in str(error)


def source_roots() -> list[str]:
    """The folders to import the two packages from when they run from a checkout; [] when they are installed."""
    # Found, not imported: the models bring torch with them.
    models = find_spec("defi_models")
    if models is None or models.origin is None:
        return []
    packages = [Path(__file__).resolve().parents[1], Path(models.origin).resolve().parent]
    installed = Path(sys.prefix).resolve()
    roots = [package.parent for package in packages]
    # A virtual environment may lie inside the checkout, so "site-packages" decides, not the prefix alone.
    return (
        []
        if any("site-packages" in root.parts and installed in root.parents for root in roots)
        else [str(root) for root in roots]
    )


def _environment() -> dict[str, Any] | None:
    """Runtime environment of a job's processes on the cluster: the way to its code, and whether roles are used."""
    variables = _source_path() | logs.variables()
    if os.environ.get(roles.VARIABLE):
        variables[roles.VARIABLE] = os.environ[roles.VARIABLE]
    return {"env_vars": variables} if variables else None


def _source_path() -> dict[str, str]:
    """Environment variable that lets the cluster's workers import the packages of this checkout; {} for none.

    Under `ray job submit --working-dir .` that is the copy Ray unpacked, which lies at the same path on every
    node. A PYTHONPATH given at submission is left as it is.
    """
    submitted = _submitted().get("runtime_env") or {}
    found = source_roots()
    if not found or "PYTHONPATH" in (submitted.get("env_vars") or {}):
        return {}
    return {"PYTHONPATH": os.pathsep.join(found)}
