"""CALVIN's real simulator, where it is installed: recorded episodes replayed, and the same episode in two processes."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from policy_server import policy_server
from websockets.sync.server import ServerConnection

from defi_platform.errors import SimulatorError
from defi_platform.evaluate.benchmarks.calvin.benchmark import Calvin
from defi_platform.evaluate.benchmarks.calvin.sequences import sequence
from defi_platform.evaluate.episode import Rollout, ServedPolicy, run_episode
from defi_platform.evaluate.policy_client import PolicyClient
from defi_platform.evaluate.simulation.process import SimulatorProcess


@pytest.fixture(scope="module")
def calvins_python() -> str:
    """Interpreter of the environment that jobs/install_benchmark.py makes."""
    named = os.environ.get("DEFI_ENVIRONMENTS")
    python = Path(named or "") / "calvin" / "bin" / "python"
    if named is None or not python.exists():
        pytest.skip(
            "needs CALVIN's simulator: python jobs/install_benchmark.py calvin, then DEFI_ENVIRONMENTS=its folder"
        )
    return str(python)


def test_recorded_actions_solve_the_recorded_tasks_by_calvins_oracle(
    calvins_python: str, shared_data: Path, repository: Path
) -> None:
    recorded = shared_data / "calvin" / "validation"
    found = np.load(recorded / "lang_annotations" / "auto_lang_ann.npy", allow_pickle=True).item()
    segments = [
        [*map(int, span), task]
        for span, task in zip(found["info"]["indx"], found["language"]["task"], strict=True)
    ]
    script = Path(__file__).parent / "calvin_replay.py"
    said = subprocess.run(
        [calvins_python, script, recorded, json.dumps(segments)],
        env=os.environ | {"PYTHONPATH": f"{repository / 'platform'}{os.pathsep}{repository}"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    ).stdout
    answers = json.loads(next(line for line in said.splitlines() if line.startswith("[{")))
    assert len(answers) == len(segments) == 3
    for answer, (first, last, task) in zip(answers, segments, strict=True):
        assert answer["solved_at"] is not None, f"{task} in {first}-{last}"
        assert answer["other_task"] is False
        assert answer["hand_drift"] < 0.001  # metres, after all of the recorded actions
        assert min(answer["decibels"].values()) > 45  # they were recorded with the same renderer


def episode(simulator: SimulatorProcess, number: int) -> list[bytes]:
    """Pictures and states of sixty steps of a sequence under random actions."""
    chain, state = simulator.reset("long_horizon", number)
    assert [subtask.name for subtask in chain] == list(sequence(number))
    assert chain[0].horizon == 360
    simulator.begin(0)
    random = np.random.default_rng(number)
    seen = [state.tobytes()]
    for first in range(0, 60, 10):
        seen += [image.tobytes() for image in simulator.observe(state).images.values()]
        did = simulator.advance(np.repeat(random.uniform(-1, 1, (1, 7)), 10, axis=0), first_step=first)
        state = did.steps[-1].state
        seen.append(state.tobytes())
    return seen


def test_an_episode_is_the_same_in_another_process_and_after_another_episode(calvins_python: str) -> None:
    options = Calvin.resolved_options({"renderer": "tiny"})
    runs = []
    for before in ((5,), ()):
        with SimulatorProcess("calvin", Calvin.default_view, options, calvins_python) as simulator:
            for number in before:
                episode(simulator, number)
            runs.append(episode(simulator, 9))
            assert simulator.protocol["renderer"] == "tiny"
    assert runs[0] == runs[1]


def test_a_machine_without_egl_is_told_what_to_do(
    calvins_python: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EGL_VISIBLE_DEVICES", "99")
    options = Calvin.resolved_options({"renderer": "egl"})
    with pytest.raises(SimulatorError, match=r"libegl1 libegl-mesa0; or set options\.renderer=tiny"):
        SimulatorProcess("calvin", Calvin.default_view, options, calvins_python)


def test_actions_that_solve_a_subtask_do_so_through_a_server_and_the_next_one_is_asked_for(
    calvins_python: str,
) -> None:
    """Sequence 23's first task is solved at the 24th step by these actions when CALVIN is driven by hand."""
    random = np.random.default_rng(23)

    def answer(observation: dict[str, Any], socket: ServerConnection) -> dict[str, Any]:
        return {"actions": np.repeat(random.uniform(-1, 1, (1, 7)), 10, axis=0).astype(np.float32)}

    rollout = Rollout("policy", "long_horizon", 23)
    options = Calvin.resolved_options({"renderer": "tiny"})
    with (
        policy_server(answer) as server,
        SimulatorProcess("calvin", Calvin.default_view, options, calvins_python) as simulator,
        contextlib.closing(PolicyClient(server.url)) as client,
    ):
        policy = ServedPolicy(
            client, rollout, action=Calvin.action, cameras={}, execute_steps=10, greeting={}
        )
        outcome = run_episode(simulator, policy, rollout, max_steps=30, frame_every=0, control_hz=30)
    subtasks = [
        (part["name"], part["success"], part["steps"], part["instruction"])
        for part in outcome.row["subtasks"]
    ]
    assert subtasks == [
        ("turn_on_led", True, 24, "press the button to turn on the led light"),
        ("move_slider_left", False, 30, "push the sliding door to the left side"),
    ]
    assert (outcome.row["solved"], outcome.row["success"]) == (1, False)
    asked = [observation["prompt"] for observation in server.observations]
    assert asked == [subtasks[0][3]] * 3 + [subtasks[1][3]] * 3
    first = server.observations[0]
    assert first["observation/state"].shape == (15,)
    assert first["observation/images/static"].shape == (200, 200, 3)
    assert first["observation/images/gripper"].shape == (84, 84, 3)
    assert set(outcome.steps["executed"][:, 6].tolist()) <= {-1.0, 1.0}
