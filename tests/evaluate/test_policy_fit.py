"""Policies that do not fit, found before a simulator or Ray is started; servers of other projects among them."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import policy_server as policy_servers
import pytest
from policy_server import policy_server
from ports import free_port
from vla_eval.model_servers.predict import PredictModelServer
from vla_eval.model_servers.serve import serve as serve_model
from websockets.sync.client import connect

from defi_models.pretrained.folder import FORMAT_VERSION
from defi_platform.config import EvaluateConfig, InferenceConfig, ObservationKeysConfig, ServeConfig
from defi_platform.errors import CheckpointError, ConfigError, ServeError, SimulatorError
from defi_platform.evaluate import rollouts
from defi_platform.evaluate.asked import blocks, checked, first_seed
from defi_platform.evaluate.benchmarks import registry
from defi_platform.evaluate.benchmarks.interface import Registration
from defi_platform.evaluate.policy_client import PolicyClient, check_same_inference
from defi_platform.evaluate.rollouts import evaluate
from defi_platform.evaluate.simulator import Simulator
from defi_platform.evaluate.store.identity import POLICY, bind, policy_identity
from defi_platform.serve.deployment.folder_greeting import folder_greeting
from defi_platform.serve.inference.service import ServiceSettings
from defi_platform.storage import StorageError


@pytest.fixture(autouse=True)
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """An evaluation that gets as far as Ray is not what these tests are about."""

    def refuse(config: Any) -> None:
        raise AssertionError("Ray was to be started")

    monkeypatch.setattr(rollouts, "ray_session", refuse)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def asked(output: Path, url: str | None = None, **changes: Any) -> EvaluateConfig:
    config = EvaluateConfig(
        serve=ServeConfig(policy="unused"),
        url=url,
        policy_name="somebody's",
        benchmark="fetch",
        tasks=["reach"],
        arms=["policy"],
        episodes_per_task=2,
        height=32,
        width=32,
        video_every=0,
        output=str(output),
    )
    return replace(config, **changes)


@contextmanager
def foreign_server(actions: np.ndarray) -> Iterator[Any]:
    """A server that greets as openpi's does: without a word about its policy."""
    answers = {"actions": actions}
    with policy_server(lambda *_: answers) as server:
        yield server


@pytest.fixture
def wordless(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policy_servers, "METADATA", {})


@pytest.mark.parametrize(
    ("actions", "changes", "message"),
    [
        (np.zeros((8, 7)), {}, r"gives 7 action dims, fetch takes 4 \(delta_x, delta_y, delta_z, gripper\)"),
        (np.zeros((3, 4)), {"execute_steps": 5}, "gives chunks of 3 actions, execute_steps is 5"),
    ],
)
def test_a_server_that_says_nothing_is_asked_once(
    wordless: None, actions: np.ndarray, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with foreign_server(actions) as server:
        with pytest.raises(ConfigError, match=message):
            evaluate(asked(tmp_path / "run", server.url, **changes))
        assert len(server.observations) == 1
        sent = server.observations[0]
    assert sent["observation/images/workspace"].shape == (32, 32, 3)
    assert sent["observation/state"].shape == (7,) and sent["prompt"] == "move the hand to the red dot"


def test_empty_chunks_are_refused_before_anything_starts(wordless: None, tmp_path: Path) -> None:
    with (
        foreign_server(np.zeros((0, 4))) as server,
        pytest.raises(ServeError, match="without usable actions"),
    ):
        evaluate(asked(tmp_path / "run", server.url))


def test_it_is_asked_under_its_own_keys_and_cameras(wordless: None, tmp_path: Path) -> None:
    with foreign_server(np.zeros((8, 7))) as server:
        config = asked(
            tmp_path / "run",
            server.url,
            cameras=["workspace", "side"],
            observation_keys=ObservationKeysConfig(names="libero"),
            policy_cameras={"workspace": "image", "side": "wrist_image"},
        )
        with pytest.raises(ConfigError, match="7 action dims"):
            evaluate(config)
    keys = {"observation/image", "observation/wrist_image", "observation/state", "prompt", "seed"}
    assert set(server.observations[0]) == keys


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"benchmark": "fetsh"}, "none of the name 'fetsh'. Did you mean 'fetch'"),
        ({"tasks": ["pick-and-plce"]}, "no task 'pick-and-plce'. Did you mean 'pick-and-place'"),
        ({"tasks": ["reach", "reach"]}, "names 'reach' twice"),
        ({"tasks": []}, "tasks is empty"),
        ({"episodes_per_task": 0}, "episodes_per_task is 0"),
        ({"height": 0}, "height and width are 0 and 32"),
        ({"policy_cameras": {"top": "image"}}, r"names 'top'; the evaluation looks through workspace"),
        ({"observation_keys": ObservationKeysConfig(names="droid")}, "Name one: observation_keys.state"),
        ({"options": {"success": "sometimes"}}, "success is 'sometimes'"),
    ],
)
def test_mistakes_in_the_config_are_found_first(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        evaluate(asked(tmp_path / "run", "ws://127.0.0.1:1", **changes))


def test_an_output_that_cannot_be_written_is_found_first(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder, message in ((tmp_path / "file", "cannot be written"), ("", "output is empty")):
        config = replace(asked(tmp_path, arms=["random"]), output=str(folder))
        with pytest.raises((StorageError, ConfigError), match=message):
            evaluate(config)


def test_a_benchmark_that_is_not_installed_is_said_with_the_one_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = registry.REGISTERED["fetch"].where
    absent = Registration(where, extra="fetch", needs=("module_that_nobody_has",))
    monkeypatch.setitem(registry.REGISTERED, "fetch", absent)
    config = asked(tmp_path / "run", arms=["random"])
    with pytest.raises(SimulatorError, match=r"no module 'module_that_nobody_has'.*pip install .*\[fetch\]"):
        evaluate(config)
    monkeypatch.setitem(registry.REGISTERED, "fetch", Registration(where, environment="calvin"))
    with pytest.raises(SimulatorError, match=r"no complete environment .*jobs/install_benchmark.py fetch"):
        evaluate(config)


def trained_on(tmp_path: Path, benchmark: str, seeds: tuple[int, ...]) -> str:
    """Folder of a policy whose training had recordings of some seeds of the task reach."""
    meta = tmp_path / "recording/labelled/meta"
    meta.mkdir(parents=True)
    episodes = [{"task": "reach", "seed": seed, "length": 9} for seed in seeds]
    (meta / "recording.json").write_text(json.dumps({"benchmark": benchmark, "episodes": episodes}))
    written_folder(tmp_path / "run/model")
    corpora = f"data: {{corpora: {{robots: {{path: {tmp_path}/recording/labelled}}}}}}\n"
    (tmp_path / "run/config.yaml").write_text(corpora)
    return str(tmp_path / "run/model")


def test_seeds_that_the_policy_was_trained_on_are_refused(tmp_path: Path) -> None:
    folder = trained_on(tmp_path, "fetch", (0, 1, 4))
    config = asked(tmp_path / "out", seed=3, serve=ServeConfig(policy=folder))
    with pytest.raises(
        ConfigError, match=r"of 1 of the 2 initial states of reach \(seeds from 4\).*Set seed=5"
    ):
        evaluate(config)
    for fits in ({"seed": 5}, {"tasks": ["push"]}):
        with pytest.raises(AssertionError, match="Ray was to be started"):
            evaluate(replace(config, **fits))


def test_seeds_that_only_a_pretraining_saw_are_refused_too(tmp_path: Path) -> None:
    trained_on(tmp_path, "fetch", (0, 1, 20))
    written_folder(tmp_path / "policy/model")
    (tmp_path / "gidm").mkdir()
    # The policy's own corpora say nothing; it began with GIDM, which began with the run that did.
    (tmp_path / "policy/config.yaml").write_text(f"{{gfdm: /converted/model, gidm: {tmp_path}/gidm/model}}")
    (tmp_path / "gidm/config.yaml").write_text(f"model: {{init_from: {tmp_path}/run/model}}")
    config = asked(tmp_path / "out", seed=19, serve=ServeConfig(policy=str(tmp_path / "policy/model")))
    with pytest.raises(
        ConfigError, match=r"1 of the 2 initial states of reach \(seeds from 20\).*Set seed=21"
    ):
        evaluate(config)


def test_a_fixed_number_of_initial_states_begins_with_the_first_and_says_which_were_learned_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = trained_on(tmp_path, "fetch", (0, 1, 4))
    config = asked(tmp_path / "out", serve=ServeConfig(policy=folder))
    assert first_seed(config) == 10_000
    monkeypatch.setattr(registry.benchmark_class("fetch"), "seeds", 50)
    assert first_seed(config) == 0 and checked(config).seed == 0
    assert {unit.seed for block in blocks(checked(config)) for unit in block} == {0, 1}
    with pytest.raises(AssertionError, match="Ray was to be started"):
        evaluate(config)
    assert "trained on recordings of 2 of these initial states" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="initial states up to 50; fetch has 50 per task"):
        checked(replace(config, seed=49))


def written_folder(folder: Path, **changes: Any) -> Path:
    """A policy folder without weights: all that is looked at before a policy is served."""
    head = {"proprio_dim": 0, "action_dim": 4, "chunk": 10}
    config = {"preset": "nano", "cameras": ["workspace"], "views": 1, "adapter": {"head": head}, **changes}
    folder.mkdir(parents=True)
    header = {"format": "defi_models", "version": FORMAT_VERSION, "config": config}
    (folder / "config.json").write_text(json.dumps(header))
    return folder


def test_a_policy_folder_that_does_not_fit_is_found_before_anything_starts(tmp_path: Path) -> None:
    head = {"proprio_dim": 5, "action_dim": 7, "chunk": 10}
    folder = written_folder(
        tmp_path / "other", cameras=["static", "gripper"], views=2, adapter={"head": head}
    )
    config = asked(tmp_path / "out", serve=ServeConfig(policy=str(folder)), execute_steps=11)
    with pytest.raises(ConfigError, match="does not fit") as found:
        evaluate(config)
    for part in (
        "7 action dims, fetch takes 4",
        "takes 5 state dims",
        "looks through static, gripper",
        "10 actions",
    ):
        assert part in str(found.value)
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        evaluate(replace(config, serve=ServeConfig(policy=str(tmp_path))))


def test_a_policy_in_another_precision_is_another_one_by_folder_and_by_url(tmp_path: Path) -> None:
    folder = str(written_folder(tmp_path / "policy"))
    float32, bfloat16 = (
        ServeConfig(policy=folder, model=InferenceConfig(dtype=dtype)) for dtype in ("float32", "bfloat16")
    )
    greetings = [folder_greeting(config) for config in (float32, bfloat16)]
    served = ServiceSettings.of(bfloat16).inference
    assert greetings[1]["inference"] == served and greetings[0]["inference"] != served
    one, two = (policy_identity(greeting, None, folder) for greeting in greetings)
    bind(str(tmp_path / "out"), POLICY, one)
    with pytest.raises(
        ConfigError, match=r"another policy \(inference.dtype: float32 there, bfloat16 here\)"
    ):
        bind(str(tmp_path / "out"), POLICY, two)
    check_same_inference(None, served, "ws://a:1")
    with pytest.raises(ServeError, match=r"ws://a:1 computes with .*bfloat16.*episodes are of .*float32"):
        check_same_inference(greetings[0]["inference"], served, "ws://a:1")


def test_a_server_that_comes_back_in_another_precision_is_seen(tmp_path: Path) -> None:
    def answer(observation: dict[str, Any], connection: object) -> dict[str, Any]:
        return {"actions": np.zeros((1, 4), np.float32)}

    with policy_server(answer, {"inference": {"dtype": "float32"}}) as server:
        client = PolicyClient(server.url)
        client.infer({})
    with (
        client,
        policy_server(answer, {"inference": {"dtype": "bfloat16"}}, int(server.url.rpartition(":")[2])),
    ):
        client.infer({})
        assert client.metadata["inference"] == {"dtype": "bfloat16"}


OPENPI = os.environ.get("PEER_OPENPI")


@pytest.mark.skipif(not OPENPI, reason="needs PEER_OPENPI, a checkout of openpi")
def test_our_worker_evaluates_openpis_own_server(tmp_path: Path) -> None:
    """The server of openpi's checkout, which names images as its LIBERO policies do."""
    file = Path(str(OPENPI)) / "src/openpi/serving/websocket_policy_server.py"
    spec = importlib.util.spec_from_file_location("websocket_policy_server", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    class Towards:
        """Moves the hand to the goal, which the state names."""

        def infer(self, seen: dict[str, Any]) -> dict[str, Any]:
            assert seen["observation/image"].shape == (32, 32, 3) and seen["prompt"]
            state = seen["observation/state"]
            return {"actions": np.tile(np.append(10 * (state[4:] - state[:3]), 0.0), (2, 1)).clip(-1, 1)}

    with connect_when_up(module.WebsocketPolicyServer(Towards(), "127.0.0.1", free_port())) as url:
        config = asked(
            tmp_path / "run",
            url,
            cameras=["workspace"],
            observation_keys=ObservationKeysConfig(names="libero"),
            policy_cameras={"workspace": "image"},
        )
        worker = Simulator(config, url)
        rows = [worker.work(rollouts.Rollout("policy", "reach", seed)).row for seed in range(10)]
    assert sum(row["success"] for row in rows) == 10


@contextmanager
def connect_when_up(server: Any) -> Iterator[str]:
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"ws://127.0.0.1:{server._port}"
    for _ in range(600):
        try:
            connect(url, proxy=None).close()
            break
        except OSError:
            time.sleep(0.1)
    yield url


class _Towards(PredictModelServer):
    """A model server of vla-eval that moves the hand to the goal, and counts the episodes."""

    def __init__(self, dims: int = 4) -> None:
        super().__init__()
        self.dims, self.episodes = dims, 0

    async def on_episode_start(self, config: dict[str, Any], ctx: Any) -> None:
        self.episodes += 1
        await super().on_episode_start(config, ctx)

    def predict(self, obs: dict[str, Any], ctx: Any) -> dict[str, Any]:
        assert obs["images"]["workspace"].shape == (32, 32, 3)
        assert obs["task_description"] == "move the hand to the red dot"
        state = np.asarray(obs["states"])
        action = np.zeros(self.dims, np.float32)
        action[:3] = (10 * (state[4:] - state[:3])).clip(-1, 1)
        return {"actions": action}


@contextmanager
def model_server(model: Any) -> Iterator[str]:
    """The server that vla-eval's own command starts."""
    port = free_port()
    threading.Thread(target=serve_model, args=(model, "127.0.0.1", port), daemon=True).start()
    for _ in range(600):
        try:
            socket.create_connection(("127.0.0.1", port)).close()
            break
        except OSError:
            time.sleep(0.1)
    yield f"vla-eval+ws://127.0.0.1:{port}"


def test_our_worker_evaluates_a_model_server_of_vla_eval(tmp_path: Path) -> None:
    model = _Towards()
    with model_server(model) as url:
        worker = Simulator(asked(tmp_path / "run", url), url)
        rows = [worker.work(rollouts.Rollout("policy", "reach", seed)).row for seed in range(5)]
        assert sum(row["success"] for row in rows) == 5
        assert [len(row["latency_ms"]) for row in rows] == [row["steps"] for row in rows]
        assert model.episodes == 5


def test_a_model_server_of_another_robot_is_found_first(tmp_path: Path) -> None:
    with (
        model_server(_Towards(dims=7)) as url,
        pytest.raises(ConfigError, match="gives 7 action dims, fetch takes 4"),
    ):
        evaluate(asked(tmp_path / "run", url))
    with pytest.raises(ServeError, match="no model server answers"):
        evaluate(asked(tmp_path / "run", f"vla-eval+ws://127.0.0.1:{free_port()}"))
