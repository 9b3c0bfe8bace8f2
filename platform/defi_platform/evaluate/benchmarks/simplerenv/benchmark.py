"""SimplerEnv's Google Robot: policies for a real robot, in scenes rebuilt after real ones.

The simulator is ManiSkill2_real2sim (SAPIEN); the trials are those of SimplerEnv's evaluation scripts, see `trials`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from defi_platform.errors import SimulatorError, one_line
from defi_platform.evaluate.benchmarks.interface import LAST, ActionSpec, Benchmark, Step, Task, View
from defi_platform.evaluate.benchmarks.simplerenv.trials import (
    FAMILIES,
    MATCHING,
    TRIALS,
    VARIANTS,
    Place,
    Scene,
    of_family,
)

CAMERA = "overhead_camera"
_SIMULATION_HZ = 513
_CONTROL_HZ = 3
_CONTROL = "arm_pd_ee_delta_pose_align_interpolate_by_planner_gripper_pd_joint_target_delta_pos_interpolate_by_planner"
"""Of the Google robot in all official evaluations."""
_FIRST_SEED = 2022
"""Of the episode that an environment runs while it is made."""
EPISODE_SEED = int(np.random.RandomState(_FIRST_SEED).randint(2**32, dtype=np.uint64))
"""Seed of every official episode: the first that an environment draws which nobody has seeded. Distractors follow it."""


class SimplerEnv(Benchmark):
    """Cans, objects to move, drawers, and an apple to put into one, for the Google robot."""

    name = "simplerenv"
    cameras = (CAMERA,)
    default_view = View((CAMERA,), 512, 640)
    state_names = ("x", "y", "z", "qx", "qy", "qz", "qw", "gripper_closed")
    """Pose of the tool in the frame of the robot's base, metres, and how far the gripper is closed, 0 to 1."""
    action = ActionSpec(
        names=("x", "y", "z", "rotation_x", "rotation_y", "rotation_z", "gripper"),
        low=(-1.0, -1.0, -1.0, -math.pi / 2, -math.pi / 2, -math.pi / 2, -1.0),
        high=(1.0, 1.0, 1.0, math.pi / 2, math.pi / 2, math.pi / 2, 1.0),
        clip=False,
    )
    """Displacement of the tool, metres; rotation as an axis times its angle; of the gripper, which closes above 0, relative
    to where it is."""
    control_hz = float(_CONTROL_HZ)
    robot = "google_robot"
    pooled_by = "tasks"
    options: ClassVar[Mapping[str, tuple[Any, ...]]] = {"shading": ("official", "raster")}
    """official: the tasks with drawers are ray-traced. raster: nothing is, which is another benchmark for a policy that
    reads depth from shadows."""

    @classmethod
    def tasks(cls, options: Mapping[str, Any]) -> tuple[Task, ...]:
        """The eleven tasks of visual matching, then those of variant aggregation."""
        return tuple(trials.task for trials in TRIALS.values())

    @classmethod
    def splits(cls) -> Mapping[str, Sequence[str]]:
        """The tasks of a protocol, and those of a family under it."""
        found: dict[str, Sequence[str]] = {
            protocol: [name for name, one in TRIALS.items() if one.protocol == protocol]
            for protocol in (MATCHING, VARIANTS)
        }
        for group, members in cls.groups().items():
            found.setdefault(group, members)
        return found

    @classmethod
    def groups(cls) -> Mapping[str, Sequence[str]]:
        """Families of tasks under a protocol; a mean over families is not over the same as another one's."""
        return {f"{p}/{family}": of_family(p, family) for p in (MATCHING, VARIANTS) for family in FAMILIES}

    @classmethod
    def initial_states(cls, task: str, options: Mapping[str, Any]) -> int:
        """Number of a task's official trials."""
        return TRIALS[task].count

    @classmethod
    def check_view(cls, view: View) -> str | None:
        """Pictures have the size of the robot's own camera."""
        size = (cls.default_view.height, cls.default_view.width)
        if view.size(CAMERA) != size:
            return f"SimplerEnv's camera gives {size[0]} x {size[1]}, which policies resize themselves; leave height and width out"
        return None

    def __init__(self, view: View, options: Mapping[str, Any]):
        super().__init__(view, options)
        import cv2
        import gymnasium
        import mani_skill2_real2sim
        import mani_skill2_real2sim.envs  # registers the environments
        import sapien.core
        from mani_skill2_real2sim.utils.wrappers.observation import RGBDObservationWrapper

        try:
            sapien.core.SapienRenderer()
        except RuntimeError as error:
            raise SimulatorError(
                f"SAPIEN cannot render here ({one_line(error)}). It needs a Vulkan driver with VK_KHR_external_semaphore_fd: "
                "NVIDIA's with its Vulkan part (libvulkan1 and nvidia_icd.json; in containers "
                "NVIDIA_DRIVER_CAPABILITIES=all), or Mesa's software renderer from 26.2 on."
            ) from error
        # Any: where they are not installed they have no types, and elsewhere other ones.
        self._cv2: Any = cv2
        self._gymnasium: Any = gymnasium
        self._wrapper = RGBDObservationWrapper
        self._code = Path(mani_skill2_real2sim.__file__).parent
        self._assets = Path(mani_skill2_real2sim.ASSET_DIR)
        self._scene: Scene | None = None
        self._photo: str | None = None
        self._pictures: Any = None
        self._world: Any = None
        self._instruction = ""

    def protocol(self) -> dict[str, Any]:
        """Versions, digest of the simulator's clone, rates of control, shading."""
        from importlib.metadata import version

        return {
            "benchmark": "SimplerEnv, Google Robot",
            "versions": {name: version(name) for name in ("sapien", "gymnasium", "numpy")},
            "ManiSkill2_real2sim": _digest(self._code, self._assets),
            "shading": self.given["shading"],
            "control": {"mode": _CONTROL, "hz": _CONTROL_HZ, "simulation_hz": _SIMULATION_HZ},
            "success": LAST,
        }

    def chain(self, task: str, seed: int) -> tuple[Task, ...]:
        """The task with the instruction that the scene has given at `reset`."""
        one = self._by_name[task]
        return (Task(one.name, self._instruction or one.instruction, one.horizon, one.decided),)

    def reset(self, task: str, seed: int) -> NDArray[np.float32]:
        """Starts trial `seed` of a task; returns the state, (8,)."""
        scene, place, placed = TRIALS[task].trial(seed)
        self._show(scene, place)
        start = {"episode_id": placed} if isinstance(placed, int) else {"init_xy": np.array(placed)}
        # A turn by `yaw` about the vertical, after half a turn that faces the table.
        turned = np.array([-math.sin(place.yaw / 2), 0.0, 0.0, math.cos(place.yaw / 2)])
        self._world._obs_mode = "none"  # no picture is looked at yet
        # Official episodes are the second of an environment of their own, and bodies rest where the first has left them.
        self._world.reset(seed=_FIRST_SEED, options={"reconfigure": True})
        self._world.reset(
            seed=EPISODE_SEED,
            options={
                "robot_init_options": {"init_xy": np.array([place.x, place.y]), "init_rot_quat": turned},
                "obj_init_options": start,
            },
        )
        self._instruction = str(self._world.get_language_instruction())
        return self._state()

    def initial_positions(self) -> dict[str, float]:
        """Of the can or apple, or of the object to move and of the one to move it to, in metres."""
        names = {"object": "obj", "source": "episode_source_obj", "target": "episode_target_obj"}
        found = {name: getattr(self._world, attribute, None) for name, attribute in names.items()}
        return {
            f"{name}_{axis}": float(value)
            for name, body in found.items()
            if body is not None
            for axis, value in zip("xyz", body.pose.p, strict=True)
        }

    def step(self, action: NDArray[np.float32]) -> Step:
        """Executes one action (7,): a third of a second."""
        self._world._obs_mode = "none"
        _, _, success, _, _ = self._world.step(np.asarray(action, np.float32))
        text = str(self._world.get_language_instruction())
        changed = text if text != self._instruction else None
        self._instruction = text
        return Step(bool(success), self._state(), float(success), instruction=changed)

    def render(self) -> dict[str, NDArray[np.uint8]]:
        """The robot's camera, with the photo behind robot and objects where there is one."""
        self._world._obs_mode = "image"
        seen = self._pictures.observation(self._world.get_obs())
        return {CAMERA: np.array(seen["image"][CAMERA]["rgb"], np.uint8)}

    def close(self) -> None:
        """Frees the scene."""
        if self._pictures is not None:
            self._pictures.close()
        self._pictures = self._world = self._scene = None

    def _show(self, scene: Scene, place: Place) -> None:
        """Builds a scene, unless it is there; photos are changed in it."""
        photo = None if place.photo is None else self._asset("real_inpainting", place.photo)
        if scene != self._scene:
            self.close()
            if not scene.stage.startswith("dummy"):
                self._asset("hab2_bench_assets/stages", f"{scene.stage}.glb")
            shader = "rt" if scene.ray_traced and self.given["shading"] == "official" else "ibl"
            behind = (
                {} if photo is None else {"rgb_overlay_path": str(photo), "rgb_overlay_cameras": [CAMERA]}
            )
            made = self._gymnasium.make(
                scene.environment, obs_mode="rgbd", robot="google_robot_static", sim_freq=_SIMULATION_HZ,
                control_freq=_CONTROL_HZ, control_mode=_CONTROL, scene_name=scene.stage,
                camera_cfgs={"add_segmentation": True}, shader_dir=shader, **behind, **scene.build,
            )  # fmt: skip
            self._world = made.unwrapped
            while not isinstance(made, self._wrapper):  # gymnasium wraps it further
                made = made.env
            self._pictures, self._scene, self._photo = made, scene, place.photo
        if place.photo != self._photo:
            picture = self._cv2.cvtColor(self._cv2.imread(str(photo)), self._cv2.COLOR_BGR2RGB)
            self._world.rgb_overlay_img, self._photo = picture / 255, place.photo

    def _asset(self, folder: str, name: str) -> Path:
        path = self._assets / folder / name
        if not path.is_file():
            raise SimulatorError(
                f"{path} is not there, which this task's scene is made of. Complete the clone of "
                "https://github.com/simpler-env/ManiSkill2_real2sim (all of its data/), or leave the task out."
            )
        return path

    def _state(self) -> NDArray[np.float32]:
        tool = self._world.agent.robot.pose.inv() * self._world.tcp.pose
        w, x, y, z = tool.q
        return np.array([*tool.p, x, y, z, w, self._world.agent.get_gripper_closedness()], np.float32)


def _digest(code: Path, assets: Path) -> str:
    """SHA-256 over the simulator's code and the descriptions of its bodies, shortened to 16 digits."""
    total = hashlib.sha256()
    files = [*code.rglob("*.py"), *assets.glob("custom/*.json"), *assets.glob("custom/*.urdf")]
    for path in sorted(files):
        total.update(f"{path.name}\n{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return total.hexdigest()[:16]
