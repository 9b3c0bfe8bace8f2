"""A robot of pure NumPy: a hand in a box that goes where it is sent, with a camera that looks down on it."""

from __future__ import annotations

from typing import Any

import numpy as np

SCALE = 0.05
"""Metres per unit of an action."""


class KinematicRobot:
    cameras = ("workspace",)
    state_dim = 4
    action_dim = 4

    def __init__(self, cameras: tuple[str, ...] = ("workspace",)) -> None:
        self.cameras = cameras
        self.hand = np.array([0.0, 0.5, 0.2, 0.0])
        """x, y, z in metres; opening of the gripper."""
        self.executed: list[Any] = []
        self.path: list[Any] = []
        self.holds: list[int] = []
        """Actions executed before each hold."""

    def images(self) -> dict[str, Any]:
        image = np.full((32, 32, 3), 40, np.uint8)
        row, column = np.clip((self.hand[:2] * 16 + 8).astype(int), 0, 30)
        image[row : row + 2, column : column + 2] = (255, int(200 * np.clip(self.hand[2], 0, 1)), 0)
        return {camera: image for camera in self.cameras}

    def state(self) -> Any:
        return self.hand.copy()

    def execute(self, action: Any) -> None:
        assert np.isfinite(action).all() and action.shape == (4,)
        self.executed.append(np.array(action))
        self.hand = self.hand + SCALE * action
        self.path.append(self.hand.copy())

    def hold(self) -> None:
        self.holds.append(len(self.executed))


def towards(goal: Any, chunk: int = 8) -> Any:
    """A policy: straight to a goal, by the state that it is shown."""

    def answer(observation: dict[str, Any], socket: Any) -> dict[str, Any]:
        place, actions = np.array(observation["observation/state"], np.float64), []
        for _ in range(chunk):
            actions.append(np.clip((goal - place) / SCALE, -0.5, 0.5))
            place = place + SCALE * actions[-1]
        return {"actions": np.asarray(actions, np.float32), "policy_digest": "d1"}

    return answer
