"""CALVIN's simulator, built from the user's clone of calvin_env: the one module that imports it."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from defi_platform.errors import SimulatorError
from defi_platform.evaluate.benchmarks.calvin.clones import SCENE, Clones
from defi_platform.evaluate.benchmarks.interface import View

_ROBOT = ("conf/robot/panda.yaml", "conf/robot/panda_longer_finger.yaml")
"""The second changes settings of the first."""
_CAMERAS = "conf/cameras/cameras/{}.yaml"
_ENVIRONMENT = "conf/env/play_table_env.yaml"


class PlayTable:
    """The table of scene D with its arm; one in a process, since a second one changes the first."""

    def __init__(self, clones: Clones, view: View, *, egl: bool):
        """Builds the scene.

        Args:
            clones: the two repositories.
            view: cameras among `static` and `gripper`, and the size of their images.
            egl: render with EGL; False: with bullet's own software renderer.

        Raises:
            ImportError: a package is absent.
            SimulatorError: EGL is asked for and does not work here.
        """
        # Its git package looks for the git program when imported, to log a commit; nothing else needs that.
        os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
        sys.path.insert(0, str(clones.calvin_env))
        module: Any = importlib.import_module("calvin_env.envs.play_table_env")
        module.get_git_commit_hash = lambda path: "not asked for"
        instantiate = importlib.import_module("hydra.utils").instantiate
        load = importlib.import_module("omegaconf").OmegaConf.load
        if egl:
            _check_egl()
        self._env = instantiate(
            _settings(clones, view, egl=egl).env, show_gui=False, use_vr=False, use_scene_info=True
        )
        # A step of the simulator renders all cameras, which is nine tenths of its time; here `pictures` does.
        self._cameras = {camera.name: camera for camera in self._env.cameras}
        self._env.cameras = []
        self._oracle = instantiate(load(clones.oracle))
        self._instructions = load(clones.annotations)
        self._info: dict[str, Any] = {}
        self._start: dict[str, Any] = {}

    def instruction(self, task: str) -> str:
        """The first of a task's validation annotations."""
        return str(self._instructions[task][0])

    def reset(self, robot: NDArray[np.float64], scene: NDArray[np.float64]) -> NDArray[np.float32]:
        """Puts robot and scene into a state; `robot_obs` (15,) and `scene_obs` (24,).

        Returns:
            `robot_obs` after it, float32 (15,).
        """
        # The simulator leaves the last episode's gripper command in the state that it reports.
        self._env.robot.gripper_action = int(robot[-1])
        observation = self._env.reset(robot_obs=robot, scene_obs=scene)
        self._info = self._env.get_info()
        return _state(observation)

    def begin(self) -> None:
        """Takes the present state as that from which a task is judged."""
        self._start = self._info

    def step(self, action: NDArray[np.float32]) -> NDArray[np.float32]:
        """Executes a relative action (7,), in 8 steps of physics; returns `robot_obs`, float32 (15,)."""
        observation, _, _, self._info = self._env.step(action)
        return _state(observation)

    def solved(self, task: str) -> bool:
        """Says by CALVIN's own oracle whether what happened since `begin` is the task."""
        return bool(self._oracle.get_task_info_for_set(self._start, self._info, {task}))

    def scene_state(self) -> NDArray[np.float64]:
        """`scene_obs`, (24,)."""
        return np.asarray(self._env.scene.get_obs(), np.float64)

    def pictures(self) -> dict[str, NDArray[np.uint8]]:
        """The cameras' images of the present state, uint8 (H, W, 3)."""
        return {
            name: np.ascontiguousarray(camera.render()[0], dtype=np.uint8)
            for name, camera in self._cameras.items()
        }

    def close(self) -> None:
        """Disconnects from bullet."""
        self._env.close()
        self._env.cid = -1  # it closes itself once more when it is collected


def _check_egl() -> None:
    """Loads bullet's EGL plugin in a process of its own, which it ends where there is no EGL."""
    load = (
        "import importlib.util as u, pybullet as p; p.connect(p.DIRECT); "
        "raise SystemExit(p.loadPlugin(u.find_spec('eglRenderer').origin, '_eglRendererPlugin') < 0)"
    )
    tried = subprocess.run(
        [sys.executable, "-c", load], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    if tried.returncode:
        said = (tried.stdout.strip().splitlines() or ["it says nothing"])[-1]
        raise SimulatorError(
            f"CALVIN's renderer EGL does not work on this machine ({said.strip()}). Install it with: apt-get install -y "
            "libegl1 libegl-mesa0; or set options.renderer=tiny, which renders other pictures"
        )


def _settings(clones: Clones, view: View, *, egl: bool) -> Any:
    """The simulator's settings as its own files have them, with these cameras and this renderer."""
    config = importlib.import_module("omegaconf").OmegaConf

    def settings(file: str, changes: Mapping[str, Any] | None = None) -> Any:
        own = config.to_container(config.load(clones.calvin_env / file))
        return {**{key: value for key, value in own.items() if key != "defaults"}, **(changes or {})}

    cameras = {}
    for name in view.cameras:
        height, width = view.size(name)
        cameras[name] = settings(_CAMERAS.format(name), {"height": height, "width": width})
    return config.create(
        {
            "data_path": str(clones.calvin_env / "data"),
            "use_vr": False,
            "scene": settings(SCENE),
            "robot": settings(_ROBOT[0], settings(_ROBOT[1])),
            "cameras": cameras,
            "env": settings(_ENVIRONMENT, {"use_egl": egl}),
        }
    )


def _state(observation: Mapping[str, Any]) -> NDArray[np.float32]:
    return np.asarray(observation["robot_obs"], np.float32)
