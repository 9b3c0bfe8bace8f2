"""Load of a Ray cluster's head and driver as nodes are added: measured with raylets on this machine, then extended.

    python benchmarks/cluster_scale.py [--raylets 20] [--idle-s 20] [--calls 2000]

Measured: processor time and memory of the head's processes while all raylets idle (heartbeats, resource reports), and
calls per second of one driver to one actor per raylet, in the pattern of the ingest (a call per block, the next when one
is done). The rest are products of these with numbers of the platform's own benchmarks, and are marked as such.
"""

from __future__ import annotations

import argparse
import os
import time
from typing import Any

import psutil
import ray
from ray.cluster_utils import Cluster
from ray.util import ActorPool

NODES, VIDEOS, REQUESTS_S = 1_000, 10_000_000, 100_000
BLOCK_VIDEOS = 256
"""Most files per call of the ingest (data/ingest/probe_actors.py)."""
DRIVER_MB_PER_MILLION = 270
LISTING_US = 68
MESSAGE_MS, REPLICA_S = 0.54, 800
"""RESULTS.md: the ingest's driver per million videos, its time per video, a served message, answers of one replica."""
PROBE_S = 0.16
"""RESULTS.md: opening and decoding ten seconds of 320x240 (9.6 s per ten minutes)."""


class Prober:
    def probe(self, block: list[int]) -> list[int]:
        return block


def head_processes() -> dict[str, list[psutil.Process]]:
    """The processes that this one has started, by kind."""
    kinds: dict[str, list[psutil.Process]] = {"gcs_server": [], "raylet": [], "agents": []}
    for process in psutil.Process().children(recursive=True):
        try:
            line = " ".join(process.cmdline()[:4])
        except psutil.Error:
            continue
        if "gcs_server" in line:
            kinds["gcs_server"].append(process)
        elif line.split(" ")[0].endswith("/raylet"):
            kinds["raylet"].append(process)
        elif "agent" in line.lower():
            kinds["agents"].append(process)
    return kinds


def usage(processes: list[psutil.Process]) -> tuple[float, float]:
    """Processor seconds so far and resident MB, of all together."""
    times = [process.cpu_times() for process in processes]
    memory = sum(process.memory_info().rss for process in processes)
    return sum(time.user + time.system for time in times), memory / 2**20


def measure(raylets: int, idle_s: float, calls: int) -> dict[str, float]:
    """Figures of a cluster of a head and so many raylets."""
    # Neither is needed for a cluster that only works, and each takes a process per node.
    without = {"include_dashboard": False, "include_log_monitor": False}
    small: dict[str, Any] = {"object_store_memory": 80 << 20, "dashboard_agent_listen_port": 0}
    cluster = Cluster(initialize_head=True, head_node_args={**small, **without, "num_cpus": 0})
    try:
        for _ in range(raylets):
            cluster.add_node(num_cpus=1, **small)
        cluster.wait_for_nodes()
        ray.init(address=cluster.address, log_to_driver=False, logging_level="error")
        time.sleep(5)  # the agents start
        kinds = head_processes()
        before = {kind: usage(processes) for kind, processes in kinds.items()}
        time.sleep(idle_s)
        after = {kind: usage(processes) for kind, processes in kinds.items()}
        spent = {kind: (after[kind][0] - before[kind][0]) / idle_s for kind in kinds}
        actor = ray.remote(num_cpus=1)(Prober)
        pool = ActorPool([actor.remote() for _ in range(raylets)])
        block = list(range(BLOCK_VIDEOS))
        list(pool.map_unordered(lambda one, some: one.probe.remote(some), [block] * raylets))  # all are up
        cpu, wall = sum(os.times()[:2]), time.monotonic()
        list(pool.map_unordered(lambda one, some: one.probe.remote(some), [block] * calls))
        cpu, wall = sum(os.times()[:2]) - cpu, time.monotonic() - wall
        return {
            "gcs_cores": spent["gcs_server"],
            "gcs_mb": after["gcs_server"][1],
            "raylet_cores": spent["raylet"] / (raylets + 1),
            "raylet_mb": after["raylet"][1] / (raylets + 1),
            "agents_mb": after["agents"][1] / (raylets + 1),
            "calls_s": calls / wall,
            "driver_ms": 1000 * cpu / calls,
        }
    finally:
        ray.shutdown()
        cluster.shutdown()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--raylets", type=int, default=20)
    parser.add_argument("--idle-s", type=float, default=20.0)
    parser.add_argument("--calls", type=int, default=2_000)
    given = parser.parse_args()
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.0f}, Ray {ray.__version__}\n")
    print(
        "| raylets | GCS, cores | GCS, MB | a raylet, cores | a raylet, MB | its agents, MB | calls/s | ms of driver |"
    )
    print("|---|---|---|---|---|---|---|---|")
    found = {}
    for raylets in (1, given.raylets):
        found[raylets] = one = measure(raylets, given.idle_s, given.calls)
        print(
            f"| {raylets} | {one['gcs_cores']:.3f} | {one['gcs_mb']:.0f} | {one['raylet_cores']:.3f} | "
            f"{one['raylet_mb']:.0f} | {one['agents_mb']:.0f} | {one['calls_s']:.0f} | {one['driver_ms']:.2f} |",
            flush=True,
        )
    few, many = found[1], found[given.raylets]
    per_node = (many["gcs_cores"] - few["gcs_cores"]) / max(1, given.raylets - 1)
    memory = (many["gcs_mb"] - few["gcs_mb"]) / max(1, given.raylets - 1)
    per_block = BLOCK_VIDEOS * PROBE_S
    rows = [
        ("GCS of idle nodes", f"{many['gcs_cores'] + per_node * (NODES - given.raylets):.2f} cores, "
         f"{many['gcs_mb'] + memory * (NODES - given.raylets):.0f} MB", f"{NODES:,} nodes, straight line"),
        ("blocks of the ingest", f"{NODES * 30 / per_block:.0f} calls/s of {1000 / many['driver_ms']:.0f} possible",
         f"{NODES:,} nodes of 30 probers, {per_block:.0f} s per block of {BLOCK_VIDEOS}"),
        ("memory of the ingest's driver", f"{VIDEOS / 1e6 * DRIVER_MB_PER_MILLION / 1000:.1f} GB",
         f"{VIDEOS:,} videos"),
        ("listing and joining", f"{VIDEOS * LISTING_US / 1e6 / 60:.0f} min of one core", f"{VIDEOS:,} videos"),
        ("replicas of a policy", f"{REQUESTS_S / REPLICA_S:.0f}, {REQUESTS_S * MESSAGE_MS / 1000:.0f} cores",
         f"{REQUESTS_S:,} requests/s, a policy of 20 ms and 0.6 ms per observation"),
    ]  # fmt: skip
    print("\nProducts, not measured:\n\n| what | need | at |\n|---|---|---|")
    for name, need, where in rows:
        print(f"| {name} | {need} | {where} |")


if __name__ == "__main__":
    main()
