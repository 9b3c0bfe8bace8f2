"""Lines of shell that several kinds of cluster share."""

from __future__ import annotations

import shlex

from rendering.values import ClusterValues
from rendering.work import environment


def exports(values: ClusterValues) -> str:
    """Lines that set the environment of Ray's processes and of jobs, with token authentication on."""
    variables = {"RAY_AUTH_MODE": "token", **environment(values)}
    return "\n".join(f"export {name}={shlex.quote(value)}" for name, value in variables.items())
