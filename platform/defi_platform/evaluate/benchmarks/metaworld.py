"""Meta-World (MuJoCo): the only module that imports the simulator.

An environment's initial state is a pure function of (task, seed): two processes, or two episodes with others
between them, start from the same one. A policy gets the rendered image and `state` alone; where the objects
are is known to the scripted expert only.

Shapes: H height, W width in pixels.
"""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from defi_platform.errors import ConfigError, SimulatorError, one_line
from defi_platform.evaluate.benchmarks.metaworld_tasks import check_tasks, instruction

NAME = "metaworld"
FPS = 80
"""Control rate by the simulator's own clock: 5 physics steps of 0.0025 s."""
ACTION_DIM = 4
ACTION_NAMES = ("delta_x", "delta_y", "delta_z", "gripper_effort")
"""Each in [-1, 1]; a hand displacement of 1 is one centimetre per step."""
STATE_DIM = 4
STATE_NAMES = ("hand_x", "hand_y", "hand_z", "gripper_opening")
"""Metres; the opening is 0 (closed) to 1 (open, 10 cm)."""

_EGL_FIX = "install it with: apt-get install -y libegl1 libegl-mesa0"


@dataclass(frozen=True)
class _View:
    """A camera by its target: upright, degrees and metres."""

    look_at: tuple[float, float, float]
    distance: float
    azimuth: float
    elevation: float
    field_of_view: float


# Meta-World's own cameras show the whole robot, so at 64 x 64 pixels a drawer handle is one pixel wide.
# These frame the space the hand can reach, from one side of the object, where the arm does not hide it.
_VIEWS = {
    "workspace": _View((0.0, 0.67, 0.15), 1.1, 150.0, -35.0, 45.0),
}
# Mounted upside down in Meta-World's model files; turned by 180 degrees here.
_UPSIDE_DOWN = ("corner", "corner2", "corner3", "corner4")
CAMERAS = (*_VIEWS, *_UPSIDE_DOWN, "topview", "behindGripper", "gripperPOV")


def check_camera(camera: str, height: int, width: int, key: str) -> None:
    """Checks a camera and the size of its images.

    Args:
        camera: one of CAMERAS.
        height: of an image, in pixels.
        width: of an image, in pixels.
        key: of the camera in the configuration, for the message.

    Raises:
        ConfigError: Meta-World has no such camera, or its videos cannot have this size.
    """
    if camera not in CAMERAS:
        raise ConfigError(f"{key}: Meta-World has no camera '{camera}'. There is: {', '.join(CAMERAS)}.")
    if height < 16 or width < 16 or height % 2 or width % 2:
        raise ConfigError(
            f"{key}: frames of {height} x {width} cannot be stored as H.264 yuv420p; "
            "height and width must be even and at least 16."
        )


class Environment:
    """One task: reset to a seed, step with actions, render from one camera."""

    def __init__(self, task: str, camera: str, height: int, width: int):
        """Builds the simulation and its renderer.

        Args:
            task: one of metaworld_tasks.TASKS.
            camera: one of CAMERAS.
            height: of an image, in pixels.
            width: of an image, in pixels.

        Raises:
            ConfigError: there is no such task or camera, or the size does not suit a video.
            SimulatorError: Meta-World is not installed, or there is no EGL to render with.
        """
        check_tasks([task], "task")
        check_camera(camera, height, width, "camera")
        metaworld = _import_metaworld()
        self.task = task
        self.instruction = instruction(task)
        self._env: Any = metaworld.env_dict.ALL_V3_ENVIRONMENTS[task]()
        # Without this Meta-World draws initial states from the process's global random state.
        self._env.seeded_rand_vec = True
        self._env._set_task_called = True
        # The expert needs the goal; `state` leaves it out. The observation space was cached while the goal
        # was hidden, with zero as its bounds, and `step` clips to them.
        self._env._partially_observable = False
        del self._env.sawyer_observation_space
        self._env.max_path_length = np.iinfo(np.int64).max  # the caller decides when an episode ends
        self._expert: Any = metaworld.policies.ENV_POLICY_MAP[task]()
        self._renderer = _Renderer(self._env.model, camera, height, width)
        self._observation: NDArray[np.float64] = np.zeros(0)

    def reset(self, seed: int) -> NDArray[np.float32]:
        """Starts the episode of `seed`.

        Returns:
            The state, float32 (4,), see STATE_NAMES.
        """
        # Meta-World's reset places everything twice, with two draws. Drawing once, then resetting with the
        # draw held fixed (as its own benchmarks do) leaves nothing of another draw behind.
        self._env._freeze_rand_vec = False
        self._env.seed(seed)
        self._env.reset()
        self._env._freeze_rand_vec = True
        self._observation, _ = self._env.reset()
        return self._state()

    def step(self, action: NDArray[np.floating]) -> tuple[NDArray[np.float32], bool]:
        """Executes one action (4,), clipped to [-1, 1].

        Returns:
            The state after it, float32 (4,), and whether the task is solved in it.
        """
        clipped = np.clip(np.asarray(action, dtype=np.float32), -1.0, 1.0)
        self._observation, _, _, _, info = self._env.step(clipped)
        return self._state(), bool(info["success"] > 0)

    def expert_action(self) -> NDArray[np.float32]:
        """The action of Meta-World's script in the present state: float32 (4,) in [-1, 1]."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it warns that its constants exceed 1; they are clipped here
            action = self._expert.get_action(self._observation)
        return np.clip(np.asarray(action, dtype=np.float32), -1.0, 1.0)

    def render(self) -> NDArray[np.uint8]:
        """Renders the present state: uint8 (H, W, 3), upright."""
        return self._renderer.render(self._env.data)

    def close(self) -> None:
        """Frees the rendering context; the environment is of no use afterwards."""
        self._renderer.close()

    def _state(self) -> NDArray[np.float32]:
        return self._observation[:STATE_DIM].astype(np.float32)


class _Renderer:
    """Offscreen rendering of one model from one camera, as cheaply as software OpenGL allows.

    Nearly all the time goes into the robot's meshes (68,000 triangles). So there are no mirror images in the
    metal walls (they draw everything a second time), no shadows, and a geom whose bounding sphere is
    outside the view is not drawn, which does not change a pixel. What that saves pays for smoothing: pixels
    are means of 2 x 2, since at 64 x 64 the gripper is 3 pixels wide and flickers without.
    """

    _HIDDEN_GROUP = 5
    _FINER = 2  # as `_halved` takes it

    def __init__(self, model: Any, camera: str, height: int, width: int):
        import mujoco

        self._mujoco = mujoco
        self._model = model
        # Read when the rendering context is made, so they must be set before it.
        model.vis.quality.shadowsize = 0
        model.vis.quality.offsamples = 0
        fine_width, fine_height = self._FINER * width, self._FINER * height
        model.vis.global_.offwidth = fine_width
        model.vis.global_.offheight = fine_height
        # Where there is no display its constructor fails before this is set, and its destructor then prints a
        # second, confusing error.
        mujoco.GLContext._context = None
        try:
            self._gl = mujoco.GLContext(fine_width, fine_height)
            self._gl.make_current()
            self._context = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_50)
        except (ImportError, RuntimeError, AttributeError, mujoco.FatalError) as error:
            raise SimulatorError(
                f"EGL cannot render on this machine ({one_line(error)}); {_EGL_FIX}"
            ) from error
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self._context)
        self._scene = mujoco.MjvScene(model, model.ngeom + model.nsite + 100)
        for flag in (mujoco.mjtRndFlag.mjRND_SHADOW, mujoco.mjtRndFlag.mjRND_REFLECTION):
            self._scene.flags[flag] = 0
        self._options = mujoco.MjvOption()
        self._options.geomgroup[self._HIDDEN_GROUP] = 0
        self._groups = model.geom_group.copy()
        self._camera = self._mujoco_camera(camera)
        self._upside_down = camera in _UPSIDE_DOWN
        self._viewport = mujoco.MjrRect(0, 0, fine_width, fine_height)
        self._pixels = np.zeros((fine_height, fine_width, 3), np.uint8)

    def render(self, data: Any) -> NDArray[np.uint8]:
        mujoco = self._mujoco
        self._gl.make_current()
        self._model.geom_group[:] = self._groups
        self._update(data)  # places the camera
        self._model.geom_group[:] = np.where(self._in_view(data), self._groups, self._HIDDEN_GROUP)
        self._update(data)
        mujoco.mjr_render(self._viewport, self._scene, self._context)
        mujoco.mjr_readPixels(self._pixels, None, self._viewport, self._context)
        # OpenGL's rows go upwards; a camera mounted upside down has them the right way, but mirrored.
        return _halved(self._pixels[:, ::-1] if self._upside_down else self._pixels[::-1])

    def close(self) -> None:
        self._gl.make_current()
        self._context.free()
        self._gl.free()

    def _mujoco_camera(self, camera: str) -> Any:
        mujoco = self._mujoco
        eye = mujoco.MjvCamera()
        if camera in _VIEWS:
            view = _VIEWS[camera]
            eye.type = mujoco.mjtCamera.mjCAMERA_FREE
            eye.lookat[:] = view.look_at
            eye.distance, eye.azimuth, eye.elevation = view.distance, view.azimuth, view.elevation
            self._model.vis.global_.fovy = view.field_of_view
        else:
            eye.type = mujoco.mjtCamera.mjCAMERA_FIXED
            eye.fixedcamid = self._model.camera(camera).id
        return eye

    def _update(self, data: Any) -> None:
        mujoco = self._mujoco
        everything = mujoco.mjtCatBit.mjCAT_ALL
        mujoco.mjv_updateScene(self._model, data, self._options, None, self._camera, everything, self._scene)

    def _in_view(self, data: Any) -> NDArray[np.bool_]:
        """True for geoms whose bounding sphere touches the view's pyramid: bool (ngeom,)."""
        eye = self._scene.camera[0]
        forward, up = np.array(eye.forward), np.array(eye.up)
        right = np.cross(forward, up)
        # frustum_* are sizes at the near plane; the pyramid's half angles follow from them
        half_up = np.arctan2(eye.frustum_top, eye.frustum_near)
        aspect = self._viewport.width / self._viewport.height
        half_right = np.arctan2(eye.frustum_top * aspect, eye.frustum_near)
        offset = (
            data.geom_xpos - (np.array(self._scene.camera[0].pos) + np.array(self._scene.camera[1].pos)) / 2
        )
        ahead, sideways, upwards = offset @ forward, offset @ right, offset @ up
        radius = (
            self._model.geom_rbound + 0.05
        )  # five centimetres to spare: the eye's two halves differ a little
        inside: NDArray[np.bool_] = ahead > -radius
        for across, half in ((sideways, half_right), (upwards, half_up)):
            inside &= np.abs(across) * np.cos(half) - ahead * np.sin(half) < radius
        inside |= self._model.geom_rbound == 0  # planes are infinite
        return inside


def _halved(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Means of 2 x 2 pixels, rounded: (2H, 2W, 3) -> (H, W, 3)."""
    rows = pixels[::2].astype(np.uint16) + pixels[1::2]
    return ((rows[:, ::2] + rows[:, 1::2] + 2) >> 2).astype(np.uint8)


def _import_metaworld() -> ModuleType:
    """Imports the simulator with EGL chosen for rendering; an error names what is missing in one line."""
    os.environ.setdefault("MUJOCO_GL", "egl")
    # Simulators fill the cores by running side by side; more threads per image only get in their way.
    os.environ.setdefault("LP_NUM_THREADS", "0")
    try:
        import mujoco  # noqa: F401  (loads the OpenGL library, whose absence is another error)
    except ModuleNotFoundError as error:
        raise _not_installed(error) from error
    except (ImportError, AttributeError, RuntimeError, OSError) as error:
        raise SimulatorError(
            f"EGL cannot be loaded on this machine ({one_line(error)}); {_EGL_FIX}"
        ) from error
    try:
        import metaworld
        import metaworld.env_dict
        import metaworld.policies
    except ModuleNotFoundError as error:
        raise _not_installed(error) from error
    return metaworld


def _not_installed(error: ModuleNotFoundError) -> SimulatorError:
    return SimulatorError(
        f"Meta-World is not installed here (no module '{error.name}'); "
        "install the simulator with: pip install 'defi-platform[sim]'"
    )
