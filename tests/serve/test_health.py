"""What a replica says of its health while it serves, while it leaves, and when it is stuck."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from defi_platform.errors import ServeError
from defi_platform.serve import replica
from defi_platform.serve.replica import PolicyReplica


class Service:
    """A service that is well, or hangs."""

    hangs = False

    async def check_health(self, probe: object) -> None:
        if self.hangs:
            await asyncio.sleep(60)


@pytest.fixture
def serving() -> Iterator[Any]:
    """A replica with a running loop and without a policy."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    made = object.__new__(PolicyReplica)
    made._service, made._probe = Service(), None  # type: ignore[assignment]
    made._server = SimpleNamespace(loop=loop)  # type: ignore[assignment]
    made._closed, made._closing_since = threading.Event(), None
    yield made
    end(made)
    thread.join(5)


def end(served: Any) -> None:
    loop = served._server.loop
    if not loop.is_closed():
        loop.call_soon_threadsafe(loop.stop)
        while loop.is_running():
            time.sleep(0.001)
        loop.close()


def test_a_replica_that_serves_is_well(serving: Any) -> None:
    serving.check_health()


def test_a_replica_that_was_ordered_to_close_is_well_until_it_ought_to_have_been_ended(
    serving: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    serving._closing_since = time.monotonic()
    end(serving)
    serving.check_health()
    monkeypatch.setattr(replica, "CLOSED_PATIENCE_S", -1.0)
    with pytest.raises(ServeError, match="closed its sockets, as it was ordered to, and was not ended"):
        serving.check_health()
    serving._closed.set()  # Serve ends it now
    serving.check_health()


def test_a_replica_whose_loop_has_ended_by_itself_or_hangs_is_replaced(
    serving: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replica, "LOOP_PATIENCE_S", 0.05)
    serving._service.hangs = True
    with pytest.raises(ServeError, match=r"has not turned for 0\.05 s"):
        serving.check_health()
    end(serving)
    with pytest.raises(ServeError, match="the loop of the sockets has ended"):
        serving.check_health()
