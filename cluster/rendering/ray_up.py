"""Cluster file of `ray up` for AWS: nodes from an image, tokens, spot workers, the security group of the values."""

from __future__ import annotations

import re
import shlex
from typing import Any

import yaml

from rendering.values import ClusterValues, JobValues, NodeValues
from rendering.work import (
    GIB,
    arguments,
    environment,
    head_labels,
    node_labels,
    object_store_bytes,
    resources,
)

HEAD = "head"
TOKEN = "~/.ray/auth_token"
SUPERVISE_LOG = "/tmp/ray/supervise-{name}.log"


def render(values: ClusterValues) -> dict[str, str]:
    """File name -> YAML."""
    return {"ray-up.yaml": yaml.safe_dump(_cluster(values), sort_keys=False, width=110)}


def _cluster(values: ClusterValues) -> dict[str, Any]:
    aws = values.aws
    return {
        "cluster_name": values.name,
        "max_workers": sum(node.max for node in values.nodes.values()),
        "upscaling_speed": 100.0,
        "idle_timeout_minutes": 5,
        "docker": {
            "image": f"{values.image.name}:{values.image.tag}",
            "container_name": values.name,
            "pull_before_run": True,
            # As root in the container: ray up copies files into it and changes their owner.
            "run_options": ["--user=root", "--ulimit=nofile=65536:65536"],
        },
        "provider": {
            "type": "aws",
            "region": aws.region,
            "availability_zone": aws.zones,
            "cache_stopped_nodes": False,
            "use_internal_ips": False,
        },
        "auth": {"ssh_user": aws.ssh_user},
        "head_node_type": HEAD,
        "available_node_types": {
            HEAD: {
                "resources": {"CPU": 0},
                "labels": head_labels(values.nodes),
                "node_config": _machine(values, values.head.aws_type, values.head.disk_gib, spot=False),
            },
            **{name: _type(values, node) for name, node in values.nodes.items()},
        },
        # The head gives it on to the nodes. `ray get-auth-token --generate` makes one.
        "file_mounts": {TOKEN: TOKEN},
        "initialization_commands": _pull_rights(values),
        # All that is needed is in the image.
        **{f"{part}setup_commands": [] for part in ("", "head_", "worker_")},
        "head_start_ray_commands": [
            "ray stop",
            _exported(values)
            + "export RAY_enable_autoscaler_v2=1; ulimit -n 65536; ray start --head --port=6379 --num-cpus=0 "
            "--dashboard-host=127.0.0.1 --autoscaling-config=~/ray_bootstrap_config.yaml",
            *(_supervised(values, name, job) for name, job in values.jobs.items() if job.shared),
        ],
        "worker_start_ray_commands": [
            "ray stop",
            _exported(values) + 'ulimit -n 65536; ray start --address="$RAY_HEAD_IP":6379',
        ],
    }


def _type(values: ClusterValues, node: NodeValues) -> dict[str, Any]:
    assert node.aws_type is not None
    return {
        "min_workers": node.min,
        "max_workers": node.max,
        "idle_timeout_s": node.idle_s,
        "priority": node.preference,
        # Without memory: the operating system takes some of an instance's, and Ray sees how much is left.
        "resources": {
            **{name: amount for name, amount in resources(node).items() if name != "memory"},
            "object_store_memory": object_store_bytes(node),
        },
        "labels": node_labels(node),
        # DeepSpeed and NCCL use /dev/shm besides.
        "docker": {"worker_run_options": [f"--shm-size={object_store_bytes(node) + 2 * GIB}b"]},
        "node_config": _machine(values, node.aws_type, node.disk_gib, spot=node.spot),
    }


def _machine(values: ClusterValues, kind: str, disk_gib: int, *, spot: bool) -> dict[str, Any]:
    aws = values.aws
    disk = {"VolumeSize": disk_gib + 50, "VolumeType": "gp3", "Encrypted": True}
    config: dict[str, Any] = {
        "InstanceType": kind,
        "BlockDeviceMappings": [{"DeviceName": "/dev/sda1", "Ebs": disk}],
        "IamInstanceProfile": {"Name": aws.instance_profile},
        # Groups that Ray makes by itself have port 22 open to everybody, whatever further rules they are given.
        "SecurityGroupIds": [aws.security_group],
        # The credentials of an instance are out of reach for whoever can make it send a plain request.
        "MetadataOptions": {"HttpTokens": "required", "HttpPutResponseHopLimit": 2},
    }
    if aws.machine_image:
        config["ImageId"] = aws.machine_image
    if spot:
        config["InstanceMarketOptions"] = {"MarketType": "spot"}
    return config


def _exported(values: ClusterValues) -> str:
    variables = {"RAY_AUTH_MODE": "token", **environment(values)}
    return "".join(f"export {name}={shlex.quote(value)}; " for name, value in variables.items())


def _supervised(values: ClusterValues, name: str, job: JobValues) -> str:
    command = shlex.join(["defi", "supervise", "--address", "http://127.0.0.1:8265", *arguments(job)])
    log = shlex.quote(SUPERVISE_LOG.format(name=name))
    return f"{_exported(values)}nohup {command} >>{log} 2>&1 </dev/null &"


def _pull_rights(values: ClusterValues) -> list[str]:
    """Commands that let a machine pull the image: those of Amazon's registry go by the instance's role."""
    registry = str(values.image.name).split("/")[0]
    found = re.fullmatch(r"\d+\.dkr\.ecr\.([-a-z0-9]+)\.amazonaws\.com", registry)
    if found is None:
        return []
    password = f"aws ecr get-login-password --region {found[1]}"
    return [f"{password} | docker login --username AWS --password-stdin {registry}"]
