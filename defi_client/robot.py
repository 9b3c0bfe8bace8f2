"""A robot as the control loop sees it, and whether a policy fits it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Callable, Dict, Protocol

import numpy as np

from defi_client.errors import FitError

MakeObservation = Callable[[Dict[str, Any], Any, str], Dict[str, Any]]
"""(images by camera, state, instruction) -> the map that a server reads."""


class Robot(Protocol):
    """A robot, as its owner writes it. None of its methods may block for longer than a fraction of a control step."""

    cameras: Sequence[str]
    """Names of the cameras, as the policy knows them."""
    state_dim: int
    action_dim: int

    def images(self) -> dict[str, np.ndarray[Any, Any]]:
        """The newest picture of each camera: uint8 (height, width, 3), RGB, upright."""
        ...

    def state(self) -> np.ndarray[Any, Any]:
        """The state (state_dim,), in the units of the training data."""
        ...

    def execute(self, action: np.ndarray[Any, Any]) -> None:
        """Begins to carry out an action (action_dim,), float64, and returns at once."""
        ...

    def hold(self) -> None:
        """Stays where it is; called at every step without an action, and at the end of an episode."""
        ...


def openpi_observation(
    images: dict[str, np.ndarray[Any, Any]], state: np.ndarray[Any, Any], instruction: str
) -> dict[str, Any]:
    """An observation with the keys of this project's server.

    Args:
        images: by camera.
        state: (S,).
        instruction: what to do.
    """
    observation: dict[str, Any] = {f"observation/images/{name}": image for name, image in images.items()}
    observation["observation/state"] = np.asarray(state, np.float32)
    observation["prompt"] = instruction
    return observation


def check_fits(metadata: dict[str, Any], robot: Robot, url: str) -> None:
    """Checks that a policy can drive a robot, as far as its server's greeting says what it needs.

    Args:
        metadata: the greeting. Servers that say nothing are believed; the width of every chunk is checked anyway.
        robot: to be driven.
        url: of the server, for the message.

    Raises:
        FitError: it cannot; names everything that does not fit.
    """
    wrong = []
    width = metadata.get("action_dim", robot.action_dim)
    if width != robot.action_dim:
        wrong.append(f"it gives {width} action dims, the robot takes {robot.action_dim}")
    state_dim = metadata.get("state_dim", robot.state_dim)
    if state_dim not in (0, robot.state_dim):
        wrong.append(f"it takes {state_dim} state dims, the robot gives {robot.state_dim}")
    cameras = [str(camera) for camera in metadata.get("cameras") or ["*"]]
    missing = [camera for camera in cameras if camera not in robot.cameras and camera != "*"]
    if missing:
        wrong.append(
            f"it looks through {', '.join(cameras)}, the robot has {', '.join(robot.cameras) or 'none'}"
        )
    if wrong:
        raise FitError(
            f"the policy at {url} does not fit this robot: {'; '.join(wrong)}. Serve a policy fine-tuned for it, or "
            "rename its cameras."
        )
