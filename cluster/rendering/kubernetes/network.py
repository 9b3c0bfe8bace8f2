"""Who may connect to the pods of a Ray cluster: nobody from outside but those that are named."""

from __future__ import annotations

from typing import Any

from rendering.kubernetes.pods import HEAD_METRICS, INSTANCE, NODE_METRICS, Serving
from rendering.values import ClusterValues

Rule = dict[str, Any]
DASHBOARD = 8265
SUBMITTER = "ray.io/originated-from-cr-name"


def policies(values: ClusterValues, instance: str, serving: Serving | None) -> list[dict[str, Any]]:
    """NetworkPolicies of the pods of one object, for operators without the gate RayClusterNetworkPolicy.

    Args:
        values: of the cluster.
        instance: value of the pods' label `INSTANCE`.
        serving: of a service; None: it is none.
    """
    among = {"from": [{"podSelector": {"matchLabels": {INSTANCE: instance}}}]}
    # KubeRay labels the pods that hand jobs in with the name of their RayJob.
    submitter = _rule([{"podSelector": {"matchLabels": {SUBMITTER: instance}}}], DASHBOARD)
    parts = {
        "head": ("head", [among, submitter, *_head_rules(values, serving)]),
        "nodes": ("worker", [among, *_node_rules(values, serving)]),
    }
    return [
        {
            "apiVersion": "networking.k8s.io/v1",
            "kind": "NetworkPolicy",
            "metadata": {"name": f"{instance}-{part}", "namespace": values.kubernetes.namespace},
            "spec": {
                "podSelector": {"matchLabels": {INSTANCE: instance, "ray.io/node-type": kind}},
                "policyTypes": ["Ingress"],
                "ingress": rules,
            },
        }
        for part, (kind, rules) in parts.items()
    ]


def cluster_policy(values: ClusterValues, serving: Serving | None) -> dict[str, Any]:
    """The same as `networkPolicy` of a Ray cluster: KubeRay adds what goes on among its pods, and who hands jobs in.

    Args:
        values: of the cluster.
        serving: of a service; None: it is none.
    """
    parts = {"head": _head_rules(values, serving), "worker": _node_rules(values, serving)}
    rules = {part: {"ingressRules": rules} for part, rules in parts.items() if rules}
    # Outwards everything is open: buckets, W&B and the API of Kubernetes have addresses that no policy can name.
    return {"mode": "DenyAllIngress", **rules}


def _head_rules(values: ClusterValues, serving: Serving | None) -> list[Rule]:
    kubernetes = values.kubernetes
    rules = [_rule([_namespace(kubernetes.operator_namespace)], DASHBOARD)]
    supervised = [{"podSelector": {"matchLabels": {INSTANCE: f"{values.name}-supervisor"}}}]
    if any(job.shared for job in values.jobs.values()):
        rules.append(_rule(supervised, DASHBOARD))
    if kubernetes.submitters:
        rules.append(_rule(list(kubernetes.submitters), DASHBOARD))
    return [*rules, *_rules(values, serving, HEAD_METRICS)]


def _node_rules(values: ClusterValues, serving: Serving | None) -> list[Rule]:
    return _rules(values, serving, NODE_METRICS)


def _rules(values: ClusterValues, serving: Serving | None, metrics: dict[str, int]) -> list[Rule]:
    rules = []
    if values.kubernetes.monitoring_namespace:
        rules.append(_rule([_namespace(values.kubernetes.monitoring_namespace)], *metrics.values()))
    if serving:
        rules.append(_rule(list(values.service.clients), serving.port))
    return rules


def _rule(sources: list[dict[str, Any]], *ports: int) -> Rule:
    # Without `from` a rule is for everybody.
    allowed = [{"port": port, "protocol": "TCP"} for port in ports]
    return ({"from": sources} if sources else {}) | {"ports": allowed}


def _namespace(name: str) -> dict[str, Any]:
    return {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": name}}}
