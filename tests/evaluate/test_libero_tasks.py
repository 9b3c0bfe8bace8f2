"""LIBERO without its simulator: suites, instructions, horizons, and the scripts' geometry on a made-up scene."""

from __future__ import annotations

import numpy as np
import pytest

from defi_platform.evaluate.benchmarks.libero import scripts, suites
from defi_platform.evaluate.benchmarks.libero.benchmark import Libero
from defi_platform.evaluate.benchmarks.libero.expert import Script, Stage, about_vertical, rotation_between

TASKS = {task.name: task for task in Libero.tasks({})}


def test_all_suites_are_there_with_the_published_horizons() -> None:
    assert {suite: len(tasks) for suite, tasks in suites.SUITES.items()} == {
        **dict.fromkeys(("libero_spatial", "libero_object", "libero_goal", "libero_10"), 10),
        "libero_90": 90,
        **dict.fromkeys(suites.PRO, 10),
    }
    assert len(suites.PRO) == 16 and len(TASKS) == 290
    horizons = {suite: {task.horizon for task in tasks} for suite, tasks in suites.SUITES.items()}
    assert horizons["libero_spatial"] == horizons["libero_spatial_swap"] == {220}
    assert horizons["libero_object"] == horizons["libero_object_object"] == {280}
    assert horizons["libero_goal"] == horizons["libero_goal_task"] == {300}
    assert horizons["libero_10"] == horizons["libero_10_lan"] == {520}


def test_instructions_are_the_names_but_for_the_variants_that_change_them() -> None:
    assert TASKS["libero_goal/turn_on_the_stove"].instruction == "turn on the stove"
    assert TASKS["libero_goal_swap/turn_on_the_stove"].instruction == "turn on the stove"
    assert TASKS["libero_goal_lan/turn_on_the_stove"].instruction == "switch on the stove"
    assert TASKS["libero_goal_task/turn_on_the_stove"].instruction == "Turn off the stove"
    of_scene = next(task for name, task in TASKS.items() if "libero_90/KITCHEN_SCENE10_close_the_top" in name)
    assert of_scene.instruction == "close the top drawer of the cabinet"


def test_a_suite_or_a_number_stands_for_tasks() -> None:
    splits = Libero.splits()
    assert splits["libero_goal/7"] == ("libero_goal/turn_on_the_stove",)
    assert len(splits["libero"]) == 40 and len(splits["libero_pro"]) == 160 and len(splits["libero_90"]) == 90
    assert set().union(*splits.values()) == set(TASKS)


def test_scripts_are_for_tasks_that_exist() -> None:
    with_script = [name for name in TASKS if Libero.expert_can(name)]
    assert len(scripts.TASKS) == len(with_script)
    assert set(Libero.splits()["libero_spatial"]) <= set(with_script)
    assert sum(name.startswith("libero_goal/") for name in with_script) >= 4
    assert not Libero.expert_can("libero_10/" + suites.SUITES["libero_10"][0].name.split("/")[1])


def test_options_and_views_that_cannot_be_are_named() -> None:
    with pytest.raises(ValueError, match="libero has no option 'suite'"):
        Libero.resolved_options({"suite": "libero_goal"})


class MadeUpScene:
    """A hand that goes a quarter of what is asked for per step, and a bowl that sticks to closed fingers."""

    def __init__(self) -> None:
        self.hand = np.array([-0.2, 0.0, 1.17])
        self.rotation = np.diag([1.0, -1.0, -1.0])
        self.bodies = {
            "akita_black_bowl_1": np.array([-0.06, 0.2, 0.9]),
            "plate_1": np.array([0.05, 0.1, 0.9]),
        }
        self.closed = 0
        self.slipped = False

    def body(self, name: str) -> np.ndarray:
        return self.bodies[name].copy()

    def site(self, name: str) -> np.ndarray:
        raise AssertionError(f"no such place: {name}")

    def act(self, action: np.ndarray) -> None:
        move = 0.05 * action[:3] / 4
        bowl = self.bodies["akita_black_bowl_1"]
        rim = np.linalg.norm((self.hand - bowl)[:2])
        self.closed = self.closed + 1 if action[6] > 0 else 0
        held = self.closed > 8 and abs(rim - 0.047) < 0.015 and abs(self.hand[2] - bowl[2] - 0.03) < 0.015
        self.hand = self.hand + move
        if held:
            self.bodies["akita_black_bowl_1"] = bowl + move


def test_the_bowl_script_takes_the_bowl_by_its_rim_and_lets_go_over_the_plate() -> None:
    scene, script = MadeUpScene(), scripts.script("libero_goal/put_the_bowl_on_the_plate")
    heights = []
    for _ in range(220):
        action = script.action(scene)
        assert action.shape == (7,) and action.dtype == np.float32 and np.abs(action).max() <= 1.0
        scene.act(action)
        heights.append(scene.bodies["akita_black_bowl_1"][2])
    bowl, plate = scene.bodies["akita_black_bowl_1"], scene.bodies["plate_1"]
    assert max(heights) > 1.1, "carried above what stands on the table"
    assert np.linalg.norm((bowl - plate)[:2]) < 0.02 and 0.0 < bowl[2] - plate[2] < 0.04
    assert scene.closed == 0


def test_a_bowl_left_behind_is_taken_again() -> None:
    scene, script = MadeUpScene(), scripts.script("libero_goal/put_the_bowl_on_the_plate")
    for _ in range(220):
        if scene.hand[2] > 1.0 and scene.closed > 8 and not scene.slipped:
            scene.bodies["akita_black_bowl_1"] = np.array([-0.06, 0.2, 0.9])
            scene.slipped = True
        scene.act(script.action(scene))
    assert scene.slipped
    assert np.linalg.norm((scene.body("akita_black_bowl_1") - scene.body("plate_1"))[:2]) < 0.02


def test_the_first_orientation_is_held_and_turned_as_a_stage_says() -> None:
    scene = MadeUpScene()
    first = scene.rotation
    script = Script((Stage(lambda scene: scene.hand, yaw=0.5, near=0.0, most=1000),))
    script.action(scene)
    scene.rotation = about_vertical(0.3) @ first
    left = script.action(scene)[3:6]
    assert left[2] > 0 and np.allclose(left[:2], 0.0)
    scene.rotation = about_vertical(0.5) @ first
    assert np.allclose(script.action(scene)[3:6], 0.0, atol=1e-6)
    assert np.allclose(rotation_between(first, about_vertical(-0.7) @ first), [0.0, 0.0, -0.7])
