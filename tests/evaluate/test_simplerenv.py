"""SimplerEnv: its official trials, the class on a stand-in of the simulator's public interface, and on the simulator."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from defi_platform.config import EvaluateConfig, ServeConfig, SimulatorConfig
from defi_platform.errors import SimulatorError
from defi_platform.evaluate.asked import blocks, checked
from defi_platform.evaluate.benchmarks.interface import LAST
from defi_platform.evaluate.benchmarks.simplerenv.benchmark import CAMERA, EPISODE_SEED, SimplerEnv
from defi_platform.evaluate.benchmarks.simplerenv.trials import TRIALS
from defi_platform.evaluate.episode import RandomPolicy, Rollout, run_episode
from defi_platform.evaluate.simulation.process import SimulatorProcess

OFFICIAL = SimplerEnv.resolved_options({})
MATCHING_APPLE = "visual_matching/place_apple_in_top_drawer"


def test_every_task_has_its_official_number_of_trials() -> None:
    counts = {name: trials.count for name, trials in TRIALS.items()}
    short = {name.partition("/")[2] for name in counts}
    assert len(counts) == 22 and len(short) == 11
    assert counts["visual_matching/pick_standing_coke_can"] == 4 * 25
    assert counts["variant_aggregation/pick_standing_coke_can"] == 11 * 25
    assert counts["visual_matching/move_near"] == 4 * 60
    assert counts["variant_aggregation/move_near"] == 10 * 60
    assert counts["visual_matching/close_middle_drawer"] == 4 * 9
    assert counts["variant_aggregation/close_middle_drawer"] == 7 * 9
    assert counts[MATCHING_APPLE] == 4 * 27
    assert counts["variant_aggregation/place_apple_in_top_drawer"] == 7 * 27
    assert {trials.task.decided for trials in TRIALS.values()} == {LAST}
    with pytest.raises(ValueError, match="has the initial states 0 to 35, and not 36"):
        TRIALS["visual_matching/open_top_drawer"].trial(36)


def test_one_command_asks_for_all_trials_of_a_protocol(tmp_path: Path) -> None:
    config = EvaluateConfig(
        serve=ServeConfig(policy=""), benchmark="simplerenv", tasks=["visual_matching"], arms=["random"],
        episodes_per_task=None, output=str(tmp_path),
    )  # fmt: skip
    assert sum(map(len, blocks(checked(config)))) == 3 * 100 + 240 + 6 * 36 + 108
    groups = SimplerEnv.groups()
    assert len(groups) == 8 and len(groups["variant_aggregation/drawer"]) == 6
    assert sorted(name for members in groups.values() for name in members) == sorted(TRIALS)


# --------------------------------------------------------------------------- on a stand-in


class Pose(SimpleNamespace):
    """Of a body: p in metres, q as w, x, y, z; without rotations, products are sums."""

    def inv(self) -> Pose:
        return Pose(p=-self.p, q=self.q)

    def __mul__(self, other: Pose) -> Pose:
        return Pose(p=self.p + other.p, q=other.q)


class World:
    """An environment of ManiSkill2_real2sim as far as the benchmark uses it; the apple task's subtasks change at step 3."""

    def __init__(self, identifier: str, given: dict[str, Any]):
        self.identifier, self.given, self.resets = identifier, given, list[Any]()
        self.rgb_overlay_img: Any = None
        self._obs_mode = "image"
        self.tcp = SimpleNamespace(pose=Pose(p=np.array([0.5, 0.1, 0.9]), q=np.array([1.0, 0.0, 0.0, 0.0])))
        robot = SimpleNamespace(pose=Pose(p=np.array([0.35, 0.2, 0.1]), q=np.array([1.0, 0.0, 0.0, 0.0])))
        self.agent = SimpleNamespace(robot=robot, get_gripper_closedness=lambda: 0.25)
        self.obj = SimpleNamespace(pose=Pose(p=np.array([1.0, 2.0, 3.0])))

    def reset(self, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        self.resets.append((seed, options))
        self.steps = 0
        return self._seen(), {}

    def step(self, action: np.ndarray) -> Any:
        self.steps += 1
        return self._seen(), 0.0, self.steps == 4, False, {}

    def get_language_instruction(self) -> str:
        second = "Place" in self.identifier and self.steps >= 3
        return "place apple into top drawer" if second else "open top drawer"

    def get_obs(self) -> dict[str, Any]:
        return self._seen()

    def _seen(self) -> dict[str, Any]:
        return {"image": True} if self._obs_mode == "image" else {}


class Wrapper:
    """RGBDObservationWrapper."""

    def __init__(self, world: World):
        self.unwrapped = world

    def observation(self, seen: dict[str, Any]) -> dict[str, Any]:
        assert seen["image"], "only what was rendered can be looked at"
        return {"image": {CAMERA: {"rgb": np.full((512, 640, 3), 7, np.uint8)}}}

    def close(self) -> None:
        pass


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[World]]:
    """The worlds that are made."""
    worlds: list[World] = []

    def make(identifier: str, **given: Any) -> Any:
        worlds.append(World(identifier, given))
        # gymnasium puts wrappers of its own around it
        return SimpleNamespace(env=Wrapper(worlds[-1]), unwrapped=worlds[-1])

    (tmp_path / "simulator").mkdir()
    (tmp_path / "data/real_inpainting").mkdir(parents=True)
    for name in ("open_drawer_a0", "open_drawer_b0", "google_coke_can_real_eval_1"):
        (tmp_path / f"data/real_inpainting/{name}.png").touch()
    root = ModuleType("mani_skill2_real2sim")
    root.__file__, root.ASSET_DIR = str(tmp_path / "simulator/__init__.py"), tmp_path / "data"  # type: ignore[attr-defined]
    names = ("envs", "utils", "utils.wrappers", "utils.wrappers.observation")
    modules = {f"mani_skill2_real2sim.{name}": ModuleType(name) for name in names}
    modules["mani_skill2_real2sim.utils.wrappers.observation"].RGBDObservationWrapper = Wrapper  # type: ignore[attr-defined]
    pictures = SimpleNamespace(
        imread=lambda path: np.array([255.0]), cvtColor=lambda image, _: image, COLOR_BGR2RGB=4
    )
    renderer = SimpleNamespace(SapienRenderer=lambda: None)
    modules |= {"sapien": SimpleNamespace(core=renderer), "sapien.core": renderer}  # type: ignore[dict-item]
    others = {"mani_skill2_real2sim": root, "gymnasium": SimpleNamespace(make=make), "cv2": pictures}
    for name, one in {**others, **modules}.items():
        monkeypatch.setitem(sys.modules, name, one)
    yield worlds


def test_a_trial_is_built_as_the_official_scripts_build_it(made: list[World]) -> None:
    simpler = SimplerEnv(SimplerEnv.default_view, OFFICIAL)
    state = simpler.reset(MATCHING_APPLE, 27 + 4)
    (world,) = made
    assert world.identifier == "PlaceIntoClosedTopDrawerCustomInScene-v0"
    assert (
        world.given["urdf_version"] == "recolor_tabletop_visual_matching_1"
        and world.given["shader_dir"] == "rt"
    )
    assert world.given["model_ids"] == "baked_apple_v2" and world.given["scene_name"] == "dummy_drawer"
    assert (world.given["control_freq"], world.given["sim_freq"]) == (3, 513)
    assert world.given["rgb_overlay_path"].endswith("real_inpainting/open_drawer_a0.png")
    (first, built), (seed, options) = world.resets
    assert (first, built) == (2022, {"reconfigure": True}), (
        "as the constructor of an environment of its own does"
    )
    assert seed == EPISODE_SEED == 40194941
    assert options["robot_init_options"]["init_xy"].tolist() == [0.644, -0.179]
    assert options["robot_init_options"]["init_rot_quat"] == pytest.approx(
        [np.sin(0.015), 0, 0, np.cos(0.015)]
    )
    assert options["obj_init_options"]["init_xy"] == pytest.approx([-0.05, 0.03])
    assert state == pytest.approx([0.15, -0.1, 0.8, 0, 0, 0, 1, 0.25])
    assert simpler.initial_positions() == {"object_x": 1.0, "object_y": 2.0, "object_z": 3.0}
    simpler.reset(MATCHING_APPLE, 27 + 9)  # the next place of the robot: another photo in the same scene
    assert len(made) == 1 and world.rgb_overlay_img == 1.0
    simpler.reset(MATCHING_APPLE, 0)
    assert len(made) == 2 and made[1].given["urdf_version"] == ""


def test_the_instruction_of_putting_into_a_drawer_changes_on_the_way(made: list[World]) -> None:
    simpler = SimplerEnv(SimplerEnv.default_view, OFFICIAL)
    simpler.reset(MATCHING_APPLE, 0)
    (task,) = simpler.chain(MATCHING_APPLE, 0)
    assert (task.instruction, task.horizon, task.decided) == ("open top drawer", 200, LAST)
    steps = [simpler.step(np.zeros(7, np.float32)) for _ in range(5)]
    assert [step.instruction for step in steps] == [None, None, "place apple into top drawer", None, None]
    assert [step.success for step in steps] == [False, False, False, True, False] and not any(
        s.done for s in steps
    )
    assert simpler.render()[CAMERA].shape == (512, 640, 3)
    simpler.reset(MATCHING_APPLE, 1)
    assert simpler.chain(MATCHING_APPLE, 1)[0].instruction == "open top drawer"


def test_parts_of_a_scene_that_are_not_there_are_named(made: list[World]) -> None:
    simpler = SimplerEnv(SimplerEnv.default_view, SimplerEnv.resolved_options({"shading": "raster"}))
    simpler.reset(MATCHING_APPLE, 0)
    assert made[0].given["shader_dir"] == "ibl"
    with pytest.raises(
        SimulatorError, match=r"google_pick_coke_can_1_v4\.glb is not there.*Complete the clone"
    ):
        simpler.reset("visual_matching/pick_standing_coke_can", 0)
    with pytest.raises(SimulatorError, match=r"google_move_near_real_eval_1\.png is not there"):
        simpler.reset("visual_matching/move_near", 0)


def test_a_machine_that_cannot_render_is_said_at_once(
    made: list[World], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise RuntimeError("Cannot find a suitable rendering device")

    monkeypatch.setattr(sys.modules["sapien"].core, "SapienRenderer", fail)
    with pytest.raises(
        SimulatorError, match=r"cannot render here \(Cannot find a suitable.*Mesa's software renderer"
    ):
        SimplerEnv(SimplerEnv.default_view, OFFICIAL)
    assert not made


# --------------------------------------------------------------------------- against SimplerEnv itself

_SCRIPTS = {
    "pick_coke_can": "pick_coke_can", "move_near": "move_near", "drawer": "drawer", "put_in_drawer": "place_apple_in_drawer",
}  # fmt: skip


@pytest.mark.parametrize("script", _SCRIPTS)
@pytest.mark.parametrize(
    ("protocol", "named"), [("visual_matching", "visual_matching"), ("variant_aggregation", "variant_agg")]
)
def test_the_trials_are_those_of_the_official_scripts(script: str, protocol: str, named: str) -> None:
    if (checkout := os.environ.get("PEER_SIMPLERENV")) is None:
        pytest.skip("needs PEER_SIMPLERENV, a checkout of simpler-env/SimplerEnv")
    said = subprocess.run(
        ["bash", "-c", f"python() {{ printf '%s\\t' \"$@\"; echo; }}; . scripts/rt1_{script}_{named}.sh"],
        cwd=checkout, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    theirs = {trial for line in said.splitlines() if "\t" in line for trial in _trials(line.split("\t"))}
    ours = {
        (
            s.environment,
            s.stage,
            p.photo,
            round(p.x, 6),
            round(p.y, 6),
            p.yaw,
            _rounded(o),
            s.ray_traced,
            _built(s.build),
        )
        for t in TRIALS.values()
        if (t.protocol, t.family) == (protocol, _SCRIPTS[script])
        for s, p, o in map(t.trial, range(t.count))
    }
    assert ours == theirs
    assert len(theirs) == sum(
        t.count for t in TRIALS.values() if (t.protocol, t.family) == (protocol, _SCRIPTS[script])
    )


def _rounded(start: Any) -> Any:
    return start if isinstance(start, int) else tuple(round(value, 6) for value in start)


def _built(given: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(sorted((name, str(value)) for name, value in given.items()))


def _trials(words: list[str]) -> Iterator[tuple[Any, ...]]:
    """The trials of one call of main_inference.py, whose options may be shortened."""
    options: dict[str, list[str]] = {}
    for word in words[1:]:
        if word.startswith("--"):
            options[name := word[2:]] = []
        elif word:
            options[name].append(word)
    found = {full: value for full in _OPTIONS for given, value in options.items() if full.startswith(given)}
    numbers = {name: list(map(float, value)) for name, value in found.items() if name.endswith("-range")}
    build: dict[str, Any] = {}
    for item in found.get("additional-env-build-kwargs", []):
        key, _, value = item.partition("=")
        try:
            build[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            build[key] = value
    traced = "enable-raytracing" in options or build.pop("shader_dir", None) == "rt"
    if "urdf_version" in build:
        build["urdf_version"] = "" if build["urdf_version"] is None else build["urdf_version"]

    def spread(name: str) -> list[float]:
        first, last, count = numbers[name]
        return [round(float(one), 6) for one in np.linspace(first, last, int(count))]

    starts: list[Any] = (
        [(x, y) for x in spread("obj-init-x-range") for y in spread("obj-init-y-range")]
        if ("obj-init-x-range" in numbers)
        else list(range(*map(int, numbers["obj-episode-range"])))
    )
    assert found["robot-init-rot-quat-center"] == ["0", "0", "0", "1"]
    assert numbers["robot-init-rot-rpy-range"][:6] == [0, 0, 1, 0, 0, 1]
    yaw = numbers["robot-init-rot-rpy-range"][6]
    horizon = next(
        t.task.horizon for t in TRIALS.values() for s in t.scenes if s.environment == found["env-name"][0]
    )
    assert (found["control-freq"], found["sim-freq"], found["max-episode-steps"]) == (
        ["3"],
        ["513"],
        [str(horizon)],
    )
    photo = found.get("rgb-overlay-path")
    for x in spread("robot-init-x-range"):
        for y in spread("robot-init-y-range"):
            for start in starts:
                yield (
                    found["env-name"][0], found["scene-name"][0], photo and Path(photo[0]).name, x, y, yaw, start, traced,
                    _built(build),
                )  # fmt: skip


_OPTIONS = (
    "control-freq", "sim-freq", "max-episode-steps", "env-name", "scene-name", "rgb-overlay-path", "robot-init-x-range",
    "robot-init-y-range", "robot-init-rot-quat-center", "robot-init-rot-rpy-range", "obj-init-x-range", "obj-init-y-range",
    "obj-episode-range", "additional-env-build-kwargs",
)  # fmt: skip


def test_the_simulator_runs_the_same_trial_in_two_processes() -> None:
    python = os.environ.get("SIMPLERENV_PYTHON")
    if python is None:
        pytest.skip("needs SIMPLERENV_PYTHON, an interpreter with SimplerEnv's simulator")
    options = SimplerEnv.resolved_options({"shading": "raster"})
    found = []
    for before in ((), (5,)):
        with SimulatorProcess(
            "simplerenv", SimplerEnv.default_view, options, python, SimulatorConfig()
        ) as simulator:
            for seed in (*before, 31):
                rollout = Rollout("random", MATCHING_APPLE, seed)
                outcome = run_episode(
                    simulator, RandomPolicy(rollout, SimplerEnv.action), rollout, max_steps=103, frame_every=0,
                    control_hz=3.0,
                )  # fmt: skip
            seen = simulator.observe(np.zeros(8, np.float32)).images[CAMERA].tobytes()
        found.append(
            (
                outcome.row["initial_state"],
                outcome.steps["executed"].tobytes(),
                outcome.row["instructions"],
                seen,
            )
        )
        assert outcome.row["steps"] == 103
    assert found[0] == found[1]
    assert found[0][2] == [{"step": 101, "text": "place apple into top drawer"}]
