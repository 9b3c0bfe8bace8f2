"""Connections to a cluster that fail: one message for each cause, soon."""

from __future__ import annotations

import socket
import time

import pytest
import ray
from ports import free_port
from ray._private.services import get_node_ip_address, resolve_ip_for_localhost

from defi_platform.cluster import ClusterError, ClusterUnavailable, connection_errors, ray_session
from defi_platform.cluster.connection_errors import check_address, check_tokens, explained, on_loopback
from defi_platform.config import RayConfig
from defi_platform.errors import MEND, TRY_AGAIN, one_line

MISMATCH = (
    "Version mismatch: The cluster was started with:\n    Ray: 2.55.0\n    Python: 3.12.1\n"
    "This process on node 10.0.0.1 was started with:\n    Ray: 2.60.0\n    Python: 3.11.7\n"
)


@pytest.fixture
def port() -> int:
    return free_port()


def test_no_cluster_at_the_address_is_said_within_seconds_and_worth_another_try(
    port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr("defi_platform.cluster.connection_errors.LISTEN_S", 0.2)
    began = time.monotonic()
    with pytest.raises(ClusterUnavailable, match=r"Connection refused.*ray start --head") as failed:
        check_address(f"127.0.0.1:{port}", timeout_s=0.6)
    assert time.monotonic() - began < 60 and failed.value.exit_code == TRY_AGAIN
    assert "\n" not in str(failed.value)
    with (
        pytest.raises(ClusterError, match="no Ray cluster answers"),
        ray_session(RayConfig("no.such.host:6379")),
    ):
        pass


def test_a_cluster_that_begins_to_listen_meanwhile_is_waited_for(port: int) -> None:
    with socket.socket() as server:
        server.bind(("", port))  # Ray takes this machine's own address for its loopback's
        server.listen()
        assert not check_address(f"127.0.0.1:{port}")


def test_a_cluster_that_listens_on_loopback_alone_is_joined_there(
    port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Ray takes the address of the node that this process is connected to, as other tests may have left it.
    monkeypatch.setattr("ray._private.worker._global_node", None)
    with socket.socket() as server:
        server.bind(("127.0.0.1", port))
        server.listen()
        outer = get_node_ip_address()
        assert check_address(f"127.0.0.1:{port}") is (outer != "127.0.0.1")
    with on_loopback():
        assert resolve_ip_for_localhost("127.0.0.1") == "127.0.0.1"
    assert resolve_ip_for_localhost("127.0.0.1") == outer


def test_the_address_of_a_dashboard_is_one_for_ray_job_submit() -> None:
    with pytest.raises(ClusterError, match=r"ray job submit --address http://10\.0\.0\.1:8265") as failed:
        check_address("http://10.0.0.1:8265")
    assert failed.value.exit_code == MEND


def test_a_word_that_is_no_address_is_named() -> None:
    with pytest.raises(ClusterError, match=r"ray\.address is 'nonsense'.*HOST:6379"):
        check_address("nonsense")


def test_a_client_with_a_token_does_not_join_a_cluster_without(
    ray_cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cluster's calls would be refused, and the client's actors die for no reason that anybody could see."""
    check_tokens()
    monkeypatch.setattr(connection_errors, "is_token_auth_enabled", lambda: True)
    with pytest.raises(ClusterError, match=r"asks for no token, but this client has RAY_AUTH_MODE=token"):
        check_tokens()


def test_other_releases_are_named_on_both_sides() -> None:
    text = one_line(explained("a:6379", RuntimeError(MISMATCH)))
    assert "runs Ray 2.55.0 on Python 3.12.1, this client Ray 2.60.0 on Python 3.11.7" in text


@pytest.mark.parametrize("mode", ["no token here", "another token"])
def test_a_refused_token_is_no_absent_cluster(mode: str) -> None:
    try:
        if mode == "no token here":
            raise ray.exceptions.AuthenticationError("no authentication token was found")
        try:
            raise RuntimeError("RPC error: InvalidAuthToken: Authentication token is missing or incorrect.")
        except RuntimeError as cause:
            raise ConnectionError("Failed to connect to Ray cluster at a:6379") from cause
    except (ConnectionError, ray.exceptions.AuthenticationError) as error:
        found = explained("a:6379", error)
    assert "does not accept this client's token" in str(found) and found.exit_code == MEND
