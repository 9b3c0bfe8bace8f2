"""Objects for KubeRay: valid for Kubernetes and KubeRay, understood by Ray's own autoscaler and by Serve, and closed."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.serve.schema import ServeDeploySchema
from rendered import (
    RAY_KINDS,
    SHELLCHECK,
    VALUES,
    cluster_of,
    objects,
    of_kind,
    pods_of,
    validate,
)
from rendering.monitoring import POD_PORTS
from rendering.values import ClusterValues
from rendering.work import RAY_VERSION

from defi_platform.config import ServeConfig
from defi_platform.config.loader import from_mapping, load_config
from defi_platform.errors import MEND
from defi_platform.serve.app import nested
from defi_platform.supervise.command import _parser
from defi_platform.supervise.work import JOBS

GATES = "kubernetes.feature_gates=[RayClusterNetworkPolicy,RayClusterMTLS,GCSFaultToleranceEmbeddedStorage]"
VARIANTS = {
    "aws": ("aws.yaml",),
    "gke": ("gke.yaml",),
    "shared": ("shared.yaml",),
    "all gates": ("aws.yaml", GATES, "kubernetes.mtls=true", "gcs.backend=rocksdb", "gcs.disk_class=fast"),
    "disks and secrets": (
        "gke.yaml",
        "nodes.train.disk_class=nvme",
        "image.pull_secret=registry",
        "secrets.ray_token=ray-token",
        "service.tls_secret=policy-tls",
        "service.clients=[{namespaceSelector: {matchLabels: {robots: 'yes'}}}]",
        "kubernetes.submitters=[{ipBlock: {cidr: 10.0.0.0/8}}]",
        "jobs.pretrain.deadline_h=72",
    ),
    "no head kept": (
        "aws.yaml",
        "gcs.backend=none",
        "kubernetes.monitoring_namespace=null",
        "secrets.wandb=null",
    ),
}
ALL = pytest.mark.parametrize("variant", list(VARIANTS.values()), ids=list(VARIANTS))


@ALL
def test_every_object_is_valid_for_kubernetes_and_kuberay(variant: tuple[str, ...]) -> None:
    found = objects(*variant)
    assert {"Namespace", "ServiceAccount", "RayCluster", "RayService"} < {item["kind"] for item in found}
    # Those of KubeRay come last: their schemas may not be here.
    for item in sorted(found, key=lambda item: item["kind"] in RAY_KINDS):
        validate(item)


def test_the_check_of_objects_finds_a_key_that_does_not_exist() -> None:
    (cluster,) = of_kind("RayCluster", "aws.yaml").values()
    cluster["spec"]["workerGroupSpecs"][0]["idleTimeout"] = 60
    with pytest.raises(jsonschema.ValidationError, match="idleTimeout"):
        validate(cluster)


@ALL
def test_ray_s_autoscaler_reads_sizes_labels_and_limits(variant: tuple[str, ...]) -> None:
    for item in objects(*variant):
        if item["kind"] not in RAY_KINDS:
            continue
        cluster = {"metadata": item["metadata"], "spec": cluster_of(item)}
        types = _derive_autoscaling_config_from_ray_cr(cluster)["available_node_types"]
        head = types.pop("headgroup")
        assert head["resources"]["CPU"] == 0, "the head takes no work"
        most = {label: int(value) for label, value in head["labels"].items()}
        for role in ("decode", "train"):
            mine = [kind for kind in types.values() if kind["labels"]["defi.role"] == role]
            for resource in ("CPU", "GPU"):
                there = sum(kind["max_workers"] * kind["resources"].get(resource, 0) for kind in mine)
                assert most.get(f"defi.max.{role}.{resource}", 0) == there
        if "decode-spot" in types:
            assert types["decode-spot"]["resources"] == {"CPU": 30, "memory": 52 * 2**30}
            assert types["decode-spot"]["priority"] > types["decode"]["priority"], "spot nodes come first"
            assert types["decode-spot"]["labels"]["ray.io/market-type"] == "spot"
        if "train" in types:
            assert types["train"]["resources"]["GPU"] == 8
            assert types["train"]["idle_timeout_s"] == 300


# CPUs and GiB of the machines that the values name.
MACHINES = {
    "m7i.xlarge": (4, 16),
    "c7i.8xlarge": (32, 64),
    "p5.48xlarge": (192, 2048),
    "g6.4xlarge": (16, 64),
    "nvidia-h100-80gb": (208, 1872e9 / 2**30),
}


@pytest.mark.parametrize("config", ["aws.yaml", "gke.yaml"])
def test_pods_fit_on_the_machines_that_are_meant_for_them(config: str) -> None:
    values = load_config(ClusterValues, VALUES / config)
    for node in (*values.nodes.values(), values.head):
        machine = node.node_selector.get("cloud.google.com/gke-accelerator", node.aws_type)
        if machine not in MACHINES:
            continue
        cpus, gib = MACHINES[machine]
        beside = 0.2 if node is values.head else 0.0  # the autoscaler
        assert node.cpus + beside <= cpus * 0.97 - 0.2
        # Karpenter's estimate of a machine's memory is 7.5 % less; then Kubernetes and its daemons.
        assert node.memory_gib + 2.5 * beside <= gib * 0.925 - min(4.0, 0.02 * gib + 0.8)


@ALL
def test_pods_are_admitted_at_kubernetes_level_restricted(variant: tuple[str, ...]) -> None:
    (namespace,) = of_kind("Namespace", *variant).values()
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    pods = [pod["spec"] for item in objects(*variant) for pod in pods_of(item)]
    assert pods
    for pod in pods:
        assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] > 0
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in pod["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        kinds = {kind for volume in pod.get("volumes", []) for kind in volume if kind != "name"}
        assert kinds <= {"emptyDir", "ephemeral", "secret"}
    for item in objects(*variant):
        if item["kind"] in RAY_KINDS:
            # KubeRay's containers beside ours: the autoscaler takes this one, the waiting ones copy that of the node.
            options = cluster_of(item)["autoscalerOptions"]
            assert options["securityContext"]["capabilities"] == {"drop": ["ALL"]}


@ALL
def test_tokens_are_on_everywhere_and_no_value_is_a_secret(variant: tuple[str, ...]) -> None:
    for item in objects(*variant):
        if item["kind"] in RAY_KINDS:
            assert cluster_of(item)["authOptions"]["mode"] == "token"
            assert cluster_of(item)["rayVersion"] == RAY_VERSION
        for pod in pods_of(item):
            for container in pod["spec"]["containers"]:
                for variable in container.get("env", []):
                    if re.search(r"KEY|TOKEN|SECRET|PASSWORD", variable["name"]):
                        assert "secretKeyRef" in variable["valueFrom"], variable["name"]


@ALL
def test_every_job_is_one_that_exists_and_its_config_fits(variant: tuple[str, ...], job_configs: Any) -> None:
    commands = [shlex.split(item["spec"]["entrypoint"]) for item in of_kind("RayJob", *variant).values()]
    commands += [
        item["spec"]["template"]["spec"]["containers"][0]["command"]
        for item in of_kind("Job", *variant).values()
    ]
    assert len(commands) >= 5
    for program, *rest in commands:
        assert program == "defi"
        if rest[0] == "supervise":
            options = _parser("").parse_args(rest[1:])
            assert options.address == "http://defi-head-svc:8265" and options.job in JOBS
            rest = [options.job, *options.arguments]
        job_configs(rest)


@ALL
def test_disks_are_asked_for_where_they_are_the_machine_s_own(variant: tuple[str, ...]) -> None:
    for item in objects(*variant):
        for pod in pods_of(item):
            container, volumes = pod["spec"]["containers"][0], pod["spec"].get("volumes", [])
            own = [v["emptyDir"] for v in volumes if "emptyDir" in v and "medium" not in v["emptyDir"]]
            sizes = [int(v["sizeLimit"].removesuffix("Gi")) for v in own]
            asked = container["resources"]["requests"].get("ephemeral-storage")
            assert asked == (f"{max(sizes)}Gi" if sizes else None)
        if item["kind"] in RAY_KINDS:
            head = pods_of(item)[0]["spec"]
            # KubeRay shares this folder with the autoscaler: by itself with a volume of any size.
            assert {"name": "ray-logs", "mountPath": "/tmp/ray"} in head["containers"][0]["volumeMounts"]


def test_a_job_s_cluster_is_lost_with_its_head_and_the_job_tried_again() -> None:
    for job in of_kind("RayJob", "aws.yaml").values():
        assert job["spec"]["backoffLimit"] == 20
        assert "clusterSelector" not in job["spec"], "KubeRay refuses retries there"
        assert "gcsFaultToleranceOptions" not in cluster_of(job)
        assert "shutdownAfterJobFinishes" not in job["spec"], "KubeRay refuses it beside deletion rules"
        rules = job["spec"]["deletionStrategy"]["deletionRules"]
        times = {
            (str(sorted(r["condition"].items())[0]), r["policy"]): r["condition"]["ttlSeconds"] for r in rules
        }
        assert len(times) == len(rules)
        assert max(s for (_, policy), s in times.items() if policy == "DeleteCluster") <= min(
            s for (_, policy), s in times.items() if policy == "DeleteSelf"
        )


def test_the_shared_cluster_and_the_service_outlive_their_head() -> None:
    for kind in ("RayCluster", "RayService"):
        (item,) = of_kind(kind, "aws.yaml").values()
        redis = cluster_of(item)["gcsFaultToleranceOptions"]
        assert redis["redisAddress"] == "defi-redis:6379"
        assert redis["redisPassword"]["valueFrom"]["secretKeyRef"]["name"] == "defi-redis"
        (item,) = of_kind(kind, *VARIANTS["all gates"]).values()
        disk = cluster_of(item)["gcsFaultToleranceOptions"]
        assert disk == {"backend": "rocksdb", "storage": {"size": "5Gi", "storageClassName": "fast"}}


def test_jobs_of_the_shared_cluster_have_a_supervisor_that_stops_at_mistakes() -> None:
    jobs = of_kind("Job", "shared.yaml")
    assert len(jobs) == 5 and not of_kind("RayJob", "shared.yaml")
    (cluster,) = of_kind("RayCluster", "shared.yaml")
    for job in jobs.values():
        rules = job["spec"]["podFailurePolicy"]["rules"]
        assert rules[0] == {"action": "FailJob", "onExitCodes": {"operator": "In", "values": [MEND]}}
        (container,) = job["spec"]["template"]["spec"]["containers"]
        env = {variable["name"]: variable for variable in container["env"]}
        assert env["RAY_AUTH_TOKEN"]["valueFrom"]["secretKeyRef"] == {"name": cluster, "key": "auth_token"}


def test_the_policy_is_served_by_our_listeners_alone() -> None:
    for variant in (("aws.yaml",), VARIANTS["disks and secrets"]):
        (service,) = of_kind("RayService", *variant).values()
        config = ServeDeploySchema.model_validate(yaml.safe_load(service["spec"]["serveConfigV2"]))
        assert config.proxy_location == "Disabled"
        (application,) = config.applications
        # `build_app` takes Serve's own name for the application that it is asked for without a command line.
        assert application.name == "default"
        assert application.import_path == "defi_platform.serve.app:build_app"
        settings = from_mapping(ServeConfig, nested(application.args), "serveConfigV2")
        assert (settings.host, settings.port, settings.replica_gpus) == ("0.0.0.0", 8000, 1)
        head, *groups = [pod["spec"]["containers"][0] for pod in pods_of(service)]
        for container in (head, *groups):
            # KubeRay finds the port by this name, on the head for its Service, on nodes for their readiness.
            assert {"name": "serve", "containerPort": 8000} in container["ports"]
            mounted = {mount["mountPath"] for mount in container["volumeMounts"]}
            assert {"/etc/defi/tokens" for _ in [1] if settings.security.tokens} <= mounted
        for container in groups:
            probe = container["readinessProbe"]["httpGet"]
            assert probe["path"] == "/healthz"
            assert probe["scheme"] == ("HTTPS" if settings.security.tls_cert else "HTTP")


def test_prometheus_reaches_the_ports_that_its_configuration_names() -> None:
    (cluster,) = of_kind("RayCluster", "aws.yaml").values()
    named = [
        {port["name"]: port["containerPort"] for port in pod["spec"]["containers"][0]["ports"]}
        for pod in pods_of(cluster)
    ]
    assert set(POD_PORTS) <= named[0].keys() and POD_PORTS[0] in named[1]
    for part, ports in (("head", POD_PORTS), ("nodes", POD_PORTS[:1])):
        rules = of_kind("NetworkPolicy", "aws.yaml")[f"defi-{part}"]["spec"]["ingress"]
        (open_to,) = [rule for rule in rules if "monitoring" in str(rule["from"])]
        assert {port["port"] for port in open_to["ports"]} == {named[0][name] for name in ports}


def test_an_upgrade_goes_in_steps_where_there_is_a_gateway() -> None:
    (service,) = of_kind("RayService", "gke.yaml").values()
    strategy = service["spec"]["upgradeStrategy"]
    assert strategy["type"] == "NewClusterWithIncrementalUpgrade"
    options = strategy["clusterUpgradeOptions"]
    assert options["stepSizePercent"] <= options["maxSurgePercent"]
    (service,) = of_kind("RayService", "aws.yaml").values()
    assert service["spec"]["upgradeStrategy"] == {"type": "NewCluster"}


def test_nothing_reaches_a_cluster_but_the_operator_prometheus_and_clients_of_the_policy() -> None:
    found = of_kind("NetworkPolicy", "aws.yaml")
    assert len(found) == 2 * 9, "a cluster, seven jobs and a service"
    for policy in found.values():
        assert policy["spec"]["policyTypes"] == ["Ingress"]
        among, *others = policy["spec"]["ingress"]
        assert among["from"][0]["podSelector"] and "ports" not in among
        open_ports = [rule["ports"][0]["port"] for rule in others if "from" not in rule]
        is_service = policy["metadata"]["name"].startswith("defi-policy")
        assert open_ports == ([8000] if is_service else [])
    assert not of_kind("NetworkPolicy", *VARIANTS["all gates"]), "there KubeRay makes them"
    for item in objects(*VARIANTS["all gates"]):
        if item["kind"] in RAY_KINDS:
            cluster = cluster_of(item)
            assert cluster["networkPolicy"]["mode"] == "DenyAllIngress"
            assert cluster["tlsOptions"] == {"enabled": True}


@pytest.mark.parametrize(
    ("titles", "waits"),
    [
        (["ray::IDLE", "ray::DashboardAgent", "ray::RuntimeEnvAgent", "ray::MapBatches", "/bin/bash"], False),
        (["ray::IDLE", "ray::RayTrainWorker.execute"], True),
        (["ray::ServeReplica:default:PolicyReplica"], True),
    ],
)
def test_a_pod_that_is_taken_away_waits_for_trainings_and_replicas(
    tmp_path: Path, titles: list[str], waits: bool
) -> None:
    (cluster,) = of_kind("RayCluster", "aws.yaml").values()
    for pod in pods_of(cluster)[1:]:
        assert pod["spec"]["terminationGracePeriodSeconds"] > 90
        program, option, script = pod["spec"]["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
        assert (program, option) == ("/bin/bash", "-c")
    checked = subprocess.run([SHELLCHECK, "--shell=bash", "-"], input=script, text=True, capture_output=True)
    assert checked.returncode == 0, checked.stdout
    # The same script among other processes, and with a notice that is taken note of.
    for number, title in enumerate(titles):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "cmdline").write_bytes(f"{title}\0".encode())
    for name, lines in {"ray": "echo notice", "sleep": f"echo waits; rm -r {tmp_path}/[0-9]*"}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{lines}\n")
        (tmp_path / name).chmod(0o755)
    ran = subprocess.run(
        [program, option, script.replace("/proc/", f"{tmp_path}/")],
        env={"PATH": f"{tmp_path}:{os.environ['PATH']}", "RAY_ADDRESS": "head:6379"},
        capture_output=True,
        text=True,
    )
    assert ran.stdout.split() == ["notice", *(["waits"] if waits else [])], ran.stderr
