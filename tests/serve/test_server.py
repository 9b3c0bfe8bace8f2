"""A served nano policy, reached over real sockets with openpi's own client."""

from __future__ import annotations

import contextlib
import json
import socket
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import ray
import torch
import websockets.exceptions
import websockets.sync.client
from kinematic_robot import KinematicRobot
from openpi_client.websocket_client_policy import WebsocketClientPolicy
from ray import serve
from robot_messages import observation

from defi_client.connection import Connection
from defi_client.control import Execution, run_episode
from defi_client.limits import Limits
from defi_models import presets
from defi_models.policy import DeFIPolicy
from defi_platform.config import ServeConfig
from defi_platform.config.serve import RedeployConfig
from defi_platform.errors import CheckpointError, ServeError
from defi_platform.evaluate.policy_client import PolicyClient
from defi_platform.serve.app import replica_settings
from defi_platform.serve.deployment.server import PolicyServer, deploy
from defi_platform.serve.protocols import openpi
from defi_platform.serve.replica import PolicyReplica


def test_openpi_client_is_greeted_with_what_the_policy_takes(server: PolicyServer) -> None:
    metadata = WebsocketClientPolicy(server.url).get_server_metadata()
    assert metadata == server.metadata
    assert (metadata["protocol"], metadata["preset"]) == ("openpi-websocket", "nano")
    assert (metadata["image_size"], metadata["state_dim"]) == ([64, 64], 4)
    assert (metadata["action_dim"], metadata["chunk"]) == (4, 10)


def test_openpi_client_gets_actions_with_their_timings(server: PolicyServer) -> None:
    answer = WebsocketClientPolicy(server.url).infer(observation(1))
    assert answer["actions"].shape == (10, 4) and answer["actions"].dtype == np.float32
    assert np.isfinite(answer["actions"]).all()
    timing = answer["server_timing"]
    assert timing["batch_size"] == 1 and 0 < timing["infer_ms"] < timing["total_ms"]
    assert 0 <= timing["queue_ms"] < timing["total_ms"]


def test_an_image_of_another_size_and_another_robots_extra_keys_are_taken(server: PolicyServer) -> None:
    large = {"observation/images/front": np.zeros((480, 640, 3), np.uint8), "observation/force": np.ones(3)}
    answer = WebsocketClientPolicy(server.url).infer(observation(1, **large))
    assert answer["actions"].shape == (10, 4) and answer["ignored"] == ["observation/force"]


def test_a_drawn_seed_is_told_so_that_the_action_can_be_repeated(server: PolicyServer) -> None:
    client = WebsocketClientPolicy(server.url)
    without = {key: value for key, value in observation(1).items() if key != "seed"}
    first, second = client.infer(without), client.infer(without)
    assert WebsocketClientPolicy(server.url).infer(without)["seed"] == first["seed"], (
        "session.seed is the server's"
    )
    assert first["seed"] != second["seed"] and np.abs(first["actions"] - second["actions"]).max() > 0.01
    again = client.infer(without | {"seed": first["seed"]})
    np.testing.assert_allclose(again["actions"], first["actions"], atol=1e-5)


def test_a_bad_observation_is_explained_and_the_connection_goes_on(server: PolicyServer) -> None:
    client = WebsocketClientPolicy(server.url)
    for bad, complaint in (
        ({"prompt": "open"}, "'observation/state' is missing"),
        (observation(1, **{"observation/state": np.zeros(7)}), r"shape \(7,\); expected 4"),
        (observation(1, **{"observation/images/front": np.zeros((64, 64, 3))}), "float64 array"),
    ):
        with pytest.raises(RuntimeError, match=complaint):
            client.infer(bad)
    assert client.infer(observation(1))["actions"].shape == (10, 4)


def test_a_fleet_of_32_clients_is_served_at_once_in_batches(server: PolicyServer) -> None:
    with ThreadPoolExecutor(32) as threads:
        clients = list(threads.map(lambda _: WebsocketClientPolicy(server.url), range(32)))
        wait_for_sockets(server, 32)
        alone = clients[0].infer(observation(7))["actions"]
        rounds = threads.map(lambda client: [client.infer(observation(7)) for _ in range(3)], clients)
        answers = [answer for answers in rounds for answer in answers]
    sizes = [answer["server_timing"]["batch_size"] for answer in answers]
    # As many as pay on this machine: on a CPU a few.
    assert 2 <= max(sizes) <= 8 and np.mean(sizes) > 1.5
    for answer in answers:
        np.testing.assert_allclose(answer["actions"], alone, atol=1e-3 * float(np.ptp(alone)))


def test_a_robot_is_driven_at_its_rate_within_its_limits(server: PolicyServer) -> None:
    robot = KinematicRobot(cameras=("front",))
    limits = Limits(low=[-0.2] * 4, high=[0.2] * 4)
    with Connection(server.url) as connection:
        execution = Execution(rate_hz=20.0, ensemble=0.01)
        result = run_episode(robot, connection, "go", max_steps=30, execution=execution, limits=limits)
    assert result.steps == 30 and not result.refused and not result.lost
    assert result.policies == [server.metadata["policy_digest"]]
    assert np.abs(np.stack(robot.executed)).max() <= 0.2


def test_health_and_metadata_are_http(server: PolicyServer) -> None:
    with urllib.request.urlopen(f"{server.http_url}/healthz") as response:
        assert response.status == 200 and json.load(response)["status"] == "ok"
    with urllib.request.urlopen(f"{server.http_url}/metadata") as response:
        assert {**json.load(response), "protocol": "openpi-websocket"}.items() >= server.metadata.items()


def test_our_client_outlives_the_death_of_the_only_replica(server: PolicyServer) -> None:
    client = PolicyClient(server.url, reconnect_s=120)
    before, _ = client.infer(observation(3))
    alive = [a for a in ray.util.list_named_actors(all_namespaces=True) if "#PolicyReplica#" in a["name"]]
    with websockets.sync.client.connect(server.url) as witness:
        witness.recv()
        ray.kill(ray.get_actor(alive[0]["name"], namespace=alive[0]["namespace"]))
        # The kill takes its time: whoever asks before is answered by the old one.
        with pytest.raises(websockets.exceptions.ConnectionClosed):
            witness.recv(timeout=60)
    after, _ = client.infer(observation(3))
    client.close()
    np.testing.assert_allclose(after, before, atol=1e-5)  # memory lies differently in another process


def test_a_second_policy_on_the_same_cluster_is_refused(server: PolicyServer, policy_folder: Path) -> None:
    with pytest.raises(ServeError, match="already serves the policy"):
        deploy(ServeConfig(policy=str(policy_folder), port=0))


def test_another_policy_takes_over_beside_running_clients_and_the_same_command_finds_it_again(
    server: PolicyServer, tmp_path: Path
) -> None:
    torch.manual_seed(1)
    other = DeFIPolicy(presets.policy("nano", cameras=["front"])).save_pretrained(tmp_path / "policy")
    client = WebsocketClientPolicy(server.url)
    before = client.infer(observation(1))
    assert before["policy_digest"] == server.metadata["policy_digest"]
    config = ServeConfig(
        policy=str(other),
        port=server.port,
        threads=1,
        max_batch_size=8,
        redeploy=RedeployConfig(at_once=True),
    )
    config.max_connections = 64
    server.redeploy(config)
    server.wait_for_retirement()
    after = client.infer(observation(1))  # over the same socket, in another process
    assert after["policy_digest"] == server.metadata["policy_digest"] != before["policy_digest"]
    assert np.abs(after["actions"] - before["actions"]).max() > 0.01
    assert len(serve.status().applications) == 1
    application, generation = server.deployment.application, server.deployment.generation
    server.redeploy(config)
    assert (server.deployment.application, server.deployment.generation) == (application, generation)


def test_a_folder_that_changed_after_it_was_deployed_is_not_served_again(
    ray_cluster: None, policy_folder: Path
) -> None:
    config = ServeConfig(policy=str(policy_folder), port=1, threads=1)
    settings = replica_settings(config, "0" * 64, b"0" * 32)
    with pytest.raises(CheckpointError, match="has changed since it was deployed"):
        PolicyReplica(settings)


def wait_for_sockets(server: PolicyServer, at_least: int) -> None:
    """Until the replicas, which report twice a second, have so many open."""
    deadline = time.monotonic() + 60
    while sum(r["load"]["websockets"] for state in server.states() for r in state["replicas"]) < at_least:
        assert time.monotonic() < deadline, f"fewer than {at_least} sockets are open"
        time.sleep(0.1)


def wait_until_free(port: int) -> None:
    """The process that held it ends behind the call that stops Serve."""
    deadline = time.monotonic() + 120
    while True:
        try:
            socket.create_server(("127.0.0.1", port)).close()
            return
        except OSError:
            assert time.monotonic() < deadline, f"port {port} is still held"
            time.sleep(0.2)


def test_clients_past_the_limit_are_turned_away(server: PolicyServer) -> None:
    with contextlib.ExitStack() as sockets:
        with pytest.raises(websockets.exceptions.ConnectionClosed, match="all 64 connections are taken"):
            for _ in range(65):  # some may still be open from before
                sockets.enter_context(websockets.sync.client.connect(server.url)).recv()
        wait_for_sockets(server, 64)


def test_shutdown_closes_sockets_politely_and_frees_the_port(
    server: PolicyServer, policy_folder: Path
) -> None:
    with websockets.sync.client.connect(server.url, compression=None) as client:
        client.recv()
        for _ in range(2):
            client.send(openpi.pack(observation(1)))
        client.recv()  # so that the second is being answered
        server.shutdown()
        assert openpi.unpack(client.recv())["actions"].shape == (10, 4)
        with pytest.raises(websockets.exceptions.ConnectionClosed, match="1001"):
            client.recv()
    wait_until_free(server.port)


def test_a_taken_port_is_one_clear_error(ray_cluster: None, policy_folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ServeError, match=f"127.0.0.1:{port}: the port is in use"):
            deploy(ServeConfig(policy=str(policy_folder), port=port))
