"""Scripts of LIBERO's tasks, see expert.py."""

from __future__ import annotations

from dataclasses import dataclass

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
    hand,
    offset,
    site,
)

_BOWL, _PLATE = "akita_black_bowl_1", "plate_1"
_TRAVEL = 1.16
"""Height of the hand that carries something across the table."""


@dataclass(frozen=True)
class Rim:
    """An object that is held by its rim."""

    name: str
    radius: float
    height: float
    """Of the finger tips over the object's origin."""


_BOWL_RIM = Rim(_BOWL, 0.047, 0.03)


def by_rim(
    rim: Rim, place: Target, side: float = 1.0, travel: float = _TRAVEL, yaw: float = 0.0
) -> tuple[Stage, ...]:
    """Takes an object by its rim and puts it down.

    Args:
        rim: what to take.
        place: where the object's origin is to be before the gripper opens.
        side: of the rim that is held: 1 the left (+y), -1 the right; turned with the hand.
        travel: height of the hand on its way.
        yaw: turn of the hand.
    """

    def edge(scene: Scene) -> Vector:
        around = np.array([-np.sin(yaw), np.cos(yaw), 0.0]) * side * rim.radius
        around[2] = rim.height
        return np.asarray(scene.body(rim.name) + around)

    held = carried(rim.name, place)
    return (
        Stage(above(edge, travel), yaw=yaw, near=0.03),
        Stage(offset(edge, z=0.06), yaw=yaw, near=0.015),
        Stage(edge, yaw=yaw, near=0.008, most=30),
        Stage(edge, CLOSED, yaw=yaw, near=0.0, most=12),
        Stage(at_height(travel), CLOSED, yaw=yaw, near=0.03, holds=rim.name),
        Stage(above(held, travel), CLOSED, yaw=yaw, near=0.015),
        Stage(held, CLOSED, yaw=yaw, near=0.013, most=45),
        Stage(hand, OPEN, yaw=yaw, near=0.0, most=5),
        Stage(at_height(travel), OPEN, yaw=yaw),
    )


def cheese_to_bowl() -> tuple[Stage, ...]:
    """Takes the cream cheese and lets it fall into the bowl."""
    box, bowl = body("cream_cheese_1"), body(_BOWL)
    held = carried("cream_cheese_1", offset(bowl, z=0.07))
    return (
        Stage(above(box, 1.05), near=0.03),
        Stage(box, near=0.01, most=40),
        Stage(box, CLOSED, near=0.0, most=12),
        Stage(at_height(1.08), CLOSED, near=0.03, holds="cream_cheese_1"),
        Stage(above(held, 1.08), CLOSED, near=0.012),
        Stage(held, CLOSED, near=0.015, most=30),
        Stage(hand, near=0.0, most=6),
        Stage(at_height(1.15)),
    )


def open_drawer(body_name: str, up: float) -> tuple[Stage, ...]:
    """Pulls a drawer of the cabinet open by its handle, the hand level and one finger over the other.

    Args:
        body_name: of the drawer.
        up: height of the handle over the drawer's origin.
    """
    tilt = -np.pi / 2
    handle = offset(body(body_name), y=0.102, z=up)
    return (
        Stage(offset(handle, y=0.14, z=0.12), tilt=tilt, near=0.03, most=80),
        Stage(offset(handle, y=0.14), tilt=tilt, near=0.02, most=40),
        Stage(offset(handle, y=0.0), tilt=tilt, near=0.012, most=30),
        Stage(offset(handle, y=0.0), CLOSED, tilt=tilt, near=0.0, most=10),
        Stage(offset(handle, y=0.1), CLOSED, tilt=tilt, near=0.0, most=60),
    )


def _on_plate(**how: float) -> tuple[Stage, ...]:
    return by_rim(_BOWL_RIM, offset(body(_PLATE), z=0.012), **how)


def _spatial(number: int) -> str:
    return suites.SUITES["libero_spatial"][number].name


_SCRIPTS: dict[str, tuple[Stage, ...]] = {
    **{task.name: _on_plate() for task in suites.SUITES["libero_spatial"]},
    _spatial(4): _on_plate(travel=1.25, yaw=0.48),
    _spatial(9): _on_plate(travel=1.32),
    "libero_goal/put_the_bowl_on_the_plate": _on_plate(),
    "libero_goal/put_the_bowl_on_the_stove": by_rim(
        _BOWL_RIM, offset(site("flat_stove_1_cook_region"), z=0.03)
    ),
    "libero_goal/put_the_bowl_on_top_of_the_cabinet": by_rim(
        _BOWL_RIM, offset(site("wooden_cabinet_1_top_side"), z=0.01), travel=1.28
    ),
    "libero_goal/put_the_cream_cheese_in_the_bowl": cheese_to_bowl(),
    "libero_goal/open_the_middle_drawer_of_the_cabinet": open_drawer("wooden_cabinet_1_cabinet_middle", 0.11),
}


TASKS = tuple(_SCRIPTS)
"""Tasks with a script."""


def can(task: str) -> bool:
    """Whether there is a script for a task."""
    return task in _SCRIPTS


def script(task: str) -> Script:
    """A script for a task, at its beginning."""
    return Script(_SCRIPTS[task])
