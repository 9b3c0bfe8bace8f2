"""Fetch: the four tasks of gymnasium-robotics' mobile arm, each episode with a goal of its own (a red dot).

The goal is in the picture and in the state: a policy that does not see it cannot know what is asked for. Where the
object is, the scripts know and the policy has to see.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from defi_platform.evaluate.benchmarks.egl import choose_egl
from defi_platform.evaluate.benchmarks.fetch.scripts import SCRIPTS, Scene
from defi_platform.evaluate.benchmarks.interface import FIRST, LAST, ActionSpec, Benchmark, Step, Task, View

HORIZON = 50
"""Steps of an episode, as gymnasium-robotics registers it."""

_TASKS = {
    "reach": ("FetchReach-v4", "move the hand to the red dot"),
    "push": ("FetchPush-v4", "push the cube to the red dot"),
    "slide": ("FetchSlide-v4", "slide the puck to the red dot"),
    "pick-and-place": ("FetchPickAndPlace-v4", "lift the cube to the red dot"),
}

_LOOK_AT = (1.3, 0.75, 0.45)
_VIEWS = {"workspace": (1.35, 150.0, -35.0), "side": (1.3, 90.0, -20.0), "top": (1.3, 180.0, -80.0)}
"""Cameras: distance in metres, azimuth and elevation in degrees, all towards `_LOOK_AT`. The model's own two show no
object: one looks at the robot's shoulder, the other into the gripper."""


class Fetch(Benchmark):
    """Reach, push, slide, and pick and place; see gymnasium-robotics 1.4.2."""

    name: ClassVar[str] = "fetch"
    cameras: ClassVar[tuple[str, ...]] = tuple(_VIEWS)
    default_view: ClassVar[View] = View(("workspace",), 96, 96)
    state_names: ClassVar[tuple[str, ...]] = (
        "hand_x",
        "hand_y",
        "hand_z",
        "finger_opening",
        "goal_x",
        "goal_y",
        "goal_z",
    )
    """Metres; the opening is the distance of the fingers, 0 to 0.1."""
    action: ClassVar[ActionSpec] = ActionSpec(
        names=("delta_x", "delta_y", "delta_z", "gripper"), low=(-1.0,) * 4, high=(1.0,) * 4
    )
    """A displacement of 1 is five centimetres; the gripper closes at -1 and opens at 1."""
    control_hz: ClassVar[float] = 25.0
    has_expert: ClassVar[bool] = True
    options: ClassVar[Mapping[str, tuple[Any, ...]]] = {"success": ("any", "last")}
    """any: the episode ends solved as soon as the goal is met. last: as published, the state after step 50 counts
    alone."""

    @classmethod
    def tasks(cls, options: Mapping[str, Any]) -> tuple[Task, ...]:
        """The four tasks."""
        decided = FIRST if options["success"] == "any" else LAST
        return tuple(Task(name, text, HORIZON, decided) for name, (_, text) in _TASKS.items())

    def __init__(self, view: View, options: Mapping[str, Any]):
        super().__init__(view, options)
        choose_egl()
        import gymnasium
        import gymnasium_robotics
        import mujoco

        gymnasium.register_envs(gymnasium_robotics)
        self._gymnasium, self._mujoco = gymnasium, mujoco
        self._task = ""
        self._env: Any = None
        self._renderer: Any = None
        self._observed: dict[str, NDArray[np.float64]] = {}
        self._show("reach")  # so that one who cannot render is not in the middle of an episode when it shows

    def protocol(self) -> dict[str, Any]:
        """Versions, success rule and horizon."""
        packages = ("gymnasium-robotics", "gymnasium", "mujoco")
        return {
            "packages": {name: version(name) for name in packages},
            "success": self.given["success"],
            "horizon": HORIZON,
            "renderer": os.environ["MUJOCO_GL"],
        }

    def reset(self, task: str, seed: int) -> NDArray[np.float32]:
        """Starts the episode of (task, seed): object and goal are drawn by gymnasium-robotics' own reset."""
        self._show(task)
        self._observed, _ = self._env.reset(seed=seed)
        return self._state()

    def initial_positions(self) -> dict[str, float]:
        """Of the object, where the task has one, and of the goal, in metres."""
        places = {"goal": self._observed["desired_goal"]}
        if len(self._observed["observation"]) > 10:
            places = {"object": self._observed["achieved_goal"], **places}
        return {
            f"{name}_{axis}": float(value)
            for name, place in places.items()
            for axis, value in zip("xyz", place, strict=True)
        }

    def step(self, action: NDArray[np.float32]) -> Step:
        """Executes one action (4,); the reward is 0 at the goal and -1 elsewhere."""
        self._observed, reward, _, _, info = self._env.step(np.asarray(action, np.float64))
        return Step(bool(info["is_success"]), self._state(), float(reward))

    def render(self) -> dict[str, NDArray[np.uint8]]:
        """Renders the present state."""
        # The red dot. The environment's own way to put it there computes the physics anew, which changes what follows.
        self._env.data.site("target0").xpos[:] = self._env.goal
        return {camera: self._image(camera) for camera in self.view.cameras}

    def expert_action(self) -> NDArray[np.float32]:
        """The action of our own script, see `scripts`."""
        seen = self._observed["observation"]
        has_object = len(seen) > 10
        fingers = seen[9:11] if has_object else seen[3:5]
        # Both velocities are displacements per control step, that of the object relative to the hand's.
        velocity = (seen[14:17] + seen[20:23]) * self.control_hz if has_object else np.zeros(3)
        scene = Scene(
            hand=seen[:3],
            item=self._observed["achieved_goal"],
            goal=self._observed["desired_goal"],
            opening=float(fingers.mean()),
            velocity=velocity,
        )
        return SCRIPTS[self._task](scene)

    def close(self) -> None:
        """Frees the model and its renderer."""
        if self._renderer is not None:
            self._renderer.close()
        if self._env is not None:
            self._env.close()
        self._renderer = self._env = None

    def _show(self, task: str) -> None:
        """Builds the model of a task; the tasks have models of their own."""
        if task == self._task:
            return
        self.close()
        identifier, _ = _TASKS[task]
        self._env = self._gymnasium.make(identifier, disable_env_checker=True).unwrapped
        try:
            self._renderer = self._mujoco.Renderer(self._env.model, self.view.height, self.view.width)
        except (ImportError, RuntimeError, AttributeError, self._mujoco.FatalError) as error:
            raise RuntimeError(
                f"EGL cannot render on this machine ({' '.join(str(error).split())}); "
                "install it with: apt-get install -y libegl1 libegl-mesa0"
            ) from error
        self._task = task

    def _image(self, camera: str) -> NDArray[np.uint8]:
        eye = self._mujoco.MjvCamera()
        eye.type = self._mujoco.mjtCamera.mjCAMERA_FREE
        eye.lookat[:] = _LOOK_AT
        eye.distance, eye.azimuth, eye.elevation = _VIEWS[camera]
        self._renderer.update_scene(self._env.data, camera=eye)
        return np.array(self._renderer.render(), np.uint8)

    def _state(self) -> NDArray[np.float32]:
        seen = self._observed["observation"]
        fingers = seen[9:11] if len(seen) > 10 else seen[3:5]
        parts = (seen[:3], [float(fingers.sum())], self._observed["desired_goal"])
        return np.concatenate(parts).astype(np.float32)
