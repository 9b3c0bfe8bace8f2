"""Our own client: what it does by itself when a replica leaves, is busy, or does not want it."""

from __future__ import annotations

import socket
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from sleeping_policy import SleepingService, observation, replica, serving, until

from defi_client import connection
from defi_platform.errors import ConfigError, ServeError
from defi_platform.evaluate.policy_client import PolicyClient, read_token
from defi_platform.serve.connections import access


def test_it_connects_again_when_its_replica_leaves_and_loses_no_answer() -> None:
    with serving() as place, PolicyClient(place.url) as client:
        assert client.infer(observation(1))[0][0, 0] == 1
        leaving, successor = place.server, replica(SleepingService(digest="d1"))
        place.server = successor
        leaving.move(None, "answers", lambda sock, state: False)
        until(lambda: leaving.load()["sockets"] == 0, "the close with 1012")
        actions, answer = client.infer(observation(2))
        assert actions[0, 0] == 2 and answer["policy_digest"] == "d1" and client.reconnections == 1
        leaving.close("the test is over", timeout_s=0.2)


def test_it_waits_while_the_server_is_full_or_too_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(access, "time", SimpleNamespace(monotonic=lambda: sum(waits)))
    with serving(rate=4.0) as place, PolicyClient(place.url) as client:
        for n in range(4):
            client.infer(observation(n))
        monkeypatch.setattr(client, "_pause", waits.append)
        assert client.infer(observation(9))[0][0, 0] == 9
        assert client.reconnections == 0 and waits == [pytest.approx(0.25, abs=0.05)]


def test_the_time_to_reconnect_counts_from_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(connection, "time", SimpleNamespace(monotonic=lambda: now[0]))
    with serving() as place, PolicyClient(place.url, reconnect_s=30) as client:
        place.hold()

        def lose() -> None:
            until(lambda: place.service.asked == 1, "the message")
            now[0] = 100.0  # so long has its answer been waited for
            place.answer()
            place.server.loop.call_soon_threadsafe(
                lambda: [each.abort() for each in place.server._shared.connections()]
            )

        losing = threading.Thread(target=lose)
        losing.start()
        actions, _ = client.infer(observation(3))
        losing.join()
        assert actions[0, 0] == 3 and client.reconnections == 1


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="Linux only")
def test_a_server_that_reads_nothing_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "SEND_TIMEOUT_S", 1)
    with serving() as place, PolicyClient(place.url, reconnect_s=0) as client:
        given_up = threading.Event()
        place.server.loop.call_soon_threadsafe(given_up.wait, 60)
        with pytest.raises(ServeError, match="stopped answering"):
            client.infer({"observation/images/front": np.zeros((2300, 2300, 3), np.uint8), "prompt": "x"})
        given_up.set()


def test_a_message_that_is_refused_for_good_is_not_sent_again() -> None:
    with serving(max_message_mib=1) as place, PolicyClient(place.url) as client:
        with pytest.raises(ServeError, match=r"refused an observation: .*1009.*send smaller images"):
            client.infer({"observation/images/front": np.zeros((1000, 1000, 3), np.uint8), "prompt": "x"})
        assert client.reconnections == 0
        assert client.infer(observation(1))[0][0, 0] == 1


def test_its_token_is_read_from_a_file_and_a_wrong_one_is_one_clear_error(tmp_path: Path) -> None:
    token = "robot-" + "a" * 20
    (tmp_path / "tokens").write_text(f"evaluation: {token}\n")
    (tmp_path / "mine").write_text(f"{token}\n")
    with serving(tokens=str(tmp_path / "tokens")) as place:
        with PolicyClient(place.url, token=read_token(str(tmp_path / "mine"))) as client:
            assert client.infer(observation(1))[0][0, 0] == 1
        with pytest.raises(ConfigError, match=r"asks for a token that it knows.*set token_file") as caught:
            PolicyClient(place.url, token="b" * 20)
        assert "bbb" not in str(caught.value)
    assert read_token(None) is None
    with pytest.raises(ConfigError, match="No such file"):
        read_token(str(tmp_path / "absent"))
    (tmp_path / "mine").write_text("two words")
    with pytest.raises(ConfigError, match="holds 2 words"):
        read_token(str(tmp_path / "mine"))
