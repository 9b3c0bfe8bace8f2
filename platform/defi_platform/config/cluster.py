"""Connection to the Ray cluster."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class RayConfig:
    """Connection of a job to its Ray cluster."""

    address: str | None = None
    """Address of the cluster; null joins the cluster the job was submitted to, or starts one on this machine."""
    local_cpus: int | None = None
    """Logical CPUs of a cluster started here; null: one per core, at least four, since train workers,
    decoders and simulators each hold a share."""
    roles: bool = True
    """Decoding, ingest and simulators run on nodes with the Ray label defi.role=decode, training, encoding and served
    policies on those with defi.role=train, where a cluster has such nodes; off: everything runs on any node."""
