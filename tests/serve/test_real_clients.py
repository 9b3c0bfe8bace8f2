"""The clients that others have published, against real sockets."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from hostile_messages import picture
from openpi_client.websocket_client_policy import WebsocketClientPolicy
from replica_in_process import DIGEST, SPEC, Served, served
from robot_messages import observation
from vla_eval.benchmarks.base import Benchmark
from vla_eval.connection import Connection
from vla_eval.protocol.numpy_codec import get_image_format, set_image_format
from vla_eval.runners.sync_runner import SyncEpisodeRunner

from defi_platform.evaluate.policy_client import PolicyClient
from defi_platform.serve.deployment.server import PolicyServer, _ask_health
from defi_platform.serve.observation import Observation


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with served() as running:
        yield running


def test_64_openpi_clients_all_progress_and_each_gets_its_own_actions(server: Served) -> None:
    def run(number: int) -> int:
        client = WebsocketClientPolicy(server.url)
        assert client.get_server_metadata()["policy_digest"] == DIGEST
        for step in range(8):
            sent = observation(100 * number + step)
            answer = client.infer(sent)
            np.testing.assert_array_equal(answer["actions"][0], sent["observation/state"])
            assert answer["policy_digest"] == DIGEST and answer["seed"] == sent["seed"]
        client._ws.close()
        return step

    with ThreadPoolExecutor(64) as threads:
        assert list(threads.map(run, range(64))) == [7] * 64
    assert max(server.service.snapshot().batch_sizes) > 4, "those who ask at once share a forward pass"


def test_a_proxy_in_the_environment_is_in_nobodys_way(
    server: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "all_proxy", "ALL_PROXY", "ws_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    _ask_health(PolicyServer("127.0.0.1", server.port, False, cast(Any, None)))
    with PolicyClient(server.url) as client:
        assert client.infer(observation(1))[0].shape == (10, 4)


class Drawer(Benchmark):
    """A made-up simulator whose state counts the steps; an action must repeat the state it was asked for."""

    def __init__(self, number: int, steps: int) -> None:
        super().__init__()
        self._number, self._steps, self._at, self.right = number, steps, 0, 0

    def get_tasks(self) -> list[dict[str, Any]]:
        return [{"name": "open the drawer"}]

    async def start_episode(self, task: dict[str, Any], recorder: Any = None) -> None:
        self._at = 0

    async def get_observation(self) -> dict[str, Any]:
        sent = observation(self._number)
        return {
            "images": {"front": sent["observation/images/front"]},
            "states": np.array([self._number, self._at, 0, 0], np.float32),
            "task_description": "open the drawer",
        }

    async def apply_action(self, action: dict[str, Any]) -> None:
        first = np.asarray(action["actions"], np.float32).reshape(-1, 4)[0]
        self.right += bool((first == [self._number, self._at, 0, 0]).all())
        self._at += 1

    async def is_done(self) -> bool:
        return self._at >= self._steps

    async def get_time(self) -> float:
        return self._at / 10

    async def get_result(self) -> dict[str, Any]:
        return {"success": self.right > 0}


@pytest.mark.parametrize("image_format", ["png", "jpeg", "raw"])
def test_vla_evals_own_runner_runs_whole_episodes(server: Served, image_format: Any) -> None:
    async def episodes(number: int) -> None:
        async with Connection(f"{server.url}/vla-eval?open_loop=1", timeout=20) as connection:
            for _ in range(2):
                drawer = Drawer(number, steps=6)
                result = await SyncEpisodeRunner().run_episode(drawer, drawer.get_tasks()[0], connection)
                assert result["steps"] == 6 and drawer.right == 6
            assert connection.server_info["policy_digest"] == DIGEST

    async def fleet() -> None:
        await asyncio.gather(*(episodes(number) for number in range(4)))

    before = get_image_format()
    set_image_format(image_format)
    try:
        asyncio.run(fleet())
    finally:
        set_image_format(before)


def test_vla_evals_own_command_evaluates_our_server_on_push_t(tmp_path: Path) -> None:
    pytest.importorskip("gym_pusht", reason="needs gym-pusht, of the extra `dev`")
    spec = replace(SPEC, state_dim=2, action_dim=2)

    def to_the_middle(observations: Sequence[Observation]) -> list[np.ndarray]:
        assert all(each.images[0].shape == (64, 64, 3) for each in observations)
        return [np.full((spec.chunk, 2), 256, np.float32) for _ in observations]

    with served(to_the_middle, spec=spec) as place:
        (tmp_path / "pusht.yaml").write_text(
            f"server: {{url: '{place.url}/vla-eval'}}\noutput_dir: {tmp_path}/results\n"
            "benchmarks: [{benchmark: 'vla_eval_pusht:PushTOfVlaEval', episodes_per_task: 2, max_steps: 40}]\n"
        )
        command = [sys.executable, "-m", "vla_eval.cli.main", "run", "--no-docker", "--yes", "-c"]
        here = Path(__file__).parent
        said = subprocess.run(
            [*command, str(tmp_path / "pusht.yaml")],
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(here), *sys.path])},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=120,
        )
    assert said.returncode == 0, said.stderr[-2000:]
    assert "PushTOfVlaEval: 100.0%" in said.stdout, said.stdout[-2000:] + said.stderr[-2000:]


def test_the_curl_command_of_the_documentation_as_it_is_written(repository: Path, tmp_path: Path) -> None:
    if shutil.which("curl") is None:
        pytest.skip("needs curl, which is not installed")
    command = re.search(r"```bash\n(curl .+?)```", (repository / "docs/serving.md").read_text(), re.DOTALL)
    assert command is not None
    (tmp_path / "frame.png").write_bytes(picture(form="PNG"))
    with served() as place:
        # The port of the command may be taken here.
        (tmp_path / ".curlrc").write_text(
            f'connect-to = "localhost:8000:127.0.0.1:{place.port}"\nnoproxy = "*"\n'
        )
        environment = {**os.environ, "CURL_HOME": str(tmp_path)}
        said = subprocess.run(
            ["bash", "-c", command[1]],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
        )
    answer = json.loads(said.stdout)
    assert answer["seed"] == 7 and np.shape(answer["actions"]) == (10, 4), answer
