"""Values of a cluster: sizes, image, bucket and names of secrets, from which every kind of cluster is rendered."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING


@dataclass
class ImageValues:
    """Image of every node, built from cluster/Dockerfile."""

    name: str | None = None
    """Registry and repository, without a tag."""
    tag: str | None = None
    """Tag of the image; one that is never moved, so that all nodes run the same."""
    pull_secret: str | None = None
    """Secret (docker-registry) to pull with; null: none is needed."""


@dataclass
class SecretValues:
    """Names of secrets of Kubernetes. Values hold no secret themselves; they exist in the cluster beforehand."""

    ray_token: str | None = None
    """Secret with Ray's token under `auth_token`; null: KubeRay makes one for each cluster."""
    s3: str | None = None
    """Secret with AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY; null: the nodes' own identity is used."""
    wandb: str | None = None
    """Secret with WANDB_API_KEY; null: W&B stays offline."""
    policy_tokens: str | None = None
    """Secret with the clients of the served policy under `tokens` (see docs/serving.md); null: no tokens are asked for."""


@dataclass
class NodeValues:
    """One type of node."""

    role: str = MISSING
    """decode | train: which work these nodes take."""
    cpus: int = MISSING
    """CPUs that Ray may use."""
    memory_gib: int = MISSING
    """GiB of memory, the object store included."""
    gpus: int = 0
    """GPUs."""
    min: int = 0
    """Nodes that stay when there is no work."""
    max: int = MISSING
    """Nodes at most."""
    spot: bool = False
    """Nodes that the cloud may take away at two minutes' notice."""
    preference: int = 0
    """Where several types fit, the one with the highest number is started first."""
    idle_s: int = 120
    """Seconds without work before a node is given back."""
    object_store: float = 0.3
    """Share of the memory for Ray's object store, which lies in /dev/shm."""
    disk_gib: int = 100
    """GiB for spilled objects, checkpoints on their way to the bucket, and logs; on Kubernetes its pod asks for as much."""
    disk_class: str | None = None
    """StorageClass of that disk on Kubernetes; null: the node's own disk (emptyDir)."""
    price: float | None = None
    """Price of a node per hour, in US dollars; for what runs cost."""
    node_selector: dict[str, str] = field(default_factory=dict)
    """Kubernetes: labels of the machines that may hold such a node."""
    tolerations: list[dict[str, Any]] = field(default_factory=list)
    """Kubernetes: taints of these machines that are accepted."""
    aws_type: str | None = None
    """`ray up`: instance type."""
    accelerator: str | None = None
    """SkyPilot: name of the GPU, such as H100."""


@dataclass
class HeadValues:
    """The head: schedules and holds the jobs' drivers, takes no other work."""

    cpus: int = 4
    """CPUs of its machine; Ray gives none of them to work."""
    memory_gib: int = 16
    """GiB of memory."""
    disk_gib: int = 50
    """GiB for logs and shipped code."""
    price: float | None = None
    """Price per hour, in US dollars."""
    node_selector: dict[str, str] = field(default_factory=dict)
    """Kubernetes: labels of the machines that may hold it; never spot ones."""
    tolerations: list[dict[str, Any]] = field(default_factory=list)
    """Kubernetes: taints of these machines that are accepted."""
    aws_type: str = "m7i.xlarge"
    """`ray up`: instance type."""


@dataclass
class JobValues:
    """One job, as on the command line."""

    job: str = MISSING
    """Name of the job: ingest_videos, encode_latents, pretrain, pretrain_gfdm, ..."""
    config: str | None = None
    """Its --config; a packaged one such as paper/pretrain.yaml, or a path within the image. null: none."""
    overrides: list[str] = field(default_factory=list)
    """Further dotted.key=value."""
    nodes: list[str] = field(default_factory=list)
    """KubeRay: types of node of its cluster; empty: all."""
    shared: bool = False
    """KubeRay, `ray up` (which has no other jobs): true: runs on the shared cluster; false: on one that ends with it."""
    retries: int = 20
    """KubeRay, Slurm: times that it is started again after its driver or head died; each goes on at the last checkpoint."""
    deadline_h: float | None = None
    """KubeRay: hours after which it is given up; null: never."""


@dataclass
class ServiceValues:
    """The served policy."""

    policy: str | None = None
    """Policy folder; null: nothing is served."""
    overrides: list[str] = field(default_factory=list)
    """Further dotted.key=value of jobs/serve_policy.py, such as replicas.max=4."""
    port: int = 8000
    """Port that clients use."""
    nodes: list[str] = field(default_factory=list)
    """Types of node of its cluster; their role has to be train. Empty: all."""
    tls_secret: str | None = None
    """Secret (tls) with the certificate for wss://; null: no encryption, or that of a gateway in front."""
    gateway_class: str | None = None
    """Gateway API class for upgrades in steps; null: an upgrade switches at once when the new cluster answers."""
    step_percent: int = 10
    """With a gateway: traffic that moves at a time, and room for replicas beyond those needed."""
    step_s: int = 60
    """With a gateway: seconds between two steps."""
    clients: list[dict[str, Any]] = field(default_factory=list)
    """Kubernetes: who may connect, as `from` of a NetworkPolicy; empty: everybody who reaches the port."""


@dataclass
class GcsValues:
    """Memory of the head (GCS): what lets the shared cluster and the service outlive their head."""

    backend: str = "none"
    """none | rocksdb (on a disk, KubeRay's gate GCSFaultToleranceEmbeddedStorage) | redis."""
    redis_address: str | None = None
    """redis: host:port, or redis:// and rediss:// URLs."""
    redis_secret: str | None = None
    """redis: secret with `password`; null: none is asked for."""
    disk_gib: int = 5
    """rocksdb: size of its disk."""
    disk_class: str | None = None
    """rocksdb: StorageClass; null: the cluster's default."""


@dataclass
class KubernetesValues:
    """What only KubeRay needs."""

    namespace: str = "defi"
    """Namespace of everything."""
    operator_namespace: str = "kuberay-operator"
    """Namespace of the KubeRay operator, which may call the dashboards."""
    monitoring_namespace: str | None = "monitoring"
    """Namespace of Prometheus, which may read the metrics; null: none."""
    feature_gates: list[str] = field(default_factory=list)
    """Gates beyond the default that the operator was started with: RayClusterNetworkPolicy, RayClusterMTLS, ..."""
    mtls: bool = False
    """Certificates between all pods, by cert-manager; needs the gate RayClusterMTLS."""
    identity: dict[str, str] = field(default_factory=dict)
    """Annotations of the service account: eks.amazonaws.com/role-arn, iam.gke.io/gcp-service-account, ..."""
    submitters: list[dict[str, Any]] = field(default_factory=list)
    """Who else may call the dashboard with the token, as `from` of a NetworkPolicy."""


@dataclass
class AwsValues:
    """What only `ray up` needs."""

    region: str = "us-west-2"
    """Region of the nodes, and of the bucket."""
    zones: str = "us-west-2a,us-west-2b"
    """Zones in which nodes may start, in this order."""
    ssh_user: str = "ubuntu"
    """User of the machine image."""
    machine_image: str | None = None
    """AMI with Docker and, for GPUs, NVIDIA's container toolkit; null: Ray's default for the region."""
    instance_profile: str | None = None
    """Name of the instance profile of all nodes: bucket, image and, for the head, to start, tag and end instances."""
    security_group: str | None = None
    """ID of the security group of all nodes (sg-...): everything within itself, port 22 from where you are."""


@dataclass
class SkypilotValues:
    """What only SkyPilot needs."""

    infra: str | None = None
    """aws, gcp/us-central1, k8s/context, ...; null: the cheapest that has what is needed."""
    nodes: str | None = None
    """Type of node; all nodes of a task are alike."""
    count: int = 1
    """Nodes of a task."""


@dataclass
class SlurmValues:
    """What only Slurm needs."""

    nodes: dict[str, int] = field(default_factory=dict)
    """Types of node and how many of each; the first holds the head, several make a heterogeneous job."""
    partitions: dict[str, str] = field(default_factory=dict)
    """Partition of each type; absent: Slurm's default."""
    account: str | None = None
    """Account that is charged."""
    hours: float = 24.0
    """Time limit; the job is queued again at its end and goes on."""
    setup: list[str] = field(default_factory=list)
    """Shell lines on every node that put `defi` and `ray` on the PATH: module load, source .venv/bin/activate."""
    gpus_per_node: str = "gpus-per-node"
    """Option of sbatch that asks for GPUs: gpus-per-node | gres."""


@dataclass
class ClusterValues:
    """Values of a cluster, for `python cluster/render.py kuberay|ray-up|skypilot|slurm`."""

    name: str = "defi"
    """Name of the cluster; those of jobs and of the service begin with it."""
    home: str = MISSING
    """DEFI_HOME: bucket or shared folder of corpora and runs."""
    env: dict[str, str] = field(default_factory=dict)
    """Environment of every process, such as AWS_REGION or AWS_ENDPOINT_URL; no secrets."""
    image: ImageValues = field(default_factory=ImageValues)
    secrets: SecretValues = field(default_factory=SecretValues)
    head: HeadValues = field(default_factory=HeadValues)
    nodes: dict[str, NodeValues] = field(default_factory=dict)
    """Types of node."""
    jobs: dict[str, JobValues] = field(default_factory=dict)
    """Jobs; the name is that of their objects."""
    service: ServiceValues = field(default_factory=ServiceValues)
    gcs: GcsValues = field(default_factory=GcsValues)
    kubernetes: KubernetesValues = field(default_factory=KubernetesValues)
    aws: AwsValues = field(default_factory=AwsValues)
    skypilot: SkypilotValues = field(default_factory=SkypilotValues)
    slurm: SlurmValues = field(default_factory=SlurmValues)
    output: str | None = None
    """Folder to write into; null: standard output."""
