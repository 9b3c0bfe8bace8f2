"""The clients that others have published, against real sockets."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from openpi_client.websocket_client_policy import WebsocketClientPolicy
from replica_in_process import DIGEST, Served, served
from robot_messages import observation


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
    assert server.service.snapshot().batch_size > 4
