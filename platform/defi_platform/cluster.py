"""How a job reaches Ray: it joins the cluster it was submitted to, or starts one on this machine."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import ray

from defi_platform.config import RayConfig
from defi_platform.errors import UserError


class ClusterError(UserError):
    """A Ray cluster that cannot be reached or lacks what a job asks for."""


@contextlib.contextmanager
def ray_session(config: RayConfig) -> Iterator[None]:
    """Connects to Ray for the length of a job; an already connected process is left as it is.

    The address comes from `config.address`, else from RAY_ADDRESS (which `ray job submit` sets); without
    either a cluster is started here and stopped at the end.

    Raises: ClusterError when the named cluster does not answer.
    """
    if ray.is_initialized():
        yield
        return
    address = config.address or os.environ.get("RAY_ADDRESS")
    if address:
        try:
            ray.init(address=address, log_to_driver=True)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise ClusterError(
                f"no Ray cluster answers at {address}: {error}. "
                "Start one with `ray start --head`, or leave out ray.address (and RAY_ADDRESS) to run here."
            ) from error
    else:
        # Train workers, decoders and simulators each hold a share of a CPU, so a two-core machine
        # needs more logical CPUs than it has cores.
        cpus = config.local_cpus or max(4, os.cpu_count() or 1)
        ray.init(address="local", num_cpus=cpus, include_dashboard=False)
    try:
        yield
    finally:
        ray.shutdown()
