"""Episodes of a kinematic robot against a real openpi server that is good, slow, late, wrong, or killed."""

from __future__ import annotations

import threading
import time
from typing import Any

import numpy as np
import pytest
from control_clock import ControlClock, controlled
from kinematic_robot import SCALE, KinematicRobot, towards
from policy_server import policy_server
from ports import free_port

from defi_client.connection import Connection
from defi_client.control import EpisodeResult, Execution, run_episode
from defi_client.errors import FitError, RefusedError, StoppedError, UnreachableError
from defi_client.limits import Limits

GOAL = np.array([0.4, 0.9, 0.4, 1.0])
FAST = 100.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> ControlClock:
    return controlled(monkeypatch)


def episode(robot: KinematicRobot, url: str, max_steps: int = 200, **execution: Any) -> EpisodeResult:
    settings: dict[str, Any] = {"rate_hz": FAST, "give_up_s": 60.0, **execution}
    with Connection(url) as connection:
        return run_episode(
            robot,
            connection,
            "go there",
            max_steps=max_steps,
            execution=Execution(**settings),
            done=lambda: bool(np.abs(robot.hand - GOAL).max() < 0.01),
        )


def wait_until(condition: Any) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def slow(clock: ControlClock, answer: Any, seconds: float) -> Any:
    def later(observation: dict[str, Any], socket: Any) -> Any:
        clock.answers_after(seconds)
        return answer(observation, socket)

    return later


@pytest.mark.parametrize(
    "execution", [{}, {"overlap": False}, {"ensemble": 0.1}, {"execute_steps": 3}], ids=str
)
def test_a_policy_drives_a_robot_to_its_goal(execution: dict[str, Any], clock: ControlClock) -> None:
    robot = KinematicRobot()
    with policy_server(towards(GOAL)) as server:
        result = episode(robot, server.url, **execution)
    assert result.ended == "done" and result.steps == len(robot.executed) and result.policies == ["d1"]
    assert robot.holds[-1] == result.steps, "it holds at the end"
    assert result.asked >= len(result.latency_ms) > 2 and not result.late and not result.refused
    assert 0 <= result.jitter_ms["p50"] <= result.jitter_ms["max"]
    first = server.observations[0]
    assert set(first) == {"observation/images/workspace", "observation/state", "prompt", "episode"}
    assert len({observation["episode"] for observation in server.observations}) == 1


def test_overlap_asks_early_enough_for_no_step_to_wait(clock: ControlClock) -> None:
    held = {}
    for overlap in (True, False):
        robot = KinematicRobot()
        with policy_server(slow(clock, towards(GOAL, chunk=16), 0.04)) as server:
            result = episode(robot, server.url, max_steps=60, overlap=overlap, rate_hz=50.0)
        assert result.steps >= 39
        held[overlap] = sum(place > 0 for place in robot.holds[:-1])
    assert held[True] == 0, "only the first chunk is waited for"
    assert held[False] >= 3


def test_a_late_answer_is_dropped_and_the_robot_holds(clock: ControlClock) -> None:
    calls = []

    def late_at_first(observation: dict[str, Any], socket: Any) -> Any:
        calls.append(observation.get("deadline_ms"))
        return slow(clock, towards(GOAL), 0.15 if len(calls) == 1 else 0)(observation, socket)

    robot = KinematicRobot()
    with policy_server(late_at_first) as server:
        result = episode(robot, server.url, answer_within_s=0.1)
    assert result.ended == "done" and result.late == 1 and result.held >= 10
    assert set(calls) == {100.0}, "our server is told when an answer would be of no use"


def test_a_server_that_is_always_late_ends_the_episode(clock: ControlClock) -> None:
    robot = KinematicRobot()
    with policy_server(slow(clock, towards(GOAL), 0.05)) as server:
        with pytest.raises(
            StoppedError, match=r"no action for 0\.3.*took 0\.0\d+ s, 0\.020 s are allowed"
        ) as caught:
            episode(robot, server.url, answer_within_s=0.02, give_up_s=0.3)
    assert not robot.executed and caught.value.result.ended == "stopped" and caught.value.result.late > 2


def test_a_killed_server_is_waited_for_in_place_and_found_again() -> None:
    robot, killed, there = KinematicRobot(), threading.Event(), threading.Event()

    def dies(observation: dict[str, Any], socket: Any) -> Any:
        if len(robot.executed) >= 8:
            killed.set()
            return None
        return towards(GOAL)(observation, socket)

    def restart(port: int) -> None:
        killed.wait(60)
        wait_until(lambda: len(robot.holds) >= 10)
        with policy_server(towards(GOAL), port=port):
            there.wait(60)

    with policy_server(dies, port=free_port()) as server:
        port = int(server.url.rpartition(":")[2])
        with Connection(server.url) as connection:
            again = threading.Thread(target=restart, args=(port,))

            def done() -> bool:
                if killed.is_set() and not again.is_alive() and not there.is_set():
                    server.stop()
                    again.start()
                return bool(np.abs(robot.hand - GOAL).max() < 0.01)

            result = run_episode(
                robot,
                connection,
                "go",
                max_steps=200,
                execution=Execution(rate_hz=FAST, give_up_s=60),
                done=done,
            )
        there.set()
        again.join()
    assert result.ended == "done" and result.lost >= 1 and result.held >= 10
    assert connection.reconnections >= 1


def test_a_server_that_stays_away_is_given_up_after_the_time_from_the_last_action(
    clock: ControlClock,
) -> None:
    robot = KinematicRobot()

    def once(observation: dict[str, Any], socket: Any) -> Any:
        return None if robot.executed else towards(GOAL)(observation, socket)

    with policy_server(once) as server:
        with pytest.raises(
            StoppedError, match=r"gave no action for 0\.4.* holds its position after \d+ actions"
        ) as caught:
            episode(robot, server.url, give_up_s=0.4, execute_steps=8)
    result = caught.value.result
    assert result.lost > 1 and result.wall_s == pytest.approx(8 / FAST + 0.4, abs=2.1 / FAST)
    assert result.steps == 8 and robot.holds[-1] == 8


@pytest.mark.parametrize(
    ("actions", "words"),
    [
        (np.full((8, 4), np.nan), "usable actions"),
        (np.zeros((0, 4)), "usable actions"),
        (np.zeros((8, 7)), "7 action dims, the robot takes 4"),
    ],
    ids=["NaN", "empty", "width"],
)
def test_actions_that_cannot_be_used_never_reach_the_robot(actions: Any, words: str) -> None:
    robot = KinematicRobot()
    with policy_server(lambda observation, socket: {"actions": actions}, {"action_dim": 4}) as server:
        with pytest.raises(StoppedError, match=rf"3 times in a row: .*{words}"):
            episode(robot, server.url)
    assert not robot.executed and robot.holds


def test_one_bad_answer_is_survived() -> None:
    robot, calls = KinematicRobot(), []

    def bad_once(observation: dict[str, Any], socket: Any) -> Any:
        calls.append(1)
        answer = towards(GOAL)(observation, socket)
        return {"actions": answer["actions"] * np.nan} if len(calls) == 2 else answer

    with policy_server(bad_once) as server:
        result = episode(robot, server.url)
    assert result.ended == "done" and result.refused == 1


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({"action_dim": 7}, "gives 7 action dims, the robot takes 4"),
        ({"state_dim": 9}, "takes 9 state dims, the robot gives 4"),
        ({"cameras": ["wrist"]}, "looks through wrist, the robot has workspace"),
    ],
    ids=["actions", "states", "cameras"],
)
def test_a_policy_of_another_robot_is_refused_before_anything_moves(
    metadata: dict[str, Any], words: str
) -> None:
    robot = KinematicRobot()
    with policy_server(towards(GOAL), metadata) as server, pytest.raises(FitError, match=words):
        episode(robot, server.url)
    assert not robot.executed and not server.observations


def test_a_foreign_server_s_words_about_a_camera_end_the_episode() -> None:
    robot = KinematicRobot()
    with policy_server(
        lambda observation, socket: "no image of camera 'wrist'", {"cameras": ["*"]}
    ) as server:
        with pytest.raises(StoppedError, match="no image of camera 'wrist'"):
            episode(robot, server.url)
    assert not robot.executed


def test_limits_hold_whatever_the_policy_says() -> None:
    robot, random = KinematicRobot(), np.random.default_rng(0)

    def wild(observation: dict[str, Any], socket: Any) -> Any:
        return {"actions": random.normal(0, 3, (8, 4))}

    low, high = [-0.1, 0.4, 0.1, -np.inf], [0.1, 0.6, 0.3, np.inf]
    limits = Limits(
        low=[-1] * 4, high=[1] * 4, speed=[40.0] * 4, box_low=low, box_high=high, relative=True,
        position=[0, 1, 2, None], scale=SCALE,
    )  # fmt: skip
    with policy_server(wild) as server, Connection(server.url) as connection:
        result = run_episode(
            robot, connection, "x", max_steps=80, execution=Execution(rate_hz=FAST), limits=limits
        )
    path, executed = np.stack(robot.path)[:, :3], np.stack(robot.executed)
    assert (path >= np.array(low[:3]) - 1e-9).all() and (path <= np.array(high[:3]) + 1e-9).all()
    assert np.abs(executed).max() <= 0.4 + 1e-9
    assert {"range", "box", "speed"} <= set(result.limited)


def test_an_episode_that_ends_while_a_question_is_open_leaves_the_connection_usable() -> None:
    robot, open_question = KinematicRobot(), threading.Event()

    def hangs(observation: dict[str, Any], socket: Any) -> Any:
        if robot.executed and not open_question.is_set():
            open_question.set()
            time.sleep(0.5)
            return {"actions": np.full((8, 4), 9.0)}
        return towards(GOAL)(observation, socket)

    with policy_server(hangs) as server, Connection(server.url) as connection:
        execution = Execution(rate_hz=FAST)
        run_episode(robot, connection, "x", max_steps=50, execution=execution, done=open_question.is_set)
        actions, _ = connection.infer({"observation/state": robot.state(), "prompt": "x"})
    assert np.abs(actions).max() <= 0.5, "not the answer to the question before"


def test_a_foreign_greeting_is_not_believed_blindly() -> None:
    for metadata in ({"action": {"execute_steps": "unknown"}}, {"action": "deltas"}, {"cameras": None}):
        with policy_server(towards(GOAL), metadata) as server:
            assert episode(KinematicRobot(), server.url, max_steps=3).steps == 3


def test_a_server_that_comes_back_with_another_policy_greets_anew() -> None:
    with policy_server(towards(GOAL), {"action_dim": 4}, port=free_port()) as server:
        connection = Connection(server.url)
        port = int(server.url.rpartition(":")[2])
    with policy_server(towards(GOAL), {"action_dim": 7}, port=port), connection:
        connection.infer({"observation/state": np.zeros(4), "prompt": "x"})
        with pytest.raises(FitError, match="gives 7 action dims"):
            run_episode(KinematicRobot(), connection, "x", max_steps=3)


def test_an_answer_that_grew_old_while_a_step_stalled_is_late(clock: ControlClock) -> None:
    robot = KinematicRobot()
    execute = robot.execute

    def stalls(action: Any) -> None:
        execute(action)
        if len(robot.executed) == 4:
            clock.sleep(0.3)

    robot.execute = stalls  # type: ignore[method-assign]
    with policy_server(slow(clock, towards(GOAL), 0.01)) as server:
        result = episode(robot, server.url, execute_steps=4, answer_within_s=0.2)
    assert result.ended == "done" and result.late == 1 and max(result.latency_ms) < 200


@pytest.mark.parametrize(
    "setting",
    [{"rate_hz": np.inf}, {"give_up_s": 0}, {"answer_within_s": np.nan}, {"max_refused": 0}],
    ids=str,
)
def test_an_execution_that_cannot_be_is_refused(setting: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(setting))):
        Execution(**setting)


def test_a_robot_that_is_lost_and_cannot_hold_leaves_no_thread() -> None:
    robot, before = KinematicRobot(), threading.active_count()
    robot.execute = robot.hold = lambda *action: 1 / 0  # type: ignore[assignment, method-assign]
    with policy_server(towards(GOAL)) as server, pytest.raises(ZeroDivisionError):
        episode(robot, server.url)
    with policy_server(towards(GOAL)) as server, pytest.raises(ValueError, match="ensemble is -1"):
        episode(robot, server.url, ensemble=-1)
    wait_until(lambda: not {thread.name for thread in threading.enumerate()} & {"asker", "recorder"})
    wait_until(lambda: threading.active_count() <= before + 1)


def test_errors_of_the_robot_pass_after_a_hold() -> None:
    robot = KinematicRobot()
    robot.images = lambda: 1 / 0  # type: ignore[assignment]
    with policy_server(towards(GOAL)) as server, pytest.raises(ZeroDivisionError):
        episode(robot, server.url)
    assert robot.holds


def test_a_connection_says_what_is_wrong() -> None:
    with pytest.raises(UnreachableError, match=r"no policy server answers at ws://127\.0\.0\.1:9"):
        Connection("ws://127.0.0.1:9")
    with policy_server(lambda observation, socket: "no") as server, Connection(server.url) as connection:
        with pytest.raises(RefusedError, match="refused an observation: no"):
            connection.infer({"prompt": "x"})
