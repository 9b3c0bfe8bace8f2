"""The two ways to start a server, as a user types them."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import ray
from openpi_client.websocket_client_policy import WebsocketClientPolicy
from ports import free_port
from robot_messages import observation

from defi_platform.config import SecurityConfig, ServeConfig
from defi_platform.errors import ConfigError, exit_code
from defi_platform.serve.app import build_app
from defi_platform.serve.deployment.command import serve_policy

SERVE = str(Path(sys.executable).parent / "serve")
PATIENCE_S = 300.0


@contextmanager
def started(command: list[str], folder: Path, address: str = "local") -> Iterator[subprocess.Popen[bytes]]:
    """The command in a session of its own; its output is in `folder`/output.

    Args:
        address: of the Ray that it joins; without one it starts its own.
    """
    environment = {**os.environ, "RAY_ADDRESS": address}
    with (folder / "output").open("wb") as output:
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=output, stderr=output, start_new_session=True
        )
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()


def client_of(port: int, process: subprocess.Popen[bytes], folder: Path) -> WebsocketClientPolicy:
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            return WebsocketClientPolicy(f"ws://127.0.0.1:{port}")
        except Exception:  # noqa: BLE001 - refused, rejected or closed: not there yet
            time.sleep(0.2)
    raise AssertionError(f"no server at {port}:\n{(folder / 'output').read_text()}")


@pytest.mark.slow
def test_the_job_says_how_to_call_it_answers_and_ends_cleanly_at_ctrl_c(
    repository: Path, policy_folder: Path, tmp_path: Path
) -> None:
    port = free_port()
    job = [sys.executable, str(repository / "jobs" / "serve_policy.py")]
    with started([*job, f"policy={policy_folder}", f"port={port}"], tmp_path) as process:
        client = client_of(port, process, tmp_path)
        assert client.infer(observation(1))["actions"].shape == (10, 4)
        while f"is served at ws://127.0.0.1:{port}\n" not in (tmp_path / "output").read_text():
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        assert process.wait(240) == 0
    output = (tmp_path / "output").read_text()
    assert 'WebsocketClientPolicy("ws://127.0.0.1:' in output and "Ctrl-C stops." in output
    assert output.rstrip().splitlines()[-1] == "stopped" and "Traceback" not in output


@pytest.mark.slow
def test_serve_run_as_written_serves_the_policy(policy_folder: Path, tmp_path: Path) -> None:
    port = free_port()
    command = [SERVE, "run", "defi_platform.serve.app:build_app", f"policy={policy_folder}", f"port={port}"]
    with started(command, tmp_path) as process:
        client = client_of(port, process, tmp_path)
        assert client.infer(observation(1))["actions"].shape == (10, 4)
        process.send_signal(signal.SIGINT)
        assert process.wait(240) == 0


@pytest.mark.slow
def test_serve_run_with_a_folder_of_another_model_is_one_line_and_non_zero(
    gfdm_folder: Path, tmp_path: Path, ray_cluster: None
) -> None:
    command = [SERVE, "run", "defi_platform.serve.app:build_app", f"policy={gfdm_folder}"]
    with started(command, tmp_path, ray.get_runtime_context().gcs_address) as process:
        assert process.wait(PATIENCE_S) == 1
    output = (tmp_path / "output").read_text()
    assert "Error: CheckpointError: " in output and "holds a 'gfdm' model" in output
    assert "Traceback" not in output


def test_a_bad_folder_and_a_taken_port_are_one_line_and_exit_code_2(
    policy_folder: Path, gfdm_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for config, complaint in (
            (ServeConfig(policy="no/such"), "CheckpointError: model folder no/such does not exist"),
            (ServeConfig(policy=str(gfdm_folder)), "CheckpointError: .* holds a 'gfdm' model"),
            (ServeConfig(policy=str(policy_folder), port=port), f":{port}: the port is in use"),
            (ServeConfig(policy=str(policy_folder), port=70000), "port 70000 does not exist"),
            (ServeConfig(policy=str(policy_folder), host="no.such.host.invalid"), "has no address"),
            (
                ServeConfig(policy=str(policy_folder), replicas={"min": 2, "max": 1}),
                "write a number from 1 on",
            ),
            (ServeConfig(policy=str(policy_folder), security=SecurityConfig(tls_cert="c")), "TLS needs both"),
        ):
            assert exit_code(lambda config=config: serve_policy(config)) == 2
            error = capsys.readouterr().err
            assert len(error.splitlines()) == 1
            assert re.search(complaint, error), error


def test_the_builder_names_the_nearest_key(policy_folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"no key 'polcy'. Did you mean 'policy'"):
        build_app({"polcy": str(policy_folder)})
