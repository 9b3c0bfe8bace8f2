"""Objects for KubeRay 1.7: the shared cluster, one RayJob for each job, and the service of a policy."""

from __future__ import annotations

import shlex
from typing import Any

import yaml

from defi_platform.errors import MEND
from rendering.kubernetes.network import policies
from rendering.kubernetes.pods import CERTIFICATE, INSTANCE, TOKENS, Serving, client_pod, variables
from rendering.kubernetes.ray_cluster import cluster_spec, operator_isolates
from rendering.values import ClusterValues, JobValues
from rendering.work import arguments, chosen, command, without_empty

HOUR_S = 3600
KEEP_JOB_S = 7 * 24 * HOUR_S
WARM_UP_S = 1800
"""Seconds in which a new service has to answer: nodes start, images are pulled, policies compiled."""


_DUMPER = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
"""Many times as quick where PyYAML has it."""


def render(values: ClusterValues) -> dict[str, str]:
    """File name -> YAML."""
    files = {"namespace.yaml": _foundation(values), "cluster.yaml": _shared(values)}
    for name, job in values.jobs.items():
        files[f"job-{name}.yaml"] = (
            [_supervised(values, name, job)] if job.shared else _job(values, name, job)
        )
    if values.service.policy is not None:
        files["service.yaml"] = _service(values)
    return {
        name: yaml.dump_all(objects, Dumper=_DUMPER, sort_keys=False, width=110)
        for name, objects in files.items()
    }


def _foundation(values: ClusterValues) -> list[dict[str, Any]]:
    levels = {f"pod-security.kubernetes.io/{mode}": "restricted" for mode in ("enforce", "warn")}
    namespace = values.kubernetes.namespace
    account = _metadata(values, values.name) | {"annotations": dict(values.kubernetes.identity)}
    return [
        {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace, "labels": levels}},
        {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": without_empty(account)},
    ]


def _shared(values: ClusterValues) -> list[dict[str, Any]]:
    spec = cluster_spec(values, values.name, values.nodes, outlives_head=True)
    return [_ray(values, "RayCluster", values.name, spec), *_policies(values, values.name, None)]


def _job(values: ClusterValues, name: str, job: JobValues) -> list[dict[str, Any]]:
    name = f"{values.name}-{name}"
    spec = {
        "entrypoint": shlex.join(command(job)),
        "backoffLimit": job.retries,
        # A submitter that loses the head asks again, so that a short absence costs no retry.
        "submitterConfig": {"backoffLimit": 5},
        "submitterPodTemplate": {"spec": client_pod(values, "ray-job-submitter", [], [])},
        "activeDeadlineSeconds": round(job.deadline_h * HOUR_S) if job.deadline_h else None,
        "deletionStrategy": {"deletionRules": _deletion()},
        "rayClusterSpec": cluster_spec(values, name, chosen(values, job.nodes), outlives_head=False),
    }
    return [_ray(values, "RayJob", name, without_empty(spec)), *_policies(values, name, None)]


def _deletion() -> list[dict[str, Any]]:
    """Nodes go when the job is over, its log an hour after a failure, the object itself after a week."""
    waits = [
        ({"jobStatus": "SUCCEEDED"}, 60),
        ({"jobStatus": "FAILED"}, HOUR_S),
        # The job never reached Ray: no image, no such node, ...
        ({"jobDeploymentStatus": "Failed"}, HOUR_S),
    ]
    return [
        {"condition": {**condition, "ttlSeconds": seconds}, "policy": policy}
        for condition, cluster_s in waits
        for policy, seconds in (("DeleteCluster", cluster_s), ("DeleteSelf", KEEP_JOB_S))
    ]


def _supervised(values: ClusterValues, name: str, job: JobValues) -> dict[str, Any]:
    """A Kubernetes Job that hands a job in to the shared cluster until it is complete; RayJobs do not retry there."""
    name = f"{values.name}-{name}"
    address = f"http://{values.name}-head-svc:8265"
    token = {"name": values.secrets.ray_token or values.name, "key": "auth_token"}
    # It looks into the run's folder for progress, so it may read the bucket, too.
    env = [
        *variables(values),
        {"name": "RAY_AUTH_MODE", "value": "token"},
        {"name": "RAY_AUTH_TOKEN", "valueFrom": {"secretKeyRef": token}},
    ]
    supervise = ["defi", "supervise", "--address", address, *arguments(job)]
    pod = {"serviceAccountName": values.name, **client_pod(values, "supervisor", supervise, env)}
    spec = {
        "backoffLimit": job.retries,
        "activeDeadlineSeconds": round(job.deadline_h * HOUR_S) if job.deadline_h else None,
        "ttlSecondsAfterFinished": KEEP_JOB_S,
        "podFailurePolicy": {
            "rules": [
                {"action": "FailJob", "onExitCodes": {"operator": "In", "values": [MEND]}},
                {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
            ]
        },
        "template": {"metadata": {"labels": {INSTANCE: f"{values.name}-supervisor"}}, "spec": pod},
    }
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": _metadata(values, name),
        "spec": without_empty(spec),
    }


def _service(values: ClusterValues) -> list[dict[str, Any]]:
    service = values.service
    name = f"{values.name}-policy"
    serving = Serving(service.port, values.secrets.policy_tokens, service.tls_secret)
    security = {
        "security.tokens": f"{TOKENS}/tokens" if serving.tokens_secret else None,
        "security.tls_cert": f"{CERTIFICATE}/tls.crt" if serving.tls_secret else None,
        "security.tls_key": f"{CERTIFICATE}/tls.key" if serving.tls_secret else None,
    }
    settings = without_empty({"policy": service.policy, "host": "0.0.0.0", "port": service.port, **security})
    for override in service.overrides:
        key, _, value = override.partition("=")
        settings[key] = yaml.safe_load(value)
    serve = {
        # The listeners of docs/serving.md take connections, not Serve's proxies.
        "proxy_location": "Disabled",
        "applications": [
            {
                "name": "default",
                "route_prefix": "/",
                "import_path": "defi_platform.serve.app:build_app",
                "args": settings,
            }
        ],
    }
    upgrade: dict[str, Any] = {"type": "NewCluster"}
    if service.gateway_class:
        options = {
            "gatewayClassName": service.gateway_class,
            "stepSizePercent": service.step_percent,
            "maxSurgePercent": service.step_percent,
            "intervalSeconds": service.step_s,
        }
        upgrade = {"type": "NewClusterWithIncrementalUpgrade", "clusterUpgradeOptions": options}
    spec = {
        "serveConfigV2": yaml.safe_dump(serve, sort_keys=False),
        "upgradeStrategy": upgrade,
        "excludeHeadPodFromServeSvc": True,
        "rayClusterConfig": cluster_spec(
            values, name, chosen(values, service.nodes), outlives_head=True, serving=serving
        ),
    }
    policy = _ray(values, "RayService", name, spec)
    policy["metadata"]["annotations"] = {"ray.io/initializing-timeout": f"{WARM_UP_S}s"}
    return [policy, *_policies(values, name, serving)]


def _policies(values: ClusterValues, instance: str, serving: Serving | None) -> list[dict[str, Any]]:
    return [] if operator_isolates(values) else policies(values, instance, serving)


def _ray(values: ClusterValues, kind: str, name: str, spec: dict[str, Any]) -> dict[str, Any]:
    return {"apiVersion": "ray.io/v1", "kind": kind, "metadata": _metadata(values, name), "spec": spec}


def _metadata(values: ClusterValues, name: str) -> dict[str, Any]:
    return {"name": name, "namespace": values.kubernetes.namespace, "labels": {INSTANCE: name}}
