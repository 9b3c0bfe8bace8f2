"""Connection of a job to its Ray cluster."""

from __future__ import annotations

from defi_platform.cluster.connection_errors import ClusterError, ClusterUnavailable
from defi_platform.cluster.session import STARTS, ray_session, source_roots

__all__ = ["STARTS", "ClusterError", "ClusterUnavailable", "ray_session", "source_roots"]
