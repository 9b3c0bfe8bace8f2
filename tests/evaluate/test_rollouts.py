"""Closed-loop evaluation against a real websocket policy server and the real simulator."""

from __future__ import annotations

import math
import os
import signal
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import psutil
import pytest
from policy_server import PolicyServer, policy_server
from websockets.sync.server import ServerConnection

from defi_platform.config import EvaluateConfig, ServeConfig
from defi_platform.errors import ConfigError, ServeError
from defi_platform.evaluate.benchmarks.metaworld.benchmark import MetaWorld
from defi_platform.evaluate.episode import request_seed
from defi_platform.evaluate.policy_client import PolicyClient
from defi_platform.evaluate.results.episodes import read_episodes
from defi_platform.evaluate.rollouts import evaluate

COFFEE, BUTTON = "coffee-button-v3", "button-press-v3"
CHUNK = 8


def small(output: Path, url: str | None, **changes: object) -> EvaluateConfig:
    config = EvaluateConfig(
        serve=ServeConfig(policy="unused"),
        url=url,
        policy_name="the test's",
        tasks=[COFFEE],
        arms=["policy", "random", "expert"],
        episodes_per_task=1,
        seed=500,
        max_steps=60,
        height=64,
        width=64,
        workers=1,
        output=str(output),
    )
    return replace(config, **changes)  # type: ignore[arg-type]


def still(observation: dict[str, Any], connection: ServerConnection) -> dict[str, Any]:
    """The policy that stays where it is."""
    return {"actions": np.zeros((CHUNK, 4), np.float32)}


def rows_of(output: Path) -> list[dict[str, Any]]:
    return read_episodes(str(output))


@pytest.fixture(scope="module")
def script() -> np.ndarray:
    """What the expert does in the coffee task from seed 500, to be replayed by a policy server."""
    benchmark = MetaWorld(MetaWorld.default_view, {})
    benchmark.reset(COFFEE, 500)
    actions, solved = [], False
    while not solved:
        actions.append(benchmark.expert_action())
        solved = benchmark.step(actions[-1]).success
    benchmark.close()
    return np.stack(actions)


class Replay:
    """A policy that knows one episode by heart: chunk after chunk of it."""

    def __init__(self, script: np.ndarray, stride: int = CHUNK):
        self.position = 0
        self._script, self._stride = script, stride

    def __call__(self, observation: dict[str, Any], connection: ServerConnection) -> dict[str, Any]:
        chunk = self._script[self.position : self.position + CHUNK]
        self.position += self._stride
        padded = np.concatenate([chunk, np.zeros((CHUNK - len(chunk), 4), np.float32)])
        return {"actions": padded}


@pytest.fixture(scope="module")
def evaluated(
    script: np.ndarray, tmp_path_factory: pytest.TempPathFactory, ray_cluster: None
) -> tuple[Path, PolicyServer, dict[str, Any]]:
    output = tmp_path_factory.mktemp("evaluated") / "run"
    with policy_server(Replay(script)) as server:
        result = evaluate(small(output, server.url))
    return output, server, result.details


def test_a_policy_that_acts_as_the_expert_succeeds_as_the_expert(
    evaluated: tuple[Path, PolicyServer, dict[str, Any]], script: np.ndarray
) -> None:
    output, _, details = evaluated
    rows = {row["arm"]: row for row in rows_of(output)}
    assert rows["policy"]["success"] and rows["expert"]["success"] and not rows["random"]["success"]
    assert rows["policy"]["steps"] == rows["expert"]["steps"] == len(script)
    assert rows["random"]["steps"] == 60
    assert details["arms"]["policy"]["pooled"]["rate"] == 1.0
    assert details["arms"]["random"]["tasks"][COFFEE]["rate"] == 0.0


def test_observations_are_what_a_robot_would_send(
    evaluated: tuple[Path, PolicyServer, dict[str, Any]],
) -> None:
    _, server, _ = evaluated
    first = server.observations[0]
    benchmark = MetaWorld(MetaWorld.default_view, {})
    state = benchmark.reset(COFFEE, 500)
    assert set(first) == {"observation/images/workspace", "observation/state", "prompt", "seed"}
    assert np.array_equal(first["observation/images/workspace"], benchmark.render()["workspace"])
    assert np.array_equal(first["observation/state"], state)
    assert first["prompt"] == "press the button of the coffee machine"
    seeds = [observation["seed"] for observation in server.observations]
    assert seeds == [request_seed(500, COFFEE, CHUNK * n) for n in range(len(seeds))]
    benchmark.close()


def test_each_request_is_timed_once_and_each_chunk_carried_out_whole(
    evaluated: tuple[Path, PolicyServer, dict[str, Any]], script: np.ndarray
) -> None:
    output, server, details = evaluated
    requests = math.ceil(len(script) / CHUNK)
    assert len(server.observations) == requests == details["latency_ms"]["count"]
    assert 0 < details["latency_ms"]["p50"] <= details["latency_ms"]["p95"]
    assert [len(row["latency_ms"]) for row in rows_of(output)] == [requests, 0, 0]


def test_every_episode_has_a_video_that_shows_its_end(
    evaluated: tuple[Path, PolicyServer, dict[str, Any]],
) -> None:
    output, _, details = evaluated
    for row in rows_of(output):
        with av.open(str(output / row["video"])) as container:
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        assert len(frames) == math.ceil(row["steps"] / 2) + 1
        assert frames[0].shape == (64, 64, 3)
    assert [e["arm"] for e in details["example_episodes"]] == ["policy", "random", "expert"]


def test_execute_steps_asks_again_before_the_chunk_is_used_up(
    script: np.ndarray, tmp_path: Path, ray_cluster: None
) -> None:
    with policy_server(Replay(script, stride=5)) as server:
        evaluate(small(tmp_path, server.url, arms=["policy"], execute_steps=5, video_every=0))
        assert len(server.observations) == math.ceil(len(script) / 5)
    assert rows_of(tmp_path)[0]["success"] and rows_of(tmp_path)[0]["video"] is None
    assert not (tmp_path / "videos").exists()


def test_a_finished_evaluation_is_recognised_and_more_episodes_are_added_to_it(
    tmp_path: Path, ray_cluster: None
) -> None:
    with policy_server(still) as server:
        config = small(tmp_path, server.url, arms=["policy"], max_steps=10, video_every=0)
        evaluate(config)
        asked = len(server.observations)
        assert evaluate(config).reused and len(server.observations) == asked
        more = evaluate(replace(config, episodes_per_task=3))
        assert len(server.observations) == 3 * asked
    assert [row["seed"] for row in rows_of(tmp_path)] == [500, 501, 502]
    assert more.details["arms"]["policy"]["pooled"]["episodes"] == 3


def test_an_interrupted_evaluation_runs_only_what_is_missing(tmp_path: Path, ray_cluster: None) -> None:
    with policy_server(still) as server:
        config = small(
            tmp_path, server.url, tasks=[COFFEE, BUTTON], arms=["policy"], max_steps=10, video_every=0
        )
        before = evaluate(config).details
        (tmp_path / "summary.json").unlink()
        lost = next(row for row in rows_of(tmp_path) if row["task"] == BUTTON)
        (tmp_path / f"episodes/{lost['unit']}.json").unlink()
        server.observations.clear()
        again = evaluate(config)
        assert {observation["prompt"] for observation in server.observations} == {
            "press the button from the front"
        }
    assert again.details["arms"] == before["arms"] and not again.reused


def test_an_episode_lost_with_its_worker_is_run_again_and_counted_once(
    tmp_path: Path, ray_cluster: None
) -> None:
    killed: list[int] = []

    def kill_first_client(observation: dict[str, Any], connection: ServerConnection) -> dict[str, Any]:
        if not killed:
            killed.append(_process_behind(connection))
            os.kill(killed[0], signal.SIGKILL)
        return still(observation, connection)

    with policy_server(kill_first_client) as server:
        result = evaluate(
            small(tmp_path, server.url, arms=["policy"], episodes_per_task=2, max_steps=10, video_every=0)
        )
    assert killed and result.details["arms"]["policy"]["pooled"]["episodes"] == 2
    assert [(row["seed"], row["steps"]) for row in rows_of(tmp_path)] == [(500, 10), (501, 10)]
    assert len(server.observations) == 1 + 2 * 2


def _process_behind(connection: ServerConnection) -> int:
    """The process at the other end of a socket of this machine."""
    port = connection.remote_address[1]
    owners = [c.pid for c in psutil.net_connections("tcp") if c.laddr and c.laddr.port == port and c.pid]
    return next(pid for pid in owners if pid != os.getpid())


def test_a_connection_that_breaks_is_made_again_and_the_observation_sent_again() -> None:
    seen = []

    def hang_up_first(observation: dict[str, Any], connection: ServerConnection) -> dict[str, Any] | None:
        seen.append(observation["seed"])
        return None if len(seen) == 1 else still(observation, connection)

    with policy_server(hang_up_first) as server, PolicyClient(server.url) as client:
        actions, _ = client.infer({"seed": 3})
    assert actions.shape == (CHUNK, 4) and seen == [3, 3]


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"action_dim": 7, "preset": "paper"}, r"\(preset paper\).*gives 7 action dims, metaworld takes 4"),
        ({"state_dim": 15}, "takes 15 state dims, metaworld gives 4"),
        ({"cameras": ["static", "gripper"]}, "looks through static, gripper, the evaluation .*'workspace'"),
        ({"chunk": 4}, "chunks of 4 actions, execute_steps is 6"),
    ],
)
def test_a_policy_that_cannot_drive_the_benchmark_is_one_clear_error(
    metadata: dict[str, Any], message: str, tmp_path: Path, ray_cluster: None
) -> None:
    with policy_server(still, metadata) as server, pytest.raises(ConfigError, match=message):
        evaluate(small(tmp_path, server.url, execute_steps=6))
    assert not (tmp_path / "summary.json").exists() and not server.observations


def test_a_refused_observation_ends_the_job_with_the_servers_words(tmp_path: Path, ray_cluster: None) -> None:
    with (
        policy_server(lambda *_: "'prompt' is empty") as server,
        pytest.raises(ServeError, match="refused an observation: 'prompt' is empty"),
    ):
        evaluate(small(tmp_path, server.url, arms=["policy"]))


@pytest.mark.parametrize("actions", [np.full((CHUNK, 4), np.nan, np.float32), np.zeros((0, 4), np.float32)])
def test_actions_that_cannot_be_carried_out_are_refused(actions: np.ndarray) -> None:
    with (
        policy_server(lambda *_: {"actions": actions}) as server,
        PolicyClient(server.url) as client,
        pytest.raises(ServeError, match="without usable actions"),
    ):
        client.infer({"seed": 3})


def test_nobody_at_the_url_is_one_clear_error(tmp_path: Path, ray_cluster: None) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, but nobody listens
        url = f"ws://127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ServeError, match=r"no policy server answers at ws://.*jobs/serve_policy.py"):
            evaluate(small(tmp_path, url))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"url": "127.0.0.1:8000"}, "ws://host:port"),
        ({"arms": ["policy", "human"]}, "choose from policy, random, expert"),
        ({"tasks": ["coffee-v3"]}, "Did you mean 'coffee-"),
        ({"cameras": ["top"]}, "no camera 'top'"),
        ({"execute_steps": 0}, "execute_steps is 0"),
        ({"episodes_per_task": 0}, "episodes_per_task is 0"),
    ],
)
def test_a_setting_that_cannot_be_is_refused(
    changes: dict[str, Any], message: str, tmp_path: Path, ray_cluster: None
) -> None:
    with pytest.raises(ConfigError, match=message):
        evaluate(small(tmp_path / "run", **{"url": "ws://127.0.0.1:1", **changes}))


def test_an_evaluation_with_other_settings_is_not_mixed_into_it(
    evaluated: tuple[Path, PolicyServer, dict[str, Any]],
) -> None:
    output, server, _ = evaluated
    with pytest.raises(ConfigError, match=r"other settings \(max_steps: 60 there, 70 here"):
        evaluate(small(output, server.url, max_steps=70))


def test_a_server_that_gets_another_policy_does_not_get_into_the_same_evaluation(
    tmp_path: Path, ray_cluster: None
) -> None:
    metadata = {"policy_digest": "one"}

    def replaced(observation: dict[str, Any], connection: ServerConnection) -> dict[str, Any]:
        digest = "one" if observation["seed"] == request_seed(500, COFFEE, 0) else "two"
        return {**still(observation, connection), "policy_digest": digest}

    with policy_server(replaced, metadata) as server:
        config = small(tmp_path / "run", server.url, arms=["policy"], episodes_per_task=2, max_steps=CHUNK)
        with pytest.raises(ServeError, match="two policies: two answered where one is evaluated"):
            evaluate(config)
        metadata["policy_digest"] = "two"
        with pytest.raises(ConfigError, match=r"another policy \(digest: one there, two here\)"):
            evaluate(config)
        metadata.clear()
        with pytest.raises(ConfigError, match=r"names no policy_digest.* policy_name=NAME"):
            evaluate(replace(config, policy_name=None))
