"""Ports for servers that get theirs before they listen: below those that systems give to whoever asks for any."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import socket

FIRST, SHARE = 20_000, 3_000
"""Ray's workers have those up to 20,000, Linux gives away those from 32,768 on; each test process has a share."""

_WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % 4
_TRIED = itertools.count(random.SystemRandom().randrange(SHARE))


def free_port() -> int:
    """A port of this machine on which nobody listens; another at each call."""
    for number in itertools.islice(_TRIED, SHARE):
        port = FIRST + _WORKER * SHARE + number % SHARE
        with contextlib.suppress(OSError), socket.create_server(("", port)):
            return port
    raise AssertionError("no port is free")
