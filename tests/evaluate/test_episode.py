"""Episodes of any benchmark: chains of subtasks, what is sent to a policy, the row and the steps that come out."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import av
import numpy as np
import pytest
from faulty_benchmark import HORIZON, Counter
from policy_server import policy_server

from defi_platform.errors import ServeError
from defi_platform.evaluate.episode import (
    Expert,
    Outcome,
    RandomPolicy,
    Rollout,
    ServedPolicy,
    request_seed,
    run_episode,
)
from defi_platform.evaluate.policy_client import PolicyClient
from defi_platform.evaluate.simulation.process import SimulatorProcess


@pytest.fixture(scope="module")
def counter() -> Iterator[SimulatorProcess]:
    with SimulatorProcess("faulty_benchmark:Counter", Counter.default_view, {}) as simulator:
        yield simulator


def run(simulator: SimulatorProcess, seed: int = 0, frame_every: int = 0, **changes: Any) -> Outcome:
    rollout = Rollout("expert", "chain", seed)
    arm = changes.pop("arm", Expert())
    return run_episode(
        simulator, arm, rollout, **{"max_steps": None, "control_hz": 10.0, **changes}, frame_every=frame_every
    )


def test_the_subtasks_of_a_chain_follow_each_other_in_one_scene(counter: SimulatorProcess) -> None:
    row = run(counter).row
    assert row["success"] and row["solved"] == 3 and row["steps"] == 15 and row["reward"] == 15.0
    assert [(part["name"], part["steps"]) for part in row["subtasks"]] == [
        ("part 0", 5),
        ("part 1", 5),
        ("part 2", 5),
    ]
    assert row["initial_state"] == [0.0] and row["benchmark"] == "faulty_benchmark:Counter"


def test_the_first_subtask_that_fails_ends_the_episode(counter: SimulatorProcess) -> None:
    outcome = run(counter, seed=903)
    assert not outcome.row["success"] and outcome.row["solved"] == 1
    assert [(part["success"], part["steps"]) for part in outcome.row["subtasks"]] == [
        (True, 5),
        (False, HORIZON),
    ]
    assert run(counter, seed=903, max_steps=7).row["subtasks"][1]["steps"] == 7
    assert outcome.steps["subtask"].tolist() == [0] * 5 + [1] * HORIZON
    assert outcome.steps["step"].tolist() == list(range(5 + HORIZON))
    assert outcome.steps["success"].nonzero()[0].tolist() == [4]


def test_a_policy_is_asked_anew_for_each_subtask(counter: SimulatorProcess) -> None:
    def large(observation: dict[str, Any], connection: object) -> dict[str, Any]:
        return {"actions": np.full((8, 1), 3.0, np.float32)}  # clipped to 1

    with policy_server(large) as server, PolicyClient(server.url) as client:
        arm = ServedPolicy(
            client,
            Rollout("policy", "chain", 0),
            action=Counter.action,
            cameras={"right": "wrist"},
            execute_steps=4,
            greeting={},
        )
        outcome = run(counter, arm=arm)
    asked = server.observations
    assert [observation["prompt"] for observation in asked] == [
        f"count {n}" for n in range(3) for _ in range(2)
    ]
    steps = [0, 4, 5, 9, 10, 14]
    assert [observation["seed"] for observation in asked] == [
        request_seed(0, "chain", step) for step in steps
    ]
    assert asked[0]["observation/images/left"].shape == (16, 16, 3)
    assert asked[0]["observation/images/wrist"].shape == (32, 24, 3)
    assert [float(observation["observation/state"][0]) for observation in asked] == steps
    table = outcome.steps
    assert outcome.row["success"] and len(outcome.row["latency_ms"]) == 6
    assert (table["action"] == 3.0).all() and (table["executed"] == 1.0).all()
    digests = table["observation_sha256"]
    assert np.flatnonzero(digests != "").tolist() == steps and len(set(digests)) == 7


def test_actions_of_another_width_are_one_clear_error(counter: SimulatorProcess) -> None:
    with (
        policy_server(lambda *_: {"actions": np.zeros((8, 7), np.float32)}) as server,
        PolicyClient(server.url) as client,
        pytest.raises(ServeError, match=r"gives 7 action dims, faulty_benchmark:Counter takes 1 \(add\)"),
    ):
        arm = ServedPolicy(
            client,
            Rollout("policy", "chain", 0),
            action=Counter.action,
            cameras={},
            execute_steps=None,
            greeting={},
        )
        run(counter, arm=arm)


def test_random_actions_are_drawn_by_the_seed_within_the_bounds(counter: SimulatorProcess) -> None:
    first, again, other = (
        run(counter, arm=RandomPolicy(Rollout("random", "chain", seed), Counter.action)).steps["action"]
        for seed in (1, 1, 2)
    )
    assert np.array_equal(first, again) and not np.array_equal(first[:5], other[:5])
    assert (first >= 0).all() and (first <= 1).all()


def test_the_video_shows_all_cameras_and_the_end(counter: SimulatorProcess) -> None:
    outcome = run(counter, frame_every=4)
    with av.open(io.BytesIO(outcome.video)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(frames) == 4 + 1 and frames[0].shape == (32, 16 + 24, 3)
    assert [round(float(frame[:16, :16].mean())) for frame in frames] == pytest.approx(
        [1, 5, 9, 13, 16], abs=3
    )
