"""The served policy as an application of Ray Serve."""

from __future__ import annotations

import dataclasses
import secrets
import time
import warnings
from typing import Any

import click
import ray
from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy

from defi_platform import roles, storage
from defi_platform.config import ServeConfig
from defi_platform.config.loader import from_mapping
from defi_platform.config.serve import replica_range
from defi_platform.errors import ServeError, UserError
from defi_platform.serve.deployment.policy_digest import policy_digest
from defi_platform.serve.deployment.standing import find_standing, same_address
from defi_platform.serve.deployment.startup_checks import (
    QUIET_LOGS,
    check_before_start,
    resolve_port_on_head,
    start_serve_for_command,
    warn_if_public,
)
from defi_platform.serve.listener import registry
from defi_platform.serve.listener.listener import ListenerSettings
from defi_platform.serve.listener.registry import Deployment
from defi_platform.serve.listener.relay import SECRET_BYTES
from defi_platform.serve.replica import DRAIN_DEADLINE_S, PolicyReplica, ReplicaSettings

REPORT_PERIOD_S = 1.0
"""Seconds between a replica's reports to Serve's autoscaler; by itself it pushes every ten."""
LOOK_BACK_S = 3.0
DEFAULT_NAME = "default"
"""Serve's own name of an application without one."""


def build_app(args: dict[str, Any]) -> Application:
    """Builder for `serve run defi_platform.serve.app:build_app policy=PATH [key=value ...]`.

    Args:
        args: fields of ServeConfig, nested ones with dots.

    Raises:
        UserError: the configuration, the policy folder or the address is not usable; under the `serve`
            command line as its one-line error.
    """
    command = click.get_current_context(silent=True)
    try:
        config = from_mapping(ServeConfig, nested(args), "serve run")
        check_before_start(config)
        digest = policy_digest(config.policy, config.acting)
        if command is not None and command.info_name == "run":
            start_serve_for_command(command.params)
        name = str(command.params.get("name") or DEFAULT_NAME) if command is not None else DEFAULT_NAME
        standing = find_standing() if ray.is_initialized() else None
        if command is not None and command.info_name == "run":
            start_serve_for_command(command.params)  # again, where remains were cleared away
        if standing is not None:
            same_address(standing, config)
            if standing.application != name:
                raise ServeError(
                    f"{standing.host}:{standing.port} is served by the application {standing.application} of this Ray "
                    "cluster. Replace it with jobs/serve_policy.py, or stop it with `serve shutdown` first."
                )
        elif ray.is_initialized():
            config.port = resolve_port_on_head(config.host, config.port)
        secret = bytes.fromhex(standing.secret) if standing is not None else secrets.token_bytes(SECRET_BYTES)
        settings = replica_settings(config, digest, secret)
        if ray.is_initialized():
            registry.write(record(name, settings, owner="serve run"))
        warn_if_public(config)
        return application(settings)
    except UserError as error:
        if command is None:
            raise
        raise click.ClickException(f"{type(error).__name__}: {error}") from error


def nested(args: dict[str, Any]) -> dict[str, Any]:
    """Keys with dots as mappings in mappings: {"replicas.max": 2} -> {"replicas": {"max": 2}}."""
    values: dict[str, Any] = {}
    for key, value in args.items():
        *path, last = str(key).split(".")
        part = values
        for name in path:
            part = part.setdefault(name, {})
        part[last] = value
    return values


def replica_settings(config: ServeConfig, digest: str, secret: bytes) -> ReplicaSettings:
    """The settings of a new application's replicas.

    Args:
        config: its port is the one to listen on.
        digest: of the policy folder.
        secret: of the deployment.
    """
    config = dataclasses.replace(config, policy=storage.absolute(config.policy))
    security = config.security
    return ReplicaSettings(
        config=config,
        digest=digest,
        generation=time.time_ns() // 10**6,
        listener=ListenerSettings(
            config.host,
            config.port,
            secret,
            tls_cert=security.tls_cert,
            tls_key=security.tls_key,
            stalled_after_s=config.limits.stalled_after_s,
        ),
    )


def record(
    name: str, settings: ReplicaSettings, *, owner: str, job: str = "", retiring: tuple[str, ...] = ()
) -> Deployment:
    """The cluster's record of an application.

    Args:
        name: Serve's name of it.
        settings: of its replicas.
        owner: of the job that stops it.
        job: Ray's id of that job.
        retiring: applications that it takes the place of.
    """
    return Deployment(
        application=name,
        generation=settings.generation,
        digest=settings.digest,
        policy=settings.config.policy,
        host=settings.listener.host,
        port=settings.listener.port,
        secret=settings.listener.secret.hex(),
        owner=owner,
        job=job,
        config=registry.plain(settings.config),
        retiring=retiring,
    )


def application(settings: ReplicaSettings) -> Application:
    """The application of replicas; nothing runs yet."""
    config = settings.config
    low, high = replica_range(config.replicas)
    number: dict[str, Any] = {"num_replicas": low}
    if low != high:
        number = {"autoscaling_config": _autoscaling(config, low, high)}
    return serve.deployment(
        name="PolicyReplica",
        ray_actor_options={
            "num_cpus": config.replica_cpus,
            "num_gpus": config.replica_gpus,
            **roles.options(roles.TRAIN),
        },
        health_check_period_s=5.0,
        health_check_timeout_s=30.0,
        graceful_shutdown_wait_loop_s=0.2,
        graceful_shutdown_timeout_s=DRAIN_DEADLINE_S + 5.0,
        max_constructor_retry_count=2,  # a folder that cannot be loaded does not get better
        logging_config=QUIET_LOGS,
        **number,
    )(PolicyReplica).bind(settings)


def _autoscaling(config: ServeConfig, low: int, high: int) -> AutoscalingConfig:
    scaling = config.scaling
    with warnings.catch_warnings():
        # `metrics_interval_s` is to be replaced by an environment variable of the replicas' processes.
        warnings.simplefilter("ignore", DeprecationWarning)
        return AutoscalingConfig(
            min_replicas=low,
            max_replicas=high,
            metrics_interval_s=REPORT_PERIOD_S,
            look_back_period_s=LOOK_BACK_S,
            upscale_delay_s=scaling.upscale_delay_s,
            downscale_delay_s=scaling.downscale_delay_s,
            policy=AutoscalingPolicy(
                policy_function="defi_platform.serve.deployment.autoscaling:ObservationScaling",
                policy_kwargs={
                    "target_in_flight": scaling.target_in_flight,
                    "max_wait_ms": scaling.max_wait_ms,
                },
            ),
        )
