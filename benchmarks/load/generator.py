"""Clients in one process: each sends its observation, waits for the answer, and sends again.

    python benchmarks/load/generator.py '{"port": 8000, "protocol": "openpi", "clients": 4, ...}'

It is a process of its own, since a client that shares the server's process is measured with it. Prints one
JSON object (`Load`).
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import uvloop

from load import wires


@dataclass
class LoadConfig:
    """What to send, and for how long."""

    port: int
    protocol: str = "openpi"
    images: str = "raw"
    clients: int = 1
    seconds: float = 5.0
    warm_up_s: float = 1.0
    hz: float | None = None
    """Observations per second of each client, at most; None: the next as soon as the last is answered."""
    pids: list[int] = field(default_factory=list)
    """Processes of the server, whose CPU time is read at both ends of the measurement."""
    token: str | None = None
    tagged: bool = True
    """The policy answers with the client's state; otherwise any actions are right."""


@dataclass
class Load:
    """What clients saw."""

    per_second: float
    """Right answers of all clients together."""
    p50_ms: float
    p99_ms: float
    slowest_client: int
    """Answers of the client that got fewest."""
    refused: dict[str, int]
    """First words of each error -> how many."""
    wrong: int
    """Answers without the client's own tag."""
    closed: int
    """Connections that ended before the measurement did."""
    server_cpu_ms: float
    """CPU milliseconds of the server's processes per answer."""
    client_cpu_ms: float
    """CPU milliseconds of this process per answer."""


def cpu_seconds(pids: list[int]) -> float:
    """CPU time that processes have used."""
    ticks = 0
    for pid in pids:
        with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as file:
            fields = file.read().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


class Client(asyncio.Protocol):
    """One robot."""

    def __init__(self, request: wires.Request, config: LoadConfig) -> None:
        self._request, self._config = request, config
        self._buffer = bytearray()
        self._upgraded = request.http
        self._ready = asyncio.get_running_loop().create_future()
        self._waiting = False
        self._started = self._sent = 0.0
        self.stopping = False
        self.rounds: list[tuple[float, float]] = []
        """(time of the answer, round trip in seconds) of each."""
        self.refused: Counter[str] = Counter()
        self.wrong = 0
        self.closed = False

    async def ready(self) -> None:
        """Waits until the server has greeted or said hello."""
        await self._ready

    def begin(self) -> None:
        """Sends the first observation."""
        self._started = time.perf_counter()
        if self._request.before:
            self._transport.write(self._request.before)
        self._send()

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        if self._request.http:
            self._ready.set_result(None)
        else:
            transport.write(self._request.opening)

    def connection_lost(self, error: Exception | None) -> None:
        if not self.stopping:
            self.closed = True
        if not self._ready.done():
            self._ready.set_exception(ConnectionError(f"the server hung up before it greeted: {error}"))

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        if not self._upgraded:
            head, found, rest = bytes(self._buffer).partition(b"\r\n\r\n")
            if not found:
                return
            if b" 101 " not in head.split(b"\r\n")[0]:
                self._ready.set_exception(ConnectionError(f"no websocket: {bytes(self._buffer)[:300]!r}"))
                return
            self._upgraded, self._buffer = True, bytearray(rest)
            if self._request.hello:
                self._transport.write(self._request.hello)
        if self._request.http:
            self._http_answer()
            return
        for opcode, message in wires.frames(self._buffer):
            self._message(opcode, message)

    def _message(self, opcode: int, message: bytes) -> None:
        if opcode == 9:
            self._transport.write(wires.frame(message, wires.Opcode.PONG))
        elif opcode == 8:
            self.closed = True
            self.refused[f"closed: {message[:2].hex()} {message[2:80].decode(errors='replace')}"] += 1
        elif not self._ready.done():
            self._ready.set_result(None)
        else:
            self._answered(message, is_error=opcode == 1)

    def _http_answer(self) -> None:
        head, found, rest = bytes(self._buffer).partition(b"\r\n\r\n")
        if not found:
            return
        sizes = [line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
        size = int(sizes[0].partition(b":")[2])
        if len(rest) < size:
            return
        self._buffer = bytearray(rest[size:])
        self._answered(rest[:size], is_error=b" 200 " not in head.split(b"\r\n")[0])

    def _answered(self, message: bytes, is_error: bool) -> None:
        now = time.perf_counter()
        if self._request.tag in message if self._config.tagged else b"actions" in message:
            self.rounds.append((now, now - self._sent))
        elif is_error or b"error" in message:
            self.refused[message[:120].decode(errors="replace")] += 1
        else:
            self.wrong += 1
        self._waiting = False
        if self.stopping:
            return
        if self._config.hz is None:
            self._send()
        else:
            period = 1 / self._config.hz
            pause = period - (now - self._started) % period
            asyncio.get_running_loop().call_later(pause, self._send)

    def _send(self) -> None:
        if self.stopping or self._transport.is_closing():
            return
        self._sent = time.perf_counter()
        self._transport.write(self._request.message)

    def hang_up(self) -> None:
        """Closes the socket."""
        self.stopping = True
        self._transport.abort()


async def _connected(number: int, config: LoadConfig) -> Client:
    request = wires.PROTOCOLS[config.protocol](number, config.port, config.images, config.token)
    connection = socket.create_connection(("127.0.0.1", config.port), timeout=30)
    connection.setblocking(False)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    loop = asyncio.get_running_loop()
    _, client = await loop.create_connection(lambda: Client(request, config), sock=connection)
    await asyncio.wait_for(client.ready(), 60)
    return client


async def drive(config: LoadConfig) -> Load:
    """Runs the clients and measures between the warm-up and the end."""
    clients = [await _connected(number, config) for number in range(config.clients)]
    for client in clients:
        client.begin()
    await asyncio.sleep(config.warm_up_s)
    begin, server, own = time.perf_counter(), cpu_seconds(config.pids), time.process_time()
    await asyncio.sleep(config.seconds)
    end, server, own = time.perf_counter(), cpu_seconds(config.pids) - server, time.process_time() - own
    for client in clients:
        client.hang_up()
    inside = [[each[1] for each in client.rounds if begin <= each[0] < end] for client in clients]
    latency = np.array([each for rounds in inside for each in rounds]) * 1e3
    answers = max(len(latency), 1)
    refused: Counter[str] = sum((client.refused for client in clients), Counter())
    return Load(
        per_second=len(latency) / (end - begin),
        p50_ms=float(np.percentile(latency, 50)) if len(latency) else float("nan"),
        p99_ms=float(np.percentile(latency, 99)) if len(latency) else float("nan"),
        slowest_client=min(map(len, inside)),
        refused=dict(refused.most_common(5)),
        wrong=sum(client.wrong for client in clients),
        closed=sum(client.closed for client in clients),
        server_cpu_ms=server / answers * 1e3,
        client_cpu_ms=own / answers * 1e3,
    )


if __name__ == "__main__":
    print(json.dumps(asdict(uvloop.run(drive(LoadConfig(**json.loads(sys.argv[1])))))))
