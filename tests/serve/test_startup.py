"""Checks before a policy is deployed, and the first question afterwards."""

from __future__ import annotations

import http.server
import threading
from pathlib import Path

import pytest

from defi_platform.config import SecurityConfig, ServeConfig
from defi_platform.errors import CheckpointError
from defi_platform.serve.app import nested
from defi_platform.serve.deployment import server as server_module
from defi_platform.serve.deployment.server import PolicyServer
from defi_platform.serve.deployment.startup_checks import check_policy_folder, warn_if_public
from defi_platform.serve.listener import registry
from defi_platform.serve.listener.registry import Deployment


class Healthy(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


def test_a_proxy_of_the_environment_does_not_stand_between_a_job_and_its_own_server(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    deployment = Deployment(
        application="policy-1", generation=1, digest="d", policy="p", host="", port=0, secret="", owner="me"
    )
    monkeypatch.setattr(server_module, "ANSWER_DEADLINE_S", 0.0)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    with http.server.HTTPServer(("127.0.0.1", 0), Healthy) as web:
        threading.Thread(target=web.serve_forever, daemon=True).start()
        server_module._ask_health(PolicyServer("127.0.0.1", web.server_port, False, deployment))
        web.shutdown()


@pytest.mark.parametrize(
    ("host", "tokens", "warned"),
    [("0.0.0.0", None, True), ("0.0.0.0", "f", False), ("127.0.0.1", None, False), ("::1", None, False)],
)
def test_a_public_address_without_tokens_is_warned_of(
    host: str, tokens: str | None, warned: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    warn_if_public(ServeConfig(host=host, security=SecurityConfig(tokens=tokens)))
    assert ("WARNING: " in capsys.readouterr().err) == warned


def test_a_folder_that_another_user_keeps_closed_is_said_to_be_so(
    policy_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def closed(*_: object) -> None:
        raise PermissionError(13, "Permission denied", str(policy_folder / "config.json"))

    monkeypatch.setattr("defi_platform.serve.deployment.startup_checks.read_header", closed)
    with pytest.raises(CheckpointError, match=r"config.json may not be read by this user.*chmod"):
        check_policy_folder(str(policy_folder))


def test_dotted_arguments_of_serve_run_are_nested_keys() -> None:
    args = {"policy": "p", "replicas.min": "1", "replicas.max": "3", "model.dtype": "bfloat16"}
    assert nested(args) == {
        "policy": "p",
        "replicas": {"min": "1", "max": "3"},
        "model": {"dtype": "bfloat16"},
    }


def test_two_deployments_are_compared_by_everything_but_their_connection_to_ray() -> None:
    one, other = ServeConfig(policy="p"), ServeConfig(policy="p")
    other.ray.address = "auto"
    assert registry.plain(one) == registry.plain(other)
    other.security.tls_cert = "c"
    assert registry.plain(one) != registry.plain(other)
