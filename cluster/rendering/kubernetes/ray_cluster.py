"""The specification of a Ray cluster on KubeRay, which RayCluster, RayJob and RayService have in common."""

from __future__ import annotations

from typing import Any

from rendering.kubernetes.network import cluster_policy
from rendering.kubernetes.pods import HEAD_OBJECT_STORE, Serving, container_security, head_pod, worker_pod
from rendering.values import ClusterValues, NodeValues
from rendering.work import RAY_VERSION, head_labels, node_labels, object_store_bytes, without_empty

MARKET = "ray.io/market-type"
"""Ray's own label of a node: spot or on-demand."""


def cluster_spec(
    values: ClusterValues,
    instance: str,
    nodes: dict[str, NodeValues],
    *,
    outlives_head: bool,
    serving: Serving | None = None,
) -> dict[str, Any]:
    """The `RayClusterSpec` of KubeRay.

    Args:
        values: of the cluster.
        instance: name of the object that it belongs to.
        nodes: types of node.
        outlives_head: keeps the state of the head outside of it, as `gcs` says. A job's own cluster does without: when
            its head is lost so is the job's driver, and the next try goes on at the last checkpoint.
        serving: of a service; None: it is none.
    """
    kubernetes = values.kubernetes
    return without_empty(
        {
            "rayVersion": RAY_VERSION,
            "enableInTreeAutoscaling": True,
            "autoscalerOptions": {
                "version": "v2",
                "upscalingMode": "Default",
                "securityContext": container_security(),
                "resources": {
                    "requests": {"cpu": "200m", "memory": "512Mi"},
                    "limits": {"cpu": "1", "memory": "1Gi"},
                },
            },
            "authOptions": without_empty({"mode": "token", "secretName": values.secrets.ray_token}),
            "gcsFaultToleranceOptions": _fault_tolerance(values) if outlives_head else None,
            "tlsOptions": {"enabled": True} if kubernetes.mtls else None,
            "networkPolicy": cluster_policy(values, serving) if operator_isolates(values) else None,
            "headGroupSpec": {
                "labels": head_labels(nodes),
                "rayStartParams": {
                    # No work on the head: it holds the jobs' drivers and the state of the cluster.
                    "num-cpus": "0",
                    "dashboard-host": "0.0.0.0",
                    "object-store-memory": str(HEAD_OBJECT_STORE),
                },
                "template": head_pod(values, instance, serving),
            },
            "workerGroupSpecs": [
                _group(values, instance, name, node, serving) for name, node in nodes.items()
            ],
        }
    )


def operator_isolates(values: ClusterValues) -> bool:
    """Whether KubeRay makes the NetworkPolicies; otherwise they are rendered beside the cluster."""
    return "RayClusterNetworkPolicy" in values.kubernetes.feature_gates


def _group(
    values: ClusterValues, instance: str, name: str, node: NodeValues, serving: Serving | None
) -> dict[str, Any]:
    return {
        "groupName": name,
        "minReplicas": node.min,
        "maxReplicas": node.max,
        "replicas": node.min,
        "idleTimeoutSeconds": node.idle_s,
        "priority": node.preference,
        "labels": {**node_labels(node), MARKET: "spot" if node.spot else "on-demand"},
        "rayStartParams": {"object-store-memory": str(object_store_bytes(node))},
        "template": worker_pod(values, instance, node, serving),
    }


def _fault_tolerance(values: ClusterValues) -> dict[str, Any] | None:
    gcs = values.gcs
    if gcs.backend == "rocksdb":
        storage = without_empty({"size": f"{gcs.disk_gib}Gi", "storageClassName": gcs.disk_class})
        return {"backend": "rocksdb", "storage": storage}
    if gcs.backend == "redis":
        secret = gcs.redis_secret
        password = {"valueFrom": {"secretKeyRef": {"name": secret, "key": "password"}}} if secret else None
        return without_empty(
            {"backend": "redis", "redisAddress": gcs.redis_address, "redisPassword": password}
        )
    return None
