"""Scripts that solve LIBERO's tasks by waypoints, knowing where every object is.

A script is a list of stages: where the hand goes (as a function of the scene, so that it follows an object),
whether the gripper closes, and when the stage is over. Actions are those any policy has: displacements of the
hand, clipped, at 20 Hz. A zero rotation means "as it is now" to the controller, with which the hand drifts
away; so the orientation of the first step, turned by the stage's yaw, is held by feedback.

Needs numpy alone. Metres, in the world's frame: x away from the robot, y to its left, z up.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]
"""(3,)"""

OPEN, CLOSED = -1.0, 1.0
_STEP = 0.05
"""Displacement of an action of 1."""
_TURN = 0.5
"""Rotation of an action of 1, radians."""
_GAIN = 4.0
"""How many times the remaining way an action asks for; the controller covers about a quarter of it in a step."""
_TURN_GAIN = 2.0
_REACH = 0.12
"""Distance of the hand beyond which it does not hold an object."""


class Scene(Protocol):
    """The simulation as a script knows it."""

    @property
    def hand(self) -> Vector:
        """Position between the finger tips."""

    @property
    def rotation(self) -> NDArray[np.float64]:
        """Rotation matrix of the hand, (3, 3)."""

    def body(self, name: str) -> Vector:
        """Position of an object's or part's origin."""

    def site(self, name: str) -> Vector:
        """Position of a named place, e.g. the inside of a drawer."""


Target = Callable[[Scene], Vector]


@dataclass(frozen=True)
class Stage:
    """One leg of a script: it ends where the hand is near its target, or after `most` steps."""

    target: Target
    grip: float = OPEN
    near: float = 0.01
    """Distance from the target that counts as there; 0: stays for `most` steps."""
    most: int = 60
    yaw: float = 0.0
    """Turn of the hand about the vertical against how it was at first, radians."""
    tilt: float = 0.0
    """Turn about the x axis before that; -pi / 2: the hand points to the right (-y), finger over finger."""
    slow: float = 1.0
    """Greatest action, to move at a part of the full speed."""
    holds: str | None = None
    """Object that must have come along when the stage ends; if it was left behind, the script starts over."""

    def turn(self) -> NDArray[np.float64]:
        """Rotation matrix of both turns."""
        return about_vertical(self.yaw) @ _about_x(self.tilt)


class Script:
    """Runs stages one after the other; stays at the last."""

    def __init__(self, stages: tuple[Stage, ...]):
        self._stages = stages
        self._at = 0
        self._steps = 0
        self._first: NDArray[np.float64] | None = None

    def action(self, scene: Scene) -> NDArray[np.float32]:
        """The action in the present state: float32 (7,) in [-1, 1]."""
        if self._first is None:
            self._first = scene.rotation.copy()
        stage = self._stages[self._at]
        while self._at < len(self._stages) - 1 and self._over(stage, scene, self._first):
            lost = stage.holds is not None and np.linalg.norm(scene.body(stage.holds) - scene.hand) > _REACH
            self._at, self._steps = (0 if lost else self._at + 1), 0
            stage = self._stages[self._at]
        self._steps += 1
        move = np.clip(_GAIN * (stage.target(scene) - scene.hand) / _STEP, -stage.slow, stage.slow)
        turn = rotation_between(scene.rotation, stage.turn() @ self._first)
        turn = np.clip(_TURN_GAIN * turn / _TURN, -1.0, 1.0)
        return np.concatenate([move, turn, [stage.grip]]).astype(np.float32)

    def _over(self, stage: Stage, scene: Scene, first: NDArray[np.float64]) -> bool:
        if self._steps >= stage.most:
            return True
        way = stage.target(scene) - scene.hand
        turn = rotation_between(scene.rotation, stage.turn() @ first)
        return self._steps > 0 and bool(np.linalg.norm(way) < stage.near and np.linalg.norm(turn) < 0.1)


def rotation_between(present: NDArray[np.float64], wanted: NDArray[np.float64]) -> Vector:
    """The rotation vector, in the world's frame, that turns one orientation into another.

    Args:
        present: rotation matrix, (3, 3).
        wanted: likewise.
    """
    difference = wanted @ present.T
    cosine = np.clip((np.trace(difference) - 1.0) / 2.0, -1.0, 1.0)
    axis = np.array(
        [
            difference[2, 1] - difference[1, 2],
            difference[0, 2] - difference[2, 0],
            difference[1, 0] - difference[0, 1],
        ]
    )
    length = np.linalg.norm(axis)
    return axis * (np.arccos(cosine) / length) if length > 1e-9 else np.zeros(3)


def about_vertical(angle: float) -> NDArray[np.float64]:
    """Rotation matrix about z by `angle` radians."""
    c, s = np.cos(angle), np.sin(angle)
    return np.array([[c, -s, 0.0], [s, c, 0.0], [0.0, 0.0, 1.0]])


def _about_x(angle: float) -> NDArray[np.float64]:
    c, s = np.cos(angle), np.sin(angle)
    return np.array([[1.0, 0.0, 0.0], [0.0, c, -s], [0.0, s, c]])


def offset(place: Target, x: float = 0.0, y: float = 0.0, z: float = 0.0) -> Target:
    """A place moved by so many metres.

    Args:
        place: from which.
        x: away from the robot.
        y: to its left.
        z: upwards.
    """
    return lambda scene: place(scene) + np.array([x, y, z])


def body(name: str) -> Target:
    """An object's origin."""
    return lambda scene: scene.body(name)


def site(name: str) -> Target:
    """A named place."""
    return lambda scene: scene.site(name)


def hand(scene: Scene) -> Vector:
    """Place of the hand itself: stay."""
    return scene.hand


def carried(name: str, to: Target) -> Target:
    """Place of the hand at which the object that it holds is at `to`."""
    return lambda scene: scene.hand + to(scene) - scene.body(name)


def above(place: Target, height: float) -> Target:
    """Straight over a place, at an absolute height."""

    def target(scene: Scene) -> Vector:
        x, y, _ = place(scene)
        return np.array([x, y, height])

    return target


def at_height(height: float) -> Target:
    """Place of the hand, at an absolute height."""
    return above(lambda scene: scene.hand, height)
