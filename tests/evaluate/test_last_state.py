"""Tasks that their last state decides, instructions that change on the way, initial states that differ by task."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from last_state_benchmark import CHANGE_AT, HORIZON, LastState
from policy_server import policy_server

from defi_platform.config import EvaluateConfig, RecordConfig, ServeConfig, StopRuleConfig
from defi_platform.errors import ConfigError, SimulatorError
from defi_platform.evaluate.asked import blocks, checked
from defi_platform.evaluate.attempts import Attempt
from defi_platform.evaluate.episode import Expert, Outcome, Rollout, ServedPolicy, run_episode
from defi_platform.evaluate.policy.recorded_seeds import seen_seeds
from defi_platform.evaluate.policy_client import PolicyClient
from defi_platform.evaluate.record import _checked, _run_expert
from defi_platform.evaluate.simulation.process import SimulatorProcess

NAME = "last_state_benchmark:LastState"


@pytest.fixture(scope="module")
def simulator() -> Iterator[SimulatorProcess]:
    with SimulatorProcess(NAME, LastState.default_view, {}) as opened:
        yield opened


def run(simulator: SimulatorProcess, task: str, max_steps: int | None = None, arm: Any = None) -> Outcome:
    return run_episode(
        simulator,
        arm or Expert(),
        Rollout("expert", task, 0),
        max_steps=max_steps,
        frame_every=0,
        control_hz=10.0,
    )


def test_the_last_state_decides_where_a_task_says_so(simulator: SimulatorProcess) -> None:
    lost = run(simulator, "pass")  # met from step 5 to 7, and left again
    assert lost.steps["success"].nonzero()[0].tolist() == [4, 5, 6]
    assert (lost.row["success"], lost.row["steps"]) == (False, HORIZON)
    kept = run(simulator, "pass", max_steps=6)
    assert (kept.row["success"], kept.row["steps"]) == (True, 6)
    assert (run(simulator, "free").row["success"], run(simulator, "free").row["steps"]) == (True, 5)


def test_a_new_instruction_is_asked_about_at_once(simulator: SimulatorProcess) -> None:
    with (
        policy_server(lambda *_: {"actions": np.ones((8, 1), np.float32)}) as server,
        PolicyClient(server.url) as client,
    ):
        arm = ServedPolicy(
            client,
            Rollout("policy", "put", 0),
            action=LastState.action,
            cameras={},
            execute_steps=8,
            greeting={},
        )
        outcome = run(simulator, "put", arm=arm)
    prompts = [observation["prompt"] for observation in server.observations]
    assert prompts == ["open it", "put it in"]
    assert [float(one["observation/state"][0]) for one in server.observations] == [0, CHANGE_AT]
    assert outcome.row["success"] and outcome.row["steps"] == HORIZON
    assert outcome.row["instructions"] == [{"step": CHANGE_AT, "text": "put it in"}]


def config(tmp_path: Path, **changes: Any) -> EvaluateConfig:
    return replace(
        EvaluateConfig(
            serve=ServeConfig(policy=""),
            benchmark=NAME,
            tasks=["pass", "put"],
            arms=["expert"],
            output=str(tmp_path),
        ),
        **changes,
    )


def test_each_task_has_its_own_initial_states(tmp_path: Path) -> None:
    every = checked(config(tmp_path, episodes_per_task=None))
    assert every.seed == 0
    (of_pass, of_put) = blocks(every)
    assert [unit.seed for unit in of_pass] == [0, 1, 2] and [unit.seed for unit in of_put] == [0, 1, 2, 3, 4]
    by_seed = blocks(replace(every, stop_rule=StopRuleConfig(p0=0.3, p1=0.6)))
    assert [[unit.task for unit in block] for block in by_seed] == [["pass", "put"]] * 3 + [["put"]] * 2
    assert len(blocks(checked(config(tmp_path, episodes_per_task=5, tasks=["put"])))[0]) == 5
    with pytest.raises(
        ConfigError, match=r"up to 3; .* has 3 per task, as has pass, from 0 to 2\. episodes_per_task=null"
    ):
        checked(config(tmp_path, episodes_per_task=4))
    with pytest.raises(ConfigError, match=r"episodes_per_task is null.* free of .* has no fixed number"):
        checked(config(tmp_path, episodes_per_task=None, tasks=["put", "free"]))
    assert checked(config(tmp_path, tasks=["free", "put"], episodes_per_task=5, seed=0)).tasks == [
        "free",
        "put",
    ]


def test_only_tasks_without_end_of_initial_states_refuse_those_of_the_training() -> None:
    known = {"pass": {0: {}, 1: {}}, "free": {7: {}}}
    few = {"pass": range(3), "free": range(5)}
    assert seen_seeds("p", known, LastState, {}, few) == {"pass": [0, 1]}
    with pytest.raises(ConfigError, match=r"of 1 of the 9 initial states of free"):
        seen_seeds("p", known, LastState, {}, {"pass": range(3), "free": range(9)})


def test_demonstrations_of_such_tasks_end_at_their_horizon(
    tmp_path: Path, simulator: SimulatorProcess
) -> None:
    recording = RecordConfig(
        benchmark=NAME,
        tasks=["pass", "put"],
        episodes_per_task=3,
        labelled_per_task=0,
        output=str(tmp_path),
        max_steps=6,
    )
    plan = _checked(recording)
    assert _run_expert(simulator, Attempt("pass", 0), recording, plan).length == 6
    assert _run_expert(simulator, Attempt("pass", 0), replace(recording, max_steps=8), plan).length == 0
    with pytest.raises(SimulatorError, match="its instruction changes on the way"):
        _run_expert(simulator, Attempt("put", 0), recording, plan)
    with pytest.raises(ConfigError, match="has 3 per task, as has pass"):
        _checked(replace(recording, episodes_per_task=4))
