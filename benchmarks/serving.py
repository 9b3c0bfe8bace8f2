"""Load generator: chunks/s, latency and CPU time of our server and of its peers, turn by turn in the same run.

    python benchmarks/serving.py [servers=[openpi,vla-eval-16,vla-eval-64,ours]] [clients=[1,4,16,64]]
        [protocol=openpi] [images=raw] [seconds=15] [turns=3] [peer_openpi=CHECKOUT] [at=PORT]

Every server runs the same policy, which sleeps 20 ms and 0.6 ms per observation, and gets observations of a
200x200 and an 84x84 picture. Ours also resizes both, as it does for robots; the peers leave that to their policies,
which do not look at pictures unless `peers_resize=true`.
A client is one socket of one process that does little else than send (benchmarks/load/). Everything stays on
this machine. A line shows the best of a server's turns, since other programs only slow down.

Servers: `ours` (sockets and policy in one process, as a replica has them, without Ray), `ours-N` (a listener
and N such processes), `vla-eval-B` (batches up to B), `openpi` (skipped, and said so, without
peer_openpi, a checkout of Physical-Intelligence/openpi), `port` (whatever answers at 127.0.0.1:at).
`policy_s=0 policy_each_s=0` is a policy that takes no time: messages/s of one process.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from load.generator import Load, LoadConfig

from defi_platform.config.loader import load_config

HERE = Path(__file__).parent


@dataclass
class BenchmarkConfig:
    """benchmarks/serving.py."""

    servers: list[str] = field(default_factory=lambda: ["openpi", "vla-eval-16", "vla-eval-64", "ours"])
    clients: list[int] = field(default_factory=lambda: [1, 4, 16, 64])
    protocol: str = "openpi"
    """What our own server is spoken to in: openpi, vla-eval or http. Peers are spoken to in their own."""
    images: str = "raw"
    """raw or jpeg."""
    seconds: float = 15.0
    turns: int = 3
    policy_s: float = 0.020
    policy_each_s: float = 0.0006
    policy: str = "sleeps"
    """nano: a nano policy with random weights on one thread, in our own server only; answers are not compared."""
    peers_resize: bool = False
    """The peers' policies resize pictures as our server does; otherwise they do not look at them."""
    hz: float | None = None
    """Observations per second of a client, at most; null: each sends again at once."""
    nice: int = 0
    """Added to the niceness of every server and of the clients."""
    peer_openpi: str | None = None
    at: int | None = None
    """Port of a server that runs already, for servers=[port]."""


@dataclass(frozen=True)
class Server:
    """A server that is running."""

    port: int
    protocol: str
    pids: tuple[int, ...]


@contextlib.contextmanager
def running(name: str, config: BenchmarkConfig) -> Iterator[Server]:
    """Starts one server in a process of its own.

    Args:
        name: of `servers`.
        config: of the benchmark.
    """
    kind, _, number = name.rpartition("-") if name[-1].isdigit() else (name, "", "")
    if name == "port":
        assert config.at is not None, "servers=[port] needs at=PORT"
        yield Server(config.at, config.protocol, ())
        return
    script, *arguments = {
        "openpi": ["peers.py", "openpi", str(config.peer_openpi)],
        "vla-eval": ["peers.py", "vla-eval", number],
        "ours": ["own_server.py", number or "0"],
    }[kind]
    times = f"{config.policy_s},{config.policy_each_s}"
    process = subprocess.Popen(
        ["nice", "-n", str(config.nice), sys.executable, str(HERE / "load" / script), *arguments],
        stdout=subprocess.PIPE,
        stdin=subprocess.PIPE,
        text=True,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(HERE), *sys.path[1:]]),
            "POLICY_TIMES": times,
            "POLICY": config.policy,
            "PEERS_RESIZE": str(config.peers_resize),
        },
    )
    assert process.stdout is not None and process.stdin is not None
    try:
        for line in process.stdout:
            if line.startswith("port "):
                break
        else:
            raise SystemExit(f"{name} did not start; what it wrote is above")
        port, *pids = [int(word) for word in line.split()[1:]]
        protocol = config.protocol if kind == "ours" else kind
        yield Server(port, protocol, tuple(pids) or (process.pid,))
    finally:
        process.stdin.close()  # ours ends by it
        if kind != "ours":
            process.terminate()
        process.wait(60)


def drive(server: Server, clients: int, config: BenchmarkConfig) -> Load:
    """One turn: clients send to a server for some seconds.

    Args:
        server: that is running.
        clients: at once.
        config: of the benchmark.
    """
    load = LoadConfig(
        port=server.port,
        protocol=server.protocol,
        images=config.images,
        clients=clients,
        seconds=config.seconds,
        hz=config.hz,
        pids=list(server.pids),
        tagged=config.policy == "sleeps",
    )
    command = ["nice", "-n", str(config.nice), sys.executable, str(HERE / "load" / "generator.py")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), *sys.path[1:]])}
    done = subprocess.run(
        [*command, json.dumps(asdict(load))], stdout=subprocess.PIPE, text=True, env=environment, check=True
    )
    return Load(**json.loads(done.stdout))


def main(argv: list[str] | None = None) -> int:
    """Runs the benchmark and prints its table; 1 when a client got an answer that was not its own."""
    config = load_config(BenchmarkConfig, None, sys.argv[1:] if argv is None else argv)
    names = [name for name in config.servers if config.policy == "sleeps" or name.startswith("ours")]
    if "openpi" in names and not (config.peer_openpi and Path(config.peer_openpi).is_dir()):
        names.remove("openpi")
        print("openpi's server is left out: peer_openpi=CHECKOUT names no folder", file=sys.stderr)
    if config.images == "jpeg" and "openpi" in names:
        names.remove("openpi")
        print("openpi's server is left out: it has no form for JPEG", file=sys.stderr)
    found: dict[tuple[int, str], list[Load]] = {}
    with contextlib.ExitStack() as stack:
        servers = {name: stack.enter_context(running(name, config)) for name in names}
        for _ in range(config.turns):
            for clients in config.clients:
                for name, server in servers.items():
                    found.setdefault((clients, name), []).append(drive(server, clients, config))
    print(table(found, config))
    return int(any(load.wrong for loads in found.values() for load in loads))


def table(found: dict[tuple[int, str], list[Load]], config: BenchmarkConfig) -> str:
    """The table as text: for each number of clients a line per server.

    Args:
        found: (clients, server) -> its turns.
        config: of the benchmark.
    """
    packages = ", ".join(
        f"{name} {version(name)}" for name in ("ray", "websockets", "vla-eval", "openpi-client")
    )
    sleeps = f"sleeps {config.policy_s * 1e3:g} ms + {config.policy_each_s * 1e3:g} ms each"
    policy = sleeps if config.policy == "sleeps" else f"{config.policy}, one thread"
    load_average = os.getloadavg()[1]
    lines = [
        f"{os.cpu_count()} cores (load average {load_average:.1f}), {platform.machine()}, "
        f"Python {platform.python_version()}, {packages}",
        f"policy: {policy}; {config.images} pictures; {config.turns} turn(s) of {config.seconds:g} s; "
        f"niceness {os.nice(0) + config.nice}; ours speaks {config.protocol}"
        f"{'; peers resize too' if config.peers_resize else ''}",
        "",
        "| clients | server | chunks/s (all turns) | p50 ms | p99 ms | server CPU ms | client CPU ms | fewest | not answered |",
        "| ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for (clients, name), loads in sorted(found.items(), key=lambda each: each[0][0]):
        best = max(loads, key=lambda load: load.per_second)
        every = ", ".join(f"{load.per_second:.0f}" for load in loads)
        wrong = {
            "of another client": sum(load.wrong for load in loads),
            "hung up": sum(load.closed for load in loads),
        }
        words: dict[str, Any] = {word: count for word, count in wrong.items() if count}
        for load in loads:
            words |= load.refused
        lines.append(
            f"| {clients} | {name} | **{best.per_second:.0f}** ({every}) | {best.p50_ms:.0f} | {best.p99_ms:.0f} "
            f"| {best.server_cpu_ms:.2f} | {best.client_cpu_ms:.2f} | {best.slowest_client} | {words or 0} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
