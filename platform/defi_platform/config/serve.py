"""Serving of a policy."""

from __future__ import annotations

from dataclasses import dataclass, field

from omegaconf import MISSING

from defi_platform.config.cluster import RayConfig
from defi_platform.config.fields import PATH


@dataclass
class ServeConfig:
    """Serving of a policy over websockets (jobs/serve_policy.py)."""

    ray: RayConfig = field(default_factory=RayConfig)
    policy: str = field(default=MISSING, metadata=PATH)
    """Policy folder; serving needs nothing else."""
    host: str = "127.0.0.1"
    """Address the gateway listens on; 0.0.0.0: all interfaces."""
    port: int = 8000
    """TCP port; 0 picks a free one."""
    replicas: int = 1
    """Copies of the policy that answer in parallel."""
    replica_cpus: float = 1.0
    """Logical CPUs per replica."""
    replica_gpus: float = 0.0
    """GPUs per replica; may be a fraction."""
    max_batch_size: int = 8
    """Observations of different clients in one forward pass, at most."""
    max_connections: int = 1000
    """Open websockets per gateway replica, at most."""
    threads: int | None = None
    """Torch threads per replica; null: torch's default."""
