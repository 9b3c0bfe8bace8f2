"""Meta-World (MuJoCo): the only folder that imports the simulator.

An episode's initial state is a pure function of (task, seed): two processes, or two episodes with others
between them, start from the same one. A policy gets the rendered images and `state` alone; where the objects
are is known to the scripted expert only.

Shapes: H height, W width in pixels.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from defi_platform.errors import SimulatorError, one_line
from defi_platform.evaluate.benchmarks import egl
from defi_platform.evaluate.benchmarks.interface import ActionSpec, Benchmark, Step, Task, View
from defi_platform.evaluate.benchmarks.metaworld import tasks
from defi_platform.evaluate.benchmarks.metaworld.renderer import CAMERAS, Renderer

STATE_DIM = 4


class MetaWorld(Benchmark):
    """Fifty tasks of a Sawyer arm at a table, each with a scripted expert."""

    name = "metaworld"
    cameras = CAMERAS
    default_view = View(("workspace",), 64, 64)
    state_names = ("hand_x", "hand_y", "hand_z", "gripper_opening")
    """Metres; the opening is 0 (closed) to 1 (open, 10 cm)."""
    action = ActionSpec(
        names=("delta_x", "delta_y", "delta_z", "gripper_effort"), low=(-1.0,) * 4, high=(1.0,) * 4
    )
    """A hand displacement of 1 is one centimetre per step."""
    control_hz = 80.0
    """By the simulator's own clock: 5 physics steps of 0.0025 s."""
    robot = "sawyer"
    has_expert = True
    pooled_by = "tasks"

    @classmethod
    def tasks(cls, options: Mapping[str, Any]) -> tuple[Task, ...]:
        """The fifty tasks of MT50."""
        return tuple(Task(name, tasks.instruction(name), tasks.HORIZON) for name in tasks.TASKS)

    @classmethod
    def splits(cls) -> Mapping[str, Sequence[str]]:
        """MT1/TASK, MT10, MT50, ML1/TASK, ML10/train, ML10/test, ML45/train and ML45/test."""
        return tasks.splits()

    def __init__(self, view: View, options: Mapping[str, Any]):
        super().__init__(view, options)
        self._metaworld = _import_metaworld()
        self._task = ""
        self._env: Any = None
        self._expert: Any = None
        self._renderer: Renderer | None = None
        self._observation: NDArray[np.float64] = np.zeros(0)
        _check_rendering()

    def protocol(self) -> dict[str, Any]:
        """Versions, and how the pictures are made."""
        from importlib.metadata import version

        return {
            "metaworld": version("metaworld"),
            "mujoco": version("mujoco"),
            "renderer": f"mujoco, {os.environ['MUJOCO_GL']}, no shadows, no reflections, means of 2 x 2 pixels",
        }

    def reset(self, task: str, seed: int) -> NDArray[np.float32]:
        """Starts the episode of (task, seed); another task than the last one costs most of a second."""
        if task != self._task:
            self._build(task)
        # Meta-World's reset places everything twice, with two draws. Drawing once, then resetting with the
        # draw held fixed (as its own benchmarks do) leaves nothing of another draw behind.
        self._env._freeze_rand_vec = False
        self._env.seed(seed)
        self._env.reset()
        self._env._freeze_rand_vec = True
        self._observation, _ = self._env.reset()
        return self._state()

    def initial_positions(self) -> dict[str, float]:
        """Of the task's objects and its goal, in metres."""
        # The environment's observation: the hand (4), two objects with their rotations (7 each), the same of the step
        # before, the goal (3). What a task does not have is zero.
        places = {"object": self._observation[4:7], "second_object": self._observation[11:14]}
        places["goal"] = self._observation[-3:]
        return {
            f"{name}_{axis}": float(value)
            for name, place in places.items()
            if place.any()
            for axis, value in zip("xyz", place, strict=True)
        }

    def step(self, action: NDArray[np.float32]) -> Step:
        """Executes one action (4,)."""
        self._observation, reward, _, _, info = self._env.step(action)
        return Step(bool(info["success"] > 0), self._state(), float(reward))

    def expert_action(self) -> NDArray[np.float32]:
        """The action of Meta-World's script in the present state: float32 (4,) in [-1, 1]."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it warns that its constants exceed 1; they are clipped here
            action = self._expert.get_action(self._observation)
        return np.clip(np.asarray(action, dtype=np.float32), -1.0, 1.0)

    def render(self) -> dict[str, NDArray[np.uint8]]:
        """Renders the present state from every camera: uint8 (H, W, 3), upright."""
        assert self._renderer is not None, "reset comes first"
        return self._renderer.render(self._env.data)

    def close(self) -> None:
        """Frees the rendering context."""
        if self._renderer is not None:
            self._renderer.close()
            self._renderer = None

    def _build(self, task: str) -> None:
        self.close()
        self._task = ""
        env = self._metaworld.env_dict.ALL_V3_ENVIRONMENTS[task]()
        # Without this Meta-World draws initial states from the process's global random state.
        env.seeded_rand_vec = True
        env._set_task_called = True
        # The expert needs the goal; `state` leaves it out. The observation space was cached while the goal
        # was hidden, with zero as its bounds, and `step` clips to them.
        env._partially_observable = False
        del env.sawyer_observation_space
        env.max_path_length = np.iinfo(np.int64).max  # the caller decides when an episode ends
        self._env = env
        self._expert = self._metaworld.policies.ENV_POLICY_MAP[task]()
        self._renderer = Renderer(env.model, self.view.cameras, self.view.height, self.view.width)
        self._task = task

    def _state(self) -> NDArray[np.float32]:
        return self._observation[:STATE_DIM].astype(np.float32)


def _check_rendering() -> None:
    """Makes a rendering context and frees it: what cannot be rendered here is known before the first episode."""
    import mujoco

    # Where there is no display its constructor fails before this is set, and its destructor then prints a
    # second, confusing error.
    mujoco.GLContext._context = None
    try:
        context = mujoco.GLContext(16, 16)
        context.make_current()
        context.free()
    except (ImportError, RuntimeError, AttributeError, mujoco.FatalError) as error:
        raise SimulatorError(f"EGL cannot render on this machine ({one_line(error)}); {egl.FIX}") from error


def _import_metaworld() -> ModuleType:
    """Imports the simulator with EGL chosen for rendering; an error of EGL names the fix in one line."""
    with egl.loading_egl():
        import mujoco  # noqa: F401  (loads the OpenGL library, whose absence is another error)
    import metaworld
    import metaworld.env_dict
    import metaworld.policies

    return metaworld
