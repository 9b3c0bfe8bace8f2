"""Which script solves which task of LIBERO, see expert.py."""

from __future__ import annotations

import numpy as np

from defi_platform.evaluate.benchmarks.libero import suites
from defi_platform.evaluate.benchmarks.libero.expert import (
    CLOSED,
    OPEN,
    Scene,
    Script,
    Stage,
    Target,
    Vector,
    above,
    at_height,
    body,
    carried,
    offset,
    site,
)

_BOWL, _PLATE = "akita_black_bowl_1", "plate_1"
_RIM = 0.047
"""Radius of the bowl's rim, where it is held."""
_RIM_HEIGHT = 0.03
"""Of the finger tips over the bowl's origin."""
_TRAVEL = 1.16
"""Height of the hand that carries a bowl across the table."""


def bowl_to(place: Target, side: float, travel: float = _TRAVEL, yaw: float = 0.0) -> tuple[Stage, ...]:
    """Takes the bowl by its rim and puts it down.

    Args:
        place: where the bowl's origin is to be before the gripper opens.
        side: of the rim that is held: 1 the left (+y), -1 the right; turned with the hand.
        travel: height of the hand on its way.
        yaw: turn of the hand.
    """

    def rim(scene: Scene) -> Vector:
        around = np.array([-np.sin(yaw), np.cos(yaw), 0.0]) * side * _RIM
        return scene.body(_BOWL) + around

    held = carried(_BOWL, place)
    return (
        Stage(above(rim, travel), yaw=yaw, near=0.03),
        Stage(offset(rim, z=_RIM_HEIGHT + 0.06), yaw=yaw, near=0.015),
        Stage(offset(rim, z=_RIM_HEIGHT), yaw=yaw, near=0.008, most=30),
        Stage(offset(rim, z=_RIM_HEIGHT), CLOSED, yaw=yaw, near=0.0, most=12),
        Stage(at_height(travel), CLOSED, yaw=yaw, near=0.03),
        Stage(above(held, travel), CLOSED, yaw=yaw, near=0.015),
        Stage(held, CLOSED, yaw=yaw, near=0.02),
        Stage(lambda scene: scene.hand, OPEN, yaw=yaw, near=0.0, most=5),
        Stage(at_height(travel), OPEN, yaw=yaw),
    )


def _on_plate(**how: float) -> tuple[Stage, ...]:
    return bowl_to(offset(body(_PLATE), z=0.012), **{"side": 1.0, **how})


def _spatial(number: int) -> str:
    return suites.SUITES["libero_spatial"][number].name


_SCRIPTS: dict[str, tuple[Stage, ...]] = {
    **{task.name: _on_plate() for task in suites.SUITES["libero_spatial"]},
    _spatial(4): _on_plate(travel=1.25, yaw=0.48),
    _spatial(9): _on_plate(travel=1.32),
    "libero_goal/put_the_bowl_on_the_plate": _on_plate(),
    "libero_goal/put_the_bowl_on_the_stove": bowl_to(offset(site("flat_stove_1_cook_region"), z=0.03), 1.0),
    "libero_goal/put_the_bowl_on_top_of_the_cabinet": bowl_to(
        offset(site("wooden_cabinet_1_top_side"), z=0.01), 1.0, travel=1.28
    ),
}


TASKS = tuple(_SCRIPTS)
"""Tasks with a script."""


def can(task: str) -> bool:
    """Whether there is a script for a task."""
    return task in _SCRIPTS


def script(task: str) -> Script:
    """A script for a task, at its beginning."""
    return Script(_SCRIPTS[task])
