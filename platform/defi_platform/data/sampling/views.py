"""Order of the cameras that are a policy's views, where the configuration gives none."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

FIRST_CAMERAS: Final = {"calvin": ("static", "gripper")}
"""Format -> cameras in the order in which its users show them to a policy. The first view is the one that GIDM
compares over time, and a wrist camera shows the robot's motion and little else."""


def view_order(source: str, cameras: Iterable[str]) -> list[str]:
    """The cameras of a corpus in the order of a policy's views.

    Args:
        source: format of the corpus, as the manifest has it.
        cameras: their names.

    Returns: those that the format puts first, then the others by name.
    """
    first = FIRST_CAMERAS.get(source, ())
    present = set(cameras)
    return [name for name in first if name in present] + sorted(present.difference(first))
