"""The load generator counts what it must: right answers, others' answers, errors, sockets that end."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
from openpi_client import msgpack_numpy
from websockets.sync.server import ServerConnection, serve

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def generator() -> Iterator[Any]:
    sys.path.insert(0, str(REPOSITORY / "benchmarks"))
    try:
        from load import generator

        yield generator
    finally:
        sys.path.remove(str(REPOSITORY / "benchmarks"))


@contextmanager
def misbehaving_server() -> Iterator[int]:
    """Answers clients 0 and 1 rightly, 2 with the actions of 0, 3 with an error, and hangs up on 4."""

    def talk(socket: ServerConnection) -> None:
        socket.send(msgpack.packb({"policy": "test"}))
        for message in socket:
            state = msgpack_numpy.unpackb(message)["observation/state"]
            number = int(state[0])
            if number == 4:
                return
            if number == 3:
                socket.send("busy, retry after 1.0 s")
                continue
            actions = np.tile(state if number < 2 else np.full_like(state, 0.5), (10, 1))
            socket.send(msgpack_numpy.packb({"actions": actions}))

    with serve(talk, "127.0.0.1", 0, compression=None) as listener:
        thread = threading.Thread(target=listener.serve_forever, daemon=True)
        thread.start()
        yield listener.socket.getsockname()[1]
        listener.shutdown()


def test_answers_of_others_errors_and_hang_ups_are_counted_apart(generator: Any) -> None:
    with misbehaving_server() as port:
        config = generator.LoadConfig(port=port, clients=5, seconds=1.0, warm_up_s=0.1, hz=50)
        load = asyncio.run(generator.drive(config))
    assert 10 < load.per_second <= 2 * 50 + 4
    assert load.wrong > 5 and load.closed == 1
    assert any("busy" in words for words in load.refused)
    assert load.slowest_client == 0


def test_the_benchmark_drives_our_server_and_a_peer_in_turns() -> None:
    command = [sys.executable, "benchmarks/serving.py", "servers=[openpi,vla-eval-16,ours]", "clients=[4]"]
    done = subprocess.run(
        [*command, "seconds=0.5", "turns=1"], cwd=REPOSITORY, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "openpi's server is left out" in done.stderr
    lines = [line.split("|") for line in done.stdout.splitlines() if line.startswith("| 4 |")]
    assert [line[2].strip() for line in lines] == ["vla-eval-16", "ours"]
    for line in lines:
        assert float(line[3].split("**")[1]) > 1, done.stdout
        assert line[-2].strip() == "0", "every answer is its client's own"


def test_a_soak_reports_wrong_answers_gaps_and_growth(generator: Any) -> None:
    from load.soak_report import Event, Line, Report, measure_gaps

    lines = [Line(second / 2, 0, "openpi", "answered", "d") for second in range(200) if not 80 <= second < 90]
    lines += [Line(60.0, 0, "http", "wrong", "off by 0.5"), Line(70.0, 0, "openpi", "lost", "no close frame")]
    lines += [Line(71.0, 1, "http", "refused", "busy"), Line(99.4, 0, "openpi", "unanswered", "no end")]
    events = [Event(39.9, "a replica is killed", 40.0, 3.0), Event(90.0, "calm", 90.5, 1.0)]
    lines.sort(key=lambda line: line.at)
    measure_gaps(lines, events)
    assert events[0].gap_s == pytest.approx(5.5) and events[1].gap_s == pytest.approx(0.5)
    growing = [(float(second), 100.0 + second) for second in range(0, 100, 5)]
    flat = [(float(second), 100.0) for second in range(0, 100, 5)]
    faults = Report(lines, events, {"grows": growing, "flat": flat}).faults()
    expected = (
        "off by 0.5",
        "client 0: an observation was neither answered nor refused",
        "client 1: not one answer",
        "ended without a word",
        "5.5 s without",
        "grows grew",
    )
    for fault, words in zip(faults, expected, strict=True):
        assert words in fault


def test_the_tag_of_a_client_is_in_no_answer_to_another(generator: Any) -> None:
    from load import wires

    for images in ("raw", "jpeg"):
        tags = [wires.http(number, 1, images).tag for number in range(64)]
        answers = [wires.state(number) for number in range(64)]
        if images == "raw":
            rows = [np.tile(state, (10, 1)).tobytes() for state in answers]
        else:
            # 1.5 is a part of 11.5, and of many a time.
            rows = [json.dumps([state.tolist()] * 10 + [{"queue_ms": 1.5}]).encode() for state in answers]
        found = [[number for number, tag in enumerate(tags) if tag in row] for row in rows]
        assert found == [[number] for number in range(64)]
