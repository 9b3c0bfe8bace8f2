"""Probe of one node: an actor without CPUs that makes the checks there."""

from __future__ import annotations

import time

from defi_platform.errors import ServeError, one_line
from defi_platform.preflight.folders import Access, try_reading, try_writing
from defi_platform.preflight.machine import Machine, measure
from defi_platform.serve.deployment.startup_checks import resolve_port


class Probe:
    """Checks of the node that this actor runs on; each method is one."""

    def machine(self, with_gpus: bool) -> Machine:
        """Figures of the machine; those of GPUs take seconds."""
        return measure(with_gpus)

    def now(self) -> float:
        """Unix time by this node's clock."""
        return time.time()

    def asks_for_token(self) -> bool:
        """Whether Ray's processes here ask for its token."""
        from ray._private.authentication.authentication_utils import is_token_auth_enabled

        return is_token_auth_enabled()

    def write(self, test_folder: str, mib: int) -> Access:
        """Writes to a folder, see `try_writing`."""
        return try_writing(test_folder, mib)

    def read(self, folder: str, mib: int) -> Access:
        """Reads from a folder, see `try_reading`."""
        return try_reading(folder, mib)

    def port_problem(self, host: str, port: int) -> str:
        """Says why this node cannot listen on a port; "" where it can."""
        try:
            resolve_port(host, port)
        except ServeError as error:
            return one_line(error)
        return ""
