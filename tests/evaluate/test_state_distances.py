"""How far an evaluation's initial states lie from those that the policy's training recorded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from defi_platform.config import EvaluateConfig, ServeConfig
from defi_platform.evaluate import rollouts
from defi_platform.evaluate.policy import state_distances as module
from defi_platform.evaluate.policy.recorded_seeds import recorded_states
from defi_platform.evaluate.policy.state_distances import distance_line, state_distances


def place(cube: float, goal: tuple[float, float]) -> dict[str, float]:
    return {"cube_x": cube, "goal_x": goal[0], "goal_y": goal[1]}


def test_a_distance_is_the_largest_displacement_of_any_thing_to_the_nearest_recorded_state() -> None:
    recorded = [place(0.0, (0.0, 0.0)), place(1.0, (0.0, 0.0)), place(5.0, (0.0, 0.0))]
    tested = [
        place(0.0, (0.0, 0.0)),  # the first one itself
        place(0.1, (0.3, 0.4)),  # the goal moves by 0.5, the cube by less
        place(4.0, (0.0, 0.0)),  # 1 from the last
    ]
    found = state_distances({"lift": recorded, "push": recorded}, {"lift": tested, "open": tested})
    assert found == {
        "lift": {
            "tested": 3,
            "recorded": 3,
            "median": pytest.approx(0.5),
            "largest": 1.0,
            "same": 1,
            "recorded_median": 1.0,  # 1, 1 and 4 to their nearest other one
        }
    }
    assert (
        "lies 0.5 (median; at most 1) from the nearest recorded one, recorded ones 1 from"
        in distance_line(found)
    )
    alone = state_distances({"lift": recorded[:1]}, {"lift": tested})["lift"]
    assert alone["recorded_median"] is None and alone["largest"] == 4


def test_states_without_common_positions_have_no_distance() -> None:
    known = [place(0.0, (0.0, 0.0))]
    assert state_distances({"lift": [{}]}, {"lift": known}) == {}
    assert state_distances({"lift": known}, {"lift": [{}]}) == {}
    assert state_distances({"lift": known}, {"lift": [{"door_x": 1.0}]}) == {}


def test_many_states_are_compared_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    some, others = (
        [dict(zip(("a_x", "a_y"), row, strict=True)) for row in random.random((n, 2))] for n in (23, 7)
    )
    whole = state_distances({"t": others}, {"t": some})
    monkeypatch.setattr(module, "_AT_ONCE", 15)
    assert state_distances({"t": others}, {"t": some}) == whole


def test_an_evaluation_compares_the_policy_s_episodes_with_the_recordings_of_its_training(
    tmp_path: Path,
) -> None:
    meta = tmp_path / "corpus/meta"
    meta.mkdir(parents=True)
    episodes = [
        {"task": "lift", "seed": 0, "length": 9, "initial_positions": place(0.0, (0.0, 0.0))},
        {"task": "lift", "seed": 1, "length": 9, "initial_positions": place(2.0, (0.0, 0.0))},
        {"task": "push", "seed": 1, "length": 9},  # by a version that noted none
    ]
    (meta / "recording.json").write_text(json.dumps({"benchmark": "fetch", "episodes": episodes}))
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").write_text(f"data: {{corpora: {{c: {{path: {tmp_path}/corpus}}}}}}")
    config = EvaluateConfig(
        serve=ServeConfig(policy=str(tmp_path / "run/model")), benchmark="fetch", arms=["policy", "expert"]
    )

    def row(arm: str, task: str, cube: float) -> dict[str, Any]:
        positions = [{"name": name, "value": value} for name, value in place(cube, (0.0, 0.0)).items()]
        return {"arm": arm, "task": task, "initial_positions": positions}

    rows = [row("policy", "lift", 2.5), row("expert", "lift", 99.0), row("policy", "push", 0.0)]
    rows.append({"arm": "policy", "task": "lift", "success": None})  # left out
    recorded = rollouts._recorded(config)
    found = rollouts._distances(recorded, rows)
    assert list(found) == ["lift"] and (found["lift"]["tested"], found["lift"]["median"]) == (1, 0.5)
    config.url = "ws://somewhere:8000"
    assert rollouts._recorded(config) == {} == rollouts._distances({}, rows)


def test_corpora_of_a_training_that_cannot_be_read_are_named_and_the_others_count(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    contents = {"cut": "{]", "list": "[1]", "partial": '{"benchmark": "b", "episodes": [{"task": "t"}]}'}
    contents["whole"] = '{"benchmark": "b", "episodes": [{"task": "t", "seed": 3}]}'
    for name, text in contents.items():
        (tmp_path / name / "meta").mkdir(parents=True)
        (tmp_path / name / "meta/recording.json").write_text(text)
    corpora = {name: {"path": str(tmp_path / name)} for name in contents}
    corpora["far"] = {"path": "no-such-store://bucket/corpus"}
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").write_text(json.dumps({"data": {"corpora": corpora}}))
    assert recorded_states(str(tmp_path / "run/model"), "b") == {"t": {3: {}}}
    said = capsys.readouterr().out
    assert said.count("WARNING") == 4 and "no-such-store://bucket/corpus cannot be read" in said
