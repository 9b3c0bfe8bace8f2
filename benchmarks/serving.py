"""Benchmark of batching across clients: latency of one, throughput of many, with and without, in one table.

    python benchmarks/serving.py [policy=FOLDER] [clients=8] [seconds=8] [rounds=2]

Without a folder it serves a nano policy with random weights. Read the ratios; the times are this machine's.
The two servers take turns, and each line shows the better of its rounds, since other programs only slow down.
"""

from __future__ import annotations

import os
import platform
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
import websockets.sync.client

from defi_models import presets
from defi_models.policy import DeFIPolicy
from defi_platform.cluster import ray_session
from defi_platform.config import RayConfig, ServeConfig
from defi_platform.config.loader import load_config
from defi_platform.serve.app import PolicyServer, deploy
from defi_platform.serve.protocols import openpi


@dataclass
class BenchmarkConfig:
    """benchmarks/serving.py."""

    policy: str | None = None
    clients: int = 8
    seconds: float = 5.0
    rounds: int = 2
    max_batch_size: int = 8
    threads: int = 1


@dataclass(frozen=True)
class Load:
    """Throughput and latency of a number of clients in a closed loop."""

    per_second: float
    """Actions of all clients together."""
    p50_ms: float
    """Round trips as clients saw them."""
    p95_ms: float
    batch: float
    """Observations in the forward pass of an observation, on average."""
    infer_ms: float
    """Median forward pass."""


def measure(server: PolicyServer, clients: int, seconds: float) -> Load:
    """Lets clients send observations for some seconds.

    Args:
        server: of the policy.
        clients: in parallel, one thread each.
        seconds: of measurement.
    """
    together = threading.Barrier(clients)
    with ThreadPoolExecutor(clients) as threads:
        runs = list(threads.map(lambda n: one_client(server, n, together, seconds), range(clients)))
    rounds = [each for run in runs for each in run]
    latency = np.array([each[0] for each in rounds])
    return Load(
        per_second=len(rounds) / seconds,
        p50_ms=float(np.percentile(latency, 50)),
        p95_ms=float(np.percentile(latency, 95)),
        batch=float(np.mean([each[1]["batch_size"] for each in rounds])),
        infer_ms=float(np.median([each[1]["infer_ms"] for each in rounds])),
    )


def one_client(
    server: PolicyServer, number: int, together: threading.Barrier, seconds: float
) -> list[tuple[float, dict[str, Any]]]:
    """Sends observations one after the other.

    Args:
        server: of the policy.
        number: of the client, from which its observation is drawn.
        together: barrier at which all clients start.
        seconds: of measurement.

    Returns:
        (round trip in ms, server timing) of each observation.
    """
    message = openpi.pack(observation(server.metadata, number))
    rounds: list[tuple[float, dict[str, Any]]] = []
    with websockets.sync.client.connect(server.url, compression=None) as socket:
        socket.recv()
        together.wait()
        end = time.perf_counter() + seconds
        while (started := time.perf_counter()) < end:
            socket.send(message)
            answer = openpi.unpack(socket.recv(decode=False))
            rounds.append(((time.perf_counter() - started) * 1e3, answer["server_timing"]))
    return rounds


def observation(metadata: dict[str, Any], number: int) -> dict[str, Any]:
    """A random observation that fits the policy; the same for the same number."""
    rng = np.random.default_rng(number)
    height, width = metadata["image_size"]
    cameras = ["camera" if name == "*" else name for name in metadata["cameras"]]
    images = {
        f"observation/images/{name}": rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        for name in cameras
    }
    state = {"observation/state": rng.normal(size=metadata["state_dim"])} if metadata["state_dim"] else {}
    return images | state | {"prompt": "open the drawer", "seed": number}


def main() -> int:
    """Runs the benchmark and prints its table."""
    config = load_config(BenchmarkConfig, None, sys.argv[1:])
    with tempfile.TemporaryDirectory() as scratch, ray_session(RayConfig()):
        folder = config.policy or str(
            DeFIPolicy(presets.policy("nano")).save_pretrained(Path(scratch) / "policy")
        )
        counts = (1, config.clients, 4 * config.clients)
        found: dict[tuple[int, int], Load] = {}
        for size in (1, config.max_batch_size) * config.rounds:
            serve_config = ServeConfig(policy=folder, port=0, max_batch_size=size, threads=config.threads)
            with deploy(serve_config) as server:
                measure(server, 1, 1.0)
                for clients in counts:
                    load = measure(server, clients, config.seconds)
                    before = found.get((clients, size), load)
                    found[clients, size] = max(load, before, key=lambda each: each.per_second)
    print(table(found, config))
    return 0


def table(found: dict[tuple[int, int], Load], config: BenchmarkConfig) -> str:
    """The table as text: for each number of clients a line with forward passes of one observation, and one batched.

    Args:
        found: (clients, max_batch_size) -> their load.
        config: of the benchmark.
    """
    lines = [
        f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}, "
        f"torch {torch.__version__}, ray {ray.__version__}; {config.threads} torch thread(s), 1 replica",
        "",
        "| clients | max batch | actions/s | p50 ms | p95 ms | mean batch | forward ms | actions/s vs batch 1 |",
        "| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for clients, size in sorted(found):
        load = found[clients, size]
        ratio = load.per_second / found[clients, 1].per_second
        lines.append(
            f"| {clients} | {size} | {load.per_second:.1f} | {load.p50_ms:.0f} | {load.p95_ms:.0f} "
            f"| {load.batch:.1f} | {load.infer_ms:.0f} | {ratio:.2f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
