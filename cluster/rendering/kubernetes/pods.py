"""Pods of Ray nodes on Kubernetes: containers, disks, identities and their security."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from rendering.values import ClusterValues, HeadValues, NodeValues
from rendering.work import GIB, environment, object_store_bytes, without_empty

USER = 1000
"""User and group of cluster/Dockerfile."""
INSTANCE = "app.kubernetes.io/instance"
"""Label of our pods, by which NetworkPolicies find them: KubeRay makes up the names of clusters."""
TOKENS, CERTIFICATE = "/etc/defi/tokens", "/etc/defi/tls"
NODE_METRICS = {"metrics": 8080}
HEAD_METRICS = {**NODE_METRICS, "as-metrics": 44217, "dash-metrics": 44227}
"""Ports that Prometheus reads, by the names that rendering/monitoring.py knows."""
HEAD_OBJECT_STORE = 1 * GIB
"""The head does no work, and its drivers put little into the store."""
DRAIN_S = 90
"""Seconds that a node which is taken away gives its work: a training writes a checkpoint, replicas pass their sockets on.
Clouds give spot nodes two minutes' notice, some 30 seconds, and Kubernetes kills the pod then."""

# Trainings and replicas hear of it through Ray, and end in their own way; other work is done again elsewhere.
BUSY = "^ray::(RayTrainWorker|ServeReplica)"
"""Titles of processes that a pod waits for."""
_LEAVE = (
    'timeout 20 ray drain-node --address "$RAY_ADDRESS" --reason DRAIN_NODE_REASON_PREEMPTION '
    f'--reason-message "the pod ends" --deadline-remaining-seconds {DRAIN_S} || exit 0; '
    f"for _ in $(seq {DRAIN_S - 5}); do grep -aEqs '{BUSY}' /proc/[0-9]*/cmdline || break; sleep 1; done"
)
_DISK = "disk"
LOGS = "ray-logs"
"""KubeRay's name of the volume that the head and the autoscaler share."""


@dataclass(frozen=True)
class Serving:
    """What pods of a served policy have besides."""

    port: int
    tokens_secret: str | None = None
    tls_secret: str | None = None
    mounts: list[tuple[str, str, str]] = field(init=False)
    """(name of volume, secret, folder)."""

    def __post_init__(self) -> None:
        found = [("tokens", self.tokens_secret, TOKENS), ("tls", self.tls_secret, CERTIFICATE)]
        object.__setattr__(self, "mounts", [(name, secret, path) for name, secret, path in found if secret])


def head_pod(values: ClusterValues, instance: str, serving: Serving | None) -> dict[str, Any]:
    """Template of a head's pod.

    Args:
        values: of the cluster.
        instance: value of the label `INSTANCE`.
        serving: of a service; None: it is none.
    """
    head = values.head
    ports = {"gcs": 6379, "dashboard": 8265, "client": 10001, **HEAD_METRICS}
    if serving:
        ports["serve"] = serving.port
    container = _container(values, "ray-head", head.cpus, head.memory_gib, ports, serving)
    # Logs and shipped code. KubeRay shares the folder with the autoscaler, by this name, and would set no limit.
    container["volumeMounts"].append({"name": LOGS, "mountPath": "/tmp/ray"})
    pod = _pod(values, instance, container, head, shm_bytes=2 * HEAD_OBJECT_STORE, serving=serving)
    pod["spec"]["volumes"].append({"name": LOGS, **_disk(head)})
    return pod


def worker_pod(
    values: ClusterValues, instance: str, node: NodeValues, serving: Serving | None
) -> dict[str, Any]:
    """Template of a node's pod.

    Args:
        values: of the cluster.
        instance: value of the label `INSTANCE`.
        node: its type.
        serving: of a service; None: it is none.
    """
    ports = NODE_METRICS | ({"serve": serving.port} if serving else {})
    container = _container(values, "ray-worker", node.cpus, node.memory_gib, ports, serving)
    container["lifecycle"] = {"preStop": {"exec": {"command": ["/bin/bash", "-c", _LEAVE]}}}
    if node.gpus:
        for part in container["resources"].values():
            part["nvidia.com/gpu"] = str(node.gpus)
    if serving:
        # A pod without a replica has no listener and gets no clients; KubeRay's own probe asks Serve's proxy.
        container["readinessProbe"] = {
            "httpGet": {
                "path": "/healthz",
                "port": "serve",
                "scheme": "HTTPS" if serving.tls_secret else "HTTP",
            },
            "periodSeconds": 2,
            "timeoutSeconds": 2,
            "failureThreshold": 2,
        }
    # DeepSpeed and NCCL use /dev/shm besides.
    pod = _pod(
        values, instance, container, node, shm_bytes=object_store_bytes(node) + 2 * GIB, serving=serving
    )
    pod["spec"]["terminationGracePeriodSeconds"] = DRAIN_S + 30
    pod["spec"]["automountServiceAccountToken"] = False
    return pod


def client_pod(
    values: ClusterValues, name: str, command: list[str], env: list[dict[str, Any]]
) -> dict[str, Any]:
    """Specification of a small pod that hands a job in to a cluster.

    Args:
        values: of the cluster.
        name: of its container.
        command: [] where KubeRay fills it in.
        env: of the container.
    """
    container = {
        "name": name,
        "image": _image(values),
        "command": command,
        "env": env,
        "resources": _quantities({"cpu": "500m", "memory": "1Gi"}),
        "securityContext": container_security(),
    }
    return without_empty(
        {
            "restartPolicy": "Never",
            "automountServiceAccountToken": False,
            "securityContext": _pod_security(),
            "imagePullSecrets": _pull_secrets(values),
            "containers": [without_empty(container)],
        }
    )


def _image(values: ClusterValues) -> str:
    """The image as a container asks for it."""
    return f"{values.image.name}:{values.image.tag}"


def _pod_security() -> dict[str, Any]:
    """Security of a pod, at Kubernetes' level "restricted"."""
    return {
        "runAsNonRoot": True,
        "runAsUser": USER,
        "runAsGroup": USER,
        "fsGroup": USER,
        "seccompProfile": {"type": "RuntimeDefault"},
    }


def container_security() -> dict[str, Any]:
    """Security of a container, at Kubernetes' level "restricted"."""
    return {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}


def _pull_secrets(values: ClusterValues) -> list[dict[str, str]]:
    """What images are pulled with."""
    return [{"name": values.image.pull_secret}] if values.image.pull_secret else []


def _container(
    values: ClusterValues,
    name: str,
    cpus: int,
    memory_gib: int,
    ports: dict[str, int],
    serving: Serving | None,
) -> dict[str, Any]:
    secrets = serving.mounts if serving else []
    return {
        "name": name,
        "image": _image(values),
        "imagePullPolicy": "IfNotPresent",
        "env": variables(values),
        "ports": [{"name": port, "containerPort": number} for port, number in ports.items()],
        # Ray counts what the limits say, and a pod whose limits are its requests is the last to be evicted.
        "resources": _quantities({"cpu": str(cpus), "memory": f"{memory_gib}Gi"}),
        "securityContext": container_security(),
        "volumeMounts": [
            {"name": "shared-mem", "mountPath": "/dev/shm"},
            {"name": _DISK, "mountPath": "/tmp"},
            *({"name": volume, "mountPath": path, "readOnly": True} for volume, _, path in secrets),
        ],
    }


def variables(values: ClusterValues) -> list[dict[str, Any]]:
    """Environment of a container that works: where everything lies, and what opens it."""
    found: list[dict[str, Any]] = [
        {"name": name, "value": value} for name, value in environment(values).items()
    ]
    if values.secrets.s3:
        found += [
            _from_secret(name, values.secrets.s3) for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
        ]
    if values.secrets.wandb:
        found.append(_from_secret("WANDB_API_KEY", values.secrets.wandb))
    return found


def _from_secret(name: str, secret: str) -> dict[str, Any]:
    return {"name": name, "valueFrom": {"secretKeyRef": {"name": secret, "key": name}}}


def _quantities(amounts: dict[str, str]) -> dict[str, Any]:
    return {"requests": dict(amounts), "limits": dict(amounts)}


def _pod(
    values: ClusterValues,
    instance: str,
    container: dict[str, Any],
    node: NodeValues | HeadValues,
    *,
    shm_bytes: int,
    serving: Serving | None,
) -> dict[str, Any]:
    secrets = serving.mounts if serving else []
    if "emptyDir" in _disk(node):
        # Otherwise the pod comes to a machine with less, and is evicted when it uses what it was promised.
        container["resources"]["requests"]["ephemeral-storage"] = f"{node.disk_gib}Gi"
    volumes: list[dict[str, Any]] = [
        {"name": "shared-mem", "emptyDir": {"medium": "Memory", "sizeLimit": str(shm_bytes)}},
        {"name": _DISK, **_disk(node)},
        *({"name": volume, "secret": {"secretName": secret}} for volume, secret, _ in secrets),
    ]
    spec = {
        "serviceAccountName": values.name,
        "securityContext": _pod_security(),
        "imagePullSecrets": _pull_secrets(values),
        "containers": [container],
        "volumes": volumes,
        "nodeSelector": dict(node.node_selector),
        "tolerations": [dict(toleration) for toleration in node.tolerations],
    }
    return {"metadata": {"labels": {INSTANCE: instance}}, "spec": without_empty(spec)}


def _disk(node: NodeValues | HeadValues) -> dict[str, Any]:
    size = f"{node.disk_gib}Gi"
    storage_class = node.disk_class if isinstance(node, NodeValues) else None
    if storage_class is None:
        return {"emptyDir": {"sizeLimit": size}}
    claim = {
        "accessModes": ["ReadWriteOnce"],
        "storageClassName": storage_class,
        "resources": {"requests": {"storage": size}},
    }
    return {"ephemeral": {"volumeClaimTemplate": {"spec": claim}}}
