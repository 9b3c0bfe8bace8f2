"""Checks of values before anything is rendered: what would otherwise be refused by a cluster, or wait in it for ever."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from defi_models.errors import did_you_mean
from defi_platform.config import JOB_CONFIGS, ServeConfig
from defi_platform.config.loader import find_config, load_config
from defi_platform.errors import ConfigError
from defi_platform.roles import DECODE, TRAIN
from defi_platform.supervise.work import JOBS
from rendering.values import ClusterValues, JobValues, NodeValues

LONGEST_NAME = 47
"""Characters of a RayJob's or RayService's name: KubeRay adds to it for the cluster below."""
GATES = ("GCSFaultToleranceEmbeddedStorage", "RayClusterMTLS", "RayClusterNetworkPolicy")
"""KubeRay 1.7's gates that are off by default and that values can make use of."""
TARGETS_WITH_IMAGE = ("kuberay", "ray-up")
TAKEN_JOBS = ("policy", "supervisor")
"""Names of jobs that would be those of the service and of the supervisors' pods."""
TAKEN_NODES = ("head", "headgroup")
"""Names of types of node that are the head's own for `ray up` and KubeRay."""
_NAME = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_SECRET = re.compile(r"(^|_)(KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?)(_|$)")
_OWN_VARIABLES = re.compile(r"DEFI_HOME|RAY_(AUTH|REDIS|USE_TLS|TLS|ADDRESS).*|REDIS_.*")


def check(values: ClusterValues, target: str) -> None:
    """Checks all that a kind of cluster reads.

    Args:
        values: of the cluster.
        target: kuberay | ray-up | skypilot | slurm.

    Raises: ConfigError, which names the key, its value and the way out.
    """
    _check_names(values)
    if not values.nodes:
        raise ConfigError("nodes is empty; name at least one type of node, such as nodes.train.")
    _check_environment(values.env)
    for name, node in values.nodes.items():
        _check_node(f"nodes.{name}", node)
    for name, job in values.jobs.items():
        _check_job(f"jobs.{name}", job, values)
    if target in TARGETS_WITH_IMAGE:
        for key in ("name", "tag"):
            if getattr(values.image, key) is None:
                raise ConfigError(
                    f"image.{key} has no value; build cluster/Dockerfile, push it and name it here."
                )
    _CHECKS[target](values)


def _check_names(values: ClusterValues) -> None:
    names = {"name": values.name}
    if values.service.policy is not None:
        names["service"] = f"{values.name}-policy"
    names |= {f"jobs.{name}": f"{values.name}-{name}" for name in values.jobs}
    names |= {f"nodes.{name}": name for name in values.nodes}
    for key, name in names.items():
        if not _NAME.fullmatch(name) or len(name) > LONGEST_NAME:
            raise ConfigError(
                f"{key}: '{name}' cannot be the name of an object on a cluster; use small letters, digits and "
                f"hyphens, a letter first, {LONGEST_NAME} characters at most."
            )
    for kind, taken, mine in (("jobs", TAKEN_JOBS, values.jobs), ("nodes", TAKEN_NODES, values.nodes)):
        for name in set(taken) & set(mine):
            raise ConfigError(f"{kind}.{name}: that name is taken by the cluster itself; choose another.")


def _check_environment(variables: dict[str, str]) -> None:
    for name in variables:
        if not _VARIABLE.fullmatch(name):
            raise ConfigError(f"env: '{name}' cannot be the name of an environment variable.")
        if _OWN_VARIABLES.fullmatch(name):
            raise ConfigError(f"env.{name} is set by what is rendered; leave it out (home is DEFI_HOME).")
        if _SECRET.search(name.upper()):
            raise ConfigError(
                f"env.{name} looks like a secret, and values hold none: name a secret of the cluster under secrets."
            )


def _check_node(key: str, node: NodeValues) -> None:
    if node.role not in (DECODE, TRAIN):
        raise ConfigError(f"{key}.role is '{node.role}'; it is {DECODE} or {TRAIN}.")
    if not 0 <= node.min <= node.max or node.max == 0:
        raise ConfigError(
            f"{key}: min is {node.min} and max {node.max}; min is 0 or more, max at least 1 and at least min."
        )
    if not 0.05 <= node.object_store <= 0.6:
        raise ConfigError(
            f"{key}.object_store is {node.object_store}; it is a share of the memory, 0.05 to 0.6."
        )
    for name, least in {"cpus": 1, "memory_gib": 2, "gpus": 0, "disk_gib": 10, "idle_s": 0}.items():
        if getattr(node, name) < least:
            raise ConfigError(f"{key}.{name} is {getattr(node, name)}; it is {least} or more.")


def _check_job(key: str, job: JobValues, values: ClusterValues) -> None:
    if job.job not in JOBS or JOBS[job.job].is_service:
        known = sorted(name for name, work in JOBS.items() if not work.is_service)
        raise ConfigError(f"{key}.job: '{job.job}' is no job for a cluster.{did_you_mean(job.job, known)}")
    _check_config(key, job)
    _check_nodes_exist(f"{key}.nodes", job.nodes, values)
    if job.shared and job.nodes:
        raise ConfigError(
            f"{key}.nodes has no meaning on the shared cluster, which has all types; leave it out."
        )
    if job.retries < 0:
        raise ConfigError(f"{key}.retries is {job.retries}; it is 0 or more.")
    if job.deadline_h is not None and job.deadline_h <= 0:
        raise ConfigError(f"{key}.deadline_h is {job.deadline_h}; it is more than 0, or null.")


def _check_config(key: str, job: JobValues) -> None:
    try:
        config = find_config(job.config) if job.config else None
    except ConfigError:
        return  # it lies in the image, where nobody can look now
    flags = JOBS[job.job].flags
    try:
        load_config(
            JOB_CONFIGS[job.job], config, [flags.get(override, override) for override in job.overrides]
        )
    except ConfigError as error:
        raise ConfigError(f"{key}: {error}") from error


def _check_nodes_exist(key: str, names: Iterable[str], values: ClusterValues) -> None:
    for name in names:
        if name not in values.nodes:
            raise ConfigError(
                f"{key}: there is no type of node '{name}'.{did_you_mean(name, sorted(values.nodes))}"
            )


def _check_kuberay(values: ClusterValues) -> None:
    kubernetes, gcs, service = values.kubernetes, values.gcs, values.service
    for gate in kubernetes.feature_gates:
        if gate not in GATES:
            raise ConfigError(
                f"kubernetes.feature_gates: '{gate}' is none that changes what is rendered.{did_you_mean(gate, list(GATES))}"
            )
    _check_gate(values, "RayClusterMTLS", "kubernetes.mtls=true" if kubernetes.mtls else None)
    if gcs.backend not in ("none", "rocksdb", "redis"):
        raise ConfigError(f"gcs.backend is '{gcs.backend}'; it is none, rocksdb or redis.")
    _check_gate(
        values,
        "GCSFaultToleranceEmbeddedStorage",
        "gcs.backend=rocksdb" if gcs.backend == "rocksdb" else None,
    )
    if gcs.backend == "redis" and not gcs.redis_address:
        raise ConfigError("gcs.backend is redis and gcs.redis_address has no value; write host:port.")
    if service.policy is None:
        return
    _check_nodes_exist("service.nodes", service.nodes, values)
    if not any(values.nodes[name].role == TRAIN for name in service.nodes or values.nodes):
        raise ConfigError(f"service.nodes: no type has the role {TRAIN}, which replicas need.")
    _check_service(values)
    if not 1 <= service.step_percent <= 100 or service.step_s < 1:
        raise ConfigError("service.step_percent is 1 to 100, service.step_s 1 or more.")


def _check_service(values: ClusterValues) -> None:
    for override in values.service.overrides:
        key, equals, _ = override.partition("=")
        if not equals:
            raise ConfigError(f"service.overrides: '{override}' is no key=value.")
        if key in ("policy", "host", "port", "security.tokens", "security.tls_cert", "security.tls_key"):
            raise ConfigError(
                f"service.overrides: {key} follows from service.policy, service.port, service.tls_secret and "
                "secrets.policy_tokens; set it there."
            )
    try:
        config = load_config(
            ServeConfig, None, [f"policy={values.service.policy}", *values.service.overrides]
        )
    except ConfigError as error:
        raise ConfigError(f"service.overrides: {error}") from error
    kinds = [node for name, node in values.nodes.items() if name in (values.service.nodes or values.nodes)]
    kinds = [node for node in kinds if node.role == TRAIN]
    for resource, needed in (("cpus", config.replica_cpus), ("gpus", config.replica_gpus)):
        if needed > max(getattr(node, resource) for node in kinds):
            raise ConfigError(
                f"service.overrides: a replica asks for {needed:g} {resource}, which no node of service.nodes with the "
                f"role {TRAIN} has; lower replica_{resource}, or name larger nodes."
            )


def _check_gate(values: ClusterValues, gate: str, wanted: str | None) -> None:
    if wanted is not None and gate not in values.kubernetes.feature_gates:
        raise ConfigError(
            f"{wanted} needs KubeRay's gate {gate}, which is off by default: start the operator with "
            f"--feature-gates={gate}=true, and name the gate in kubernetes.feature_gates."
        )


def _check_ray_up(values: ClusterValues) -> None:
    if values.aws.security_group is None:
        raise ConfigError(
            "aws.security_group has no value; name the security group of the nodes (sg-...), which lets in ssh from "
            "your addresses and everything from itself: Ray's own would let in ssh from everywhere. "
            "docs/deployment.md has the commands that make one."
        )
    if values.aws.instance_profile is None:
        raise ConfigError(
            "aws.instance_profile has no value; name an instance profile that may use the bucket, and start and end "
            "instances for the head."
        )
    for name, node in values.nodes.items():
        if node.aws_type is None:
            raise ConfigError(
                f"nodes.{name}.aws_type has no value; name an instance type, such as m7i.4xlarge."
            )
    _check_bucket(values)


def _check_skypilot(values: ClusterValues) -> None:
    name = values.skypilot.nodes
    if name is None:
        raise ConfigError("skypilot.nodes has no value; name the type of node that its tasks run on.")
    _check_nodes_exist("skypilot.nodes", [name], values)
    if values.nodes[name].gpus and values.nodes[name].accelerator is None:
        raise ConfigError(
            f"nodes.{name}.accelerator has no value; name its GPU as SkyPilot does, such as H100."
        )
    if values.skypilot.count < 1:
        raise ConfigError(f"skypilot.count is {values.skypilot.count}; it is 1 or more.")
    _check_bucket(values)


def _check_slurm(values: ClusterValues) -> None:
    slurm = values.slurm
    if not any(slurm.nodes.values()):
        raise ConfigError("slurm.nodes is empty; write how many nodes of which type, such as {train: 2}.")
    _check_nodes_exist("slurm.nodes", slurm.nodes, values)
    _check_nodes_exist("slurm.partitions", slurm.partitions, values)
    for name, count in slurm.nodes.items():
        if count < 0:
            raise ConfigError(f"slurm.nodes.{name} is {count}; it is 0 or more.")
    if slurm.gpus_per_node not in ("gpus-per-node", "gres"):
        raise ConfigError(f"slurm.gpus_per_node is '{slurm.gpus_per_node}'; it is gpus-per-node or gres.")
    if slurm.hours <= 0.1:
        raise ConfigError(f"slurm.hours is {slurm.hours}; it is more than 0.1.")


def _check_bucket(values: ClusterValues) -> None:
    if "://" not in values.home:
        raise ConfigError(
            f"home is {values.home}; nodes of a cloud share no folder: write the URL of a bucket."
        )


_CHECKS: dict[str, Any] = {
    "kuberay": _check_kuberay,
    "ray-up": _check_ray_up,
    "skypilot": _check_skypilot,
    "slurm": _check_slurm,
}
