"""The end of a job's actors."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import Any

import ray
from ray.exceptions import RaySystemError


def kill_all(actors: Iterable[Any]) -> None:
    """Kills actors, of which some may have died, or never been created."""
    for actor in actors:
        # "Actor creation cancelled": there is nothing to kill, and its own error is the one to be seen.
        with contextlib.suppress(RaySystemError):
            ray.kill(actor)
