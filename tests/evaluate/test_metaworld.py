"""The simulator behind its interface: exact seeds, upright images, no privileged state, clear errors."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from defi_platform.errors import SimulatorError
from defi_platform.evaluate.benchmarks.interface import View
from defi_platform.evaluate.benchmarks.metaworld.benchmark import MetaWorld
from defi_platform.evaluate.benchmarks.metaworld.tasks import TASKS, instruction, splits
from defi_platform.evaluate.simulation.process import SimulatorProcess


class Environment:
    """One task of Meta-World in this process, seen from one camera."""

    def __init__(self, task: str, camera: str, size: int):
        self.benchmark = MetaWorld(View((camera,), size, size), {})
        self.task, self.camera = task, camera
        self.expert_action, self.close = self.benchmark.expert_action, self.benchmark.close

    def reset(self, seed: int) -> np.ndarray:
        return self.benchmark.reset(self.task, seed)

    def step(self, action: np.ndarray) -> tuple[np.ndarray, bool]:
        step = self.benchmark.step(MetaWorld.action.prepared(action[None])[0])
        return step.state, step.success

    def render(self) -> np.ndarray:
        return self.benchmark.render()[self.camera]


Make = Callable[..., Environment]


@pytest.fixture
def make() -> Iterator[Make]:
    opened: list[Environment] = []

    def build(task: str, camera: str = "workspace", size: int = 64) -> Environment:
        opened.append(Environment(task, camera, size))
        return opened[-1]

    yield build
    for environment in opened:
        environment.close()


def trace(environment: Environment, seed: int, steps: int = 15) -> str:
    """A digest of the first frame and of the expert's states and actions."""
    states = [environment.reset(seed)]
    digest = hashlib.sha256(environment.render().tobytes())
    for _ in range(steps):
        action = environment.expert_action()
        states.append(environment.step(action)[0])
        digest.update(action.tobytes() + states[-1].tobytes())
    digest.update(environment.render().tobytes())
    return digest.hexdigest()


TRACE_ELSEWHERE = """
import sys
sys.path.insert(0, {folder!r})
from test_metaworld import Environment, trace
environment = Environment({task!r}, "workspace", 64)
print("trace", trace(environment, {seed}))
environment.close()
"""


@pytest.mark.parametrize("task", ["door-close-v3", "plate-slide-v3"])
def test_an_episode_is_the_same_in_another_process_and_after_other_episodes(task: str, make: Make) -> None:
    environment = make(task)
    trace(environment, 11)
    trace(environment, 3)
    here = trace(environment, 7)
    code = TRACE_ELSEWHERE.format(folder=os.path.dirname(__file__), task=task, seed=7)
    elsewhere = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert elsewhere.stdout.split()[-1] == here


def test_different_seeds_place_things_differently(make: Make) -> None:
    environment = make("button-press-v3")
    assert len({trace(environment, seed, steps=1) for seed in range(5)}) == 5


def test_the_state_does_not_tell_where_the_object_is(make: Make) -> None:
    environment = make("button-press-v3")
    states, images = [], []
    for seed in (1, 2):
        states.append(environment.reset(seed))
        images.append(environment.render())
    assert states[0].shape == (4,) and states[0].dtype == np.float32
    assert np.allclose(states[0], states[1], atol=1e-3), "only the button was moved"
    assert (np.abs(images[0].astype(int) - images[1]) > 40).any(axis=2).sum() > 20, "the image shows it"


@pytest.mark.parametrize("task", ["drawer-close-v3", "button-press-v3", "door-close-v3", "coffee-button-v3"])
def test_experts_succeed_from_any_seed(task: str, make: Make) -> None:
    environment = make(task, size=16)
    for seed in range(5):
        environment.reset(seed)
        assert any(environment.step(environment.expert_action())[1] for _ in range(150)), seed


def test_random_actions_do_not_press_the_button(make: Make) -> None:
    environment = make("button-press-v3", size=16)
    random = np.random.default_rng(0)
    for seed in range(3):
        environment.reset(seed)
        assert not any(environment.step(random.uniform(-1, 1, 4))[1] for _ in range(150))


@pytest.mark.parametrize("camera", ["workspace", "corner", "corner2", "corner3", "corner4"])
def test_a_raised_hand_is_higher_in_the_image(camera: str, make: Make) -> None:
    environment = make("button-press-v3", camera, size=128)
    environment.reset(0)
    heights = []
    for direction in (-1.0, 1.0):
        for _ in range(20):
            environment.step(np.array([0.0, 0.0, direction, -1.0]))
        red, green, blue = np.moveaxis(environment.render().astype(int), 2, 0)
        finger = (green - red > 60) & (blue - red > 60)  # one finger is cyan, and nothing else is
        assert finger.any()
        heights.append(np.nonzero(finger)[0].mean())
    assert heights[1] < heights[0] - 2, "row 0 is the top"


def test_leaving_out_what_is_not_in_view_changes_no_pixel(make: Make) -> None:
    for camera in ("workspace", "corner2", "gripperPOV"):
        environment = make("window-close-v3", camera)
        environment.reset(4)
        renderer = environment.benchmark._renderer
        assert renderer is not None
        for _ in range(3):
            for _ in range(20):
                environment.step(environment.expert_action())
            shown = environment.render()
            in_view = renderer._in_view
            everything = np.ones(renderer._model.ngeom, bool)
            renderer._in_view = lambda data, everything=everything: everything  # type: ignore[method-assign]
            assert np.array_equal(environment.render(), shown)
            renderer._in_view = in_view  # type: ignore[method-assign]


def test_every_task_of_mt50_has_an_environment_an_expert_and_a_sentence_of_its_own() -> None:
    from metaworld.env_dict import ALL_V3_ENVIRONMENTS
    from metaworld.policies import ENV_POLICY_MAP

    assert set(TASKS) == set(ALL_V3_ENVIRONMENTS) == set(ENV_POLICY_MAP)
    assert len({instruction(task) for task in TASKS}) == 50


def test_a_task_without_a_sentence_is_called_by_its_name() -> None:
    assert instruction("turn-page-v9") == "turn page"


@pytest.mark.parametrize("task", TASKS[::8])
def test_tasks_all_over_mt50_run_render_and_repeat_exactly(task: str, make: Make) -> None:
    environment = make(task, size=32)
    first = trace(environment, 5, steps=3)
    trace(environment, 6, steps=3)
    assert trace(environment, 5, steps=3) == first


def test_the_groups_of_tasks_are_metaworlds_own() -> None:
    from metaworld import env_dict

    groups = splits()
    assert set(groups["MT10"]) == set(env_dict.MT10_V3) and set(groups["MT50"]) == set(env_dict.MT50_V3)
    for name, official in (("ML10", env_dict.ML10_V3), ("ML45", env_dict.ML45_V3)):
        assert set(groups[f"{name}/train"]) == set(official["train"])
        assert set(groups[f"{name}/test"]) == set(official["test"])
    assert groups["MT1/reach-v3"] == groups["ML1/reach-v3"] == ("reach-v3",)


def test_several_cameras_show_what_each_shows_alone() -> None:
    cameras = ("corner2", "workspace", "gripperPOV")
    with SimulatorProcess("metaworld", View(cameras, 48, 48), {}) as simulator:
        _, state = simulator.reset("door-close-v3", 3)
        together = simulator.observe(state).images
    for camera in cameras:
        environment = Environment("door-close-v3", camera, 48)
        environment.reset(3)
        assert np.array_equal(environment.render(), together[camera])
        environment.close()


NO_EGL_LIBRARY = """
import ctypes
class CDLL(ctypes.CDLL):
    def __init__(self, name, *rest, **named):
        if "EGL" in str(name):
            raise OSError(f"{name}: cannot open shared object file")
        super().__init__(name, *rest, **named)
ctypes.cdll._dlltype = CDLL
"""


@pytest.mark.parametrize(
    ("before", "variables", "message"),
    [
        ("", {"PYOPENGL_PLATFORM": "glx"}, "EGL cannot be loaded"),
        ("", {"__EGL_VENDOR_LIBRARY_DIRS": "/nonexistent"}, "EGL cannot render"),
        (NO_EGL_LIBRARY, {}, "EGL cannot be loaded"),
        ("sys.modules['metaworld'] = None", {}, "metaworld is not installed here (no module 'metaworld')"),
        ("sys.modules['mujoco'] = None", {}, "metaworld is not installed here (no module 'mujoco')"),
    ],
    ids=["egl of another platform", "no egl vendor", "no egl library", "no metaworld", "no mujoco"],
)
def test_what_is_missing_for_the_simulator_is_one_line_with_the_fix(
    before: str,
    variables: dict[str, str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Python runs a module of this name at its start.
    (tmp_path / "sitecustomize.py").write_text(f"import sys\n{before}")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SimulatorError) as error:
        SimulatorProcess("metaworld", MetaWorld.default_view, {})
    assert message in str(error.value) and "\n" not in str(error.value)
    assert "apt-get install" in str(error.value) or "pip install" in str(error.value)
