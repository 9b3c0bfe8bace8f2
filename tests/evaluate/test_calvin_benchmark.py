"""CALVIN as a benchmark: its sequences and initial states, and what it says of itself without the simulator."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from defi_platform.config import EvaluateConfig
from defi_platform.config.loader import load_config
from defi_platform.data.sources.calvin.signals import SIGNAL_NAMES
from defi_platform.errors import SimulatorError
from defi_platform.evaluate.benchmarks.calvin import sequences
from defi_platform.evaluate.benchmarks.calvin.benchmark import Calvin
from defi_platform.evaluate.benchmarks.calvin.clones import clones
from defi_platform.evaluate.benchmarks.interface import View
from defi_platform.evaluate.benchmarks.published import beside_published
from defi_platform.evaluate.benchmarks.registry import (
    benchmark_class,
    selected_options,
    selected_tasks,
    selected_view,
)

OFFICIAL: list[dict[str, Any]] = json.loads((Path(__file__).parent / "calvin_sequences_20.json").read_text())
"""The first twenty sequences: start condition, tasks, and the scene's state by CALVIN's own function."""

QUICKLY_DRAWN = (5, 6, 9)
"""Of the twenty; the rule draws at random until five tasks fit, which takes longer for others."""


@pytest.mark.parametrize("number", QUICKLY_DRAWN)
def test_the_rule_draws_the_official_sequences(number: int) -> None:
    assert list(sequences.sequence(number)) == OFFICIAL[number]["tasks"]


def test_sequences_start_and_continue_as_the_official_ones_do() -> None:
    for number, official in enumerate(OFFICIAL):
        start = sequences.start_condition(number)
        assert list(start.items()) == list(official["start"].items())
        assert sequences.follows(start, official["tasks"])
        robot, scene = sequences.initial_state(start)
        assert scene.tolist() == official["scene_obs"]
        assert robot.tolist() == list(sequences.ROBOT)


def test_tasks_that_cannot_follow_one_another_make_no_sequence() -> None:
    start = sequences.start_condition(0)  # the drawer is open
    assert sequences.follows(start, ["close_drawer", "open_drawer"]) is False  # of one group
    assert sequences.follows(start, ["open_drawer"]) is False
    assert sequences.follows(start, ["place_in_slider"]) is False  # nothing is grasped
    assert sequences.follows(start, ["close_drawer", "turn_off_led"]) is True


def test_the_hash_is_that_of_the_package_that_the_protocol_uses() -> None:
    assert sequences.fnv1_32(b"hello ") == 406904344  # both from that package's own description
    assert sequences.fnv1_32(b"hello world") == 2805756500


def test_there_are_a_thousand_sequences() -> None:
    for number in (-1, 1000):
        with pytest.raises(IndexError, match="CALVIN has 1000"):
            sequences.sequence(number)
    assert len(sequences.start_conditions()) == 192


# ----------------------------------------------------------------------- the contract, without the simulator


def test_actions_and_states_are_named_as_in_the_dataset() -> None:
    assert (Calvin.action.names, Calvin.state_names) == (SIGNAL_NAMES.action, SIGNAL_NAMES.state)


def test_recorded_frames_have_the_shapes_of_the_benchmarks_observations(shared_data: Path) -> None:
    frames = sorted((shared_data / "calvin" / "validation").glob("episode_*.npz"))
    assert len(frames) == 120
    for path in frames[::17]:
        with np.load(path) as frame:
            for camera in Calvin.default_view.cameras:
                assert frame[f"rgb_{camera}"].shape == (*Calvin.default_view.size(camera), 3)
                assert frame[f"rgb_{camera}"].dtype == np.uint8
            assert frame["robot_obs"].shape == (len(Calvin.state_names),)
            assert frame["rel_actions"].shape == (Calvin.action.dim,)


def test_recorded_actions_are_executed_as_they_are(shared_data: Path) -> None:
    for path in sorted((shared_data / "calvin" / "validation").glob("episode_*.npz"))[::5]:
        with np.load(path) as frame:
            recorded = frame["rel_actions"][None]
        np.testing.assert_array_equal(Calvin.action.prepared(recorded), recorded.astype(np.float32))


def test_only_the_gripper_of_an_action_is_changed() -> None:
    given = np.array(
        [[3.0, -2.5, 0.1, 1.5, 0.0, -0.2, 0.3], [0, 0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, -0.01]]
    )
    executed = Calvin.action.prepared(given)
    np.testing.assert_array_equal(executed[:, :6], given[:, :6].astype(np.float32))
    assert executed[:, 6].tolist() == [1.0, -1.0, -1.0]


@pytest.mark.parametrize(("horizon", "steps"), [("official", 360), ("released", 720)])
def test_the_horizon_is_an_option(horizon: str, steps: int) -> None:
    (task,) = Calvin.tasks(Calvin.resolved_options({"horizon": horizon}))
    assert task.horizon == steps
    with pytest.raises(ValueError, match="calvin takes 'official', 'released'"):
        Calvin.resolved_options({"horizon": 500})


def test_images_keep_their_cameras_sizes_unless_one_is_asked_for() -> None:
    default = Calvin.default_view
    assert default.asked(None, None, None) == default
    smaller = default.asked(None, 96, 96)
    assert [smaller.size(camera) for camera in smaller.cameras] == [(96, 96), (96, 96)]
    assert default.asked(["gripper"], None, None).size("gripper") == (84, 84)
    assert Calvin.check_view(smaller) is None
    assert "camera static is square" in str(Calvin.check_view(View(("static",), 96, 128)))


def test_an_environment_without_clones_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(SimulatorError, match=r"install_benchmark\.py calvin clones\.calvin=FOLDER"):
        clones(str(tmp_path))
    named = {"clones": {"calvin": str(tmp_path), "calvin_env": "/nowhere"}}
    (tmp_path / "complete.json").write_text(json.dumps(named))
    with pytest.raises(
        SimulatorError, match=r"calvin: .* is no clone of mees/calvin: it has no calvin_models"
    ):
        clones(str(tmp_path))


def test_published_figures_stand_beside_with_their_horizon() -> None:
    rates = {str(k): {"rate": rate} for k, rate in enumerate((1.0, 0.75, 0.5, 0.25, 0.0), start=1)}
    table = {"length": 5, "in_a_row": rates, "average_length": {"mean": 2.5}}
    own, defi, *others = beside_published(table, 360, Calvin.published)
    assert (own["average_length"], own["in_a_row"], own["comparable"]) == (
        2.5,
        (1.0, 0.75, 0.5, 0.25, 0.0),
        True,
    )
    assert (defi["name"], defi["horizon"], defi["comparable"]) == ("DeFI", 720, False)
    assert sum(defi["in_a_row"]) == pytest.approx(defi["average_length"], abs=0.005)
    assert {row["comparable"] for row in others if row["horizon"] is None} == {None}
    assert beside_published(table, 720, Calvin.published)[1]["comparable"] is True


@pytest.mark.parametrize(("name", "horizon"), [("calvin", 360), ("calvin_released", 720)])
def test_the_configs_ask_for_all_sequences_under_their_horizon(
    name: str, horizon: int, repository: Path
) -> None:
    config = load_config(EvaluateConfig, repository / "configs" / "eval" / f"{name}.yaml")
    options = selected_options(benchmark_class(config.benchmark), config.options)
    (task,) = selected_tasks(Calvin, options, config.tasks)
    assert (task.horizon, options["renderer"], config.max_steps) == (horizon, "egl", None)
    assert (config.seed, config.episodes_per_task) == (0, Calvin.seeds)
    assert config.execute_steps == 10
    acting = (config.serve.acting.steps, config.serve.acting.sigma_min)
    assert acting == ((10, 1.0) if name == "calvin_released" else (None, None))
    view = selected_view(Calvin, config.cameras, (config.height, config.width), videos=True)
    assert view == Calvin.default_view
