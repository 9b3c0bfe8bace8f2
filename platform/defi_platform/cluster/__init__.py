"""Connection of a job to its Ray cluster."""

from __future__ import annotations

from defi_platform.cluster.session import STARTS, ClusterError, ray_session, source_roots

__all__ = ["STARTS", "ClusterError", "ray_session", "source_roots"]
