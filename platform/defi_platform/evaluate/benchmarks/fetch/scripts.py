"""Scripted experts of the Fetch tasks, ours: they know where the object and the goal are. numpy alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]


@dataclass(frozen=True)
class Scene:
    """Positions in metres, (3,) each."""

    hand: Vector
    item: Vector
    """The object; the hand itself where a task has none."""
    goal: Vector
    opening: float
    """Of the fingers: distance of each from the middle, 0 to 0.05."""
    velocity: Vector
    """(3,) metres per second, of the object."""


Script = Callable[[Scene], NDArray[np.float32]]
"""Scene -> action (4,): displacement of the hand, 1 being 5 cm, and the gripper from -1 (close) to 1 (open)."""

_GAIN = 10.0
"""Displacement asked for per metre of error: the hand lags behind what it is asked for."""
_SLIDES = ((0.0, 0.115, 0.242, 0.572, 1.2), (0.0, 0.3, 0.6, 1.0, 1.5))
"""Metres that the puck slides in 40 steps, and the speed (m/s) for it; measured."""
_RUN = 0.1
"""Metres from the puck at which a strike begins."""
_KICK = 1.0
"""Speed (m/s) that the puck gets from a hand that comes with action 1; it bounces off, so faster than the hand."""


def _towards(hand: Vector, target: Vector, gripper: float, gain: float = _GAIN) -> NDArray[np.float32]:
    return _action([*(gain * (target - hand)), gripper])


def _action(values: list[float]) -> NDArray[np.float32]:
    return np.clip(np.asarray(values, np.float32), np.float32(-1), np.float32(1))


def reach(scene: Scene) -> NDArray[np.float32]:
    """Goes straight to the goal."""
    return _towards(scene.hand, scene.goal, 0.0)


def lift(scene: Scene) -> NDArray[np.float32]:
    """Opens above the object, lowers, closes, carries it to the goal."""
    offset = scene.item - scene.hand
    beside = float(np.linalg.norm(offset[:2]))
    if np.linalg.norm(offset) < 0.02:
        held = scene.opening < 0.0265  # half the width of the cube
        return _towards(scene.hand, scene.goal if held else scene.item, -1.0)
    above = np.array([0.0, 0.0, 0.08 if beside > 0.012 else 0.0])
    return _towards(scene.hand, scene.item + above, 1.0)


def push(scene: Scene) -> NDArray[np.float32]:
    """Goes round the cube to the side away from the goal, and pushes from there."""
    way = scene.goal[:2] - scene.item[:2]
    far = float(np.linalg.norm(way))
    if far < 0.02:
        return np.zeros(4, np.float32)
    ahead = way / far
    offset = scene.hand[:2] - scene.item[:2]
    along = float(offset @ ahead)
    across = offset - along * ahead
    low = float(scene.item[2])
    if along < -0.02 and np.linalg.norm(across) < 0.02 and scene.hand[2] < low + 0.03:
        speed = min(1.0, 6.0 * far + 0.1)
        aim = speed * ahead - 15.0 * across
        return _action([*aim, 10.0 * (low - scene.hand[2]), 0.0])
    behind = scene.item[:2] - 0.075 * ahead
    there = float(np.linalg.norm(scene.hand[:2] - behind))
    height = low if there < 0.02 else low + 0.07
    if there > 0.02 and scene.hand[2] < low + 0.05 and np.linalg.norm(offset) < 0.1:
        behind = scene.hand[:2]  # up first, or it would drag the cube along
    return _towards(scene.hand, np.append(behind, height), 0.0, gain=20.0)


def slide(scene: Scene) -> NDArray[np.float32]:
    """Goes behind the puck, strikes it as hard as the way is long, and strikes again where it has come to rest.

    Solves about half: how a puck leaves the fingers depends on where within a control step they meet.
    """
    way = scene.goal[:2] - scene.item[:2]
    far = float(np.linalg.norm(way))
    ahead = way / max(far, 1e-6)
    offset = scene.hand[:2] - scene.item[:2]
    along = float(offset @ ahead)
    across = offset - along * ahead
    low = float(scene.item[2])
    moving = float(np.linalg.norm(scene.velocity[:2])) > 0.05
    needed = float(np.interp(far, *_SLIDES))
    if far < 0.02 or (moving and (along < -0.06 or scene.velocity[:2] @ ahead > 0.93 * needed)):
        return np.zeros(4, np.float32)
    if -_RUN - 0.02 < along < -0.02 and np.linalg.norm(across) < 0.006 and scene.hand[2] < low + 0.02:
        strike = needed / _KICK
        aim = strike * ahead - 10.0 * across
        return _action([*aim, 10.0 * (low - scene.hand[2]), 0.0])
    behind = scene.item[:2] - _RUN * ahead
    there = float(np.linalg.norm(scene.hand[:2] - behind))
    height = low if there < 0.006 else low + 0.07
    if there > 0.02 and scene.hand[2] < low + 0.05 and np.linalg.norm(offset) < 0.1:
        behind = scene.hand[:2]
    return _towards(scene.hand, np.append(behind, height), 0.0, gain=20.0)


SCRIPTS: dict[str, Script] = {"reach": reach, "push": push, "slide": slide, "pick-and-place": lift}
"""By task."""
