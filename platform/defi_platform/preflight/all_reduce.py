"""All-reduce across the nodes, as gradients take it: NCCL between GPUs, gloo between the others."""

from __future__ import annotations

import datetime
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass

from defi_platform.preflight.findings import Finding, fail, number, ok, skip, span, warn

ROUNDS = 5
GPU_MIB, CPU_MIB = 256, 16
SLOW_GB_S = 1.0
"""GB/s of bus bandwidth between GPUs of several nodes below which training waits for the network."""
TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Bandwidth:
    """Result of one rank."""

    gb_s: float = 0.0
    """Bus bandwidth: bytes that each rank sends and receives, by NCCL's own definition."""
    error: str = ""


class Rank:
    """One process of the all-reduce; an actor.

    Args:
        rank: of `size`.
        size: number of processes.
        backend: nccl | gloo
    """

    def __init__(self, rank: int, size: int, backend: str) -> None:
        self._rank, self._size, self._backend = rank, size, backend

    def address(self) -> str:
        """A free address of this node, for the processes to meet at."""
        import ray

        host = ray.util.get_node_ip_address()
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.bind((host, 0))
            port = probe.getsockname()[1]
        return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"

    def measure(self, address: str, mib: int, timeout_s: float = TIMEOUT_S) -> Bandwidth:
        """Meets the others and sums tensors with them.

        Args:
            address: of rank 0.
            mib: size of the tensor.
            timeout_s: seconds after which a process that waits gives up.
        """
        import torch
        import torch.distributed as distributed

        try:
            distributed.init_process_group(
                self._backend,
                init_method=address,
                rank=self._rank,
                world_size=self._size,
                timeout=datetime.timedelta(seconds=timeout_s),
            )
        except (RuntimeError, ValueError) as error:  # torch's errors of a network, DistStoreError too
            return Bandwidth(error=f"rank {self._rank} cannot meet the others: {str(error).splitlines()[0]}")
        try:
            gpu = self._backend == "nccl"
            tensor = torch.ones(mib * 2**20 // 4, device="cuda" if gpu else "cpu")
            distributed.all_reduce(tensor)  # connects
            first = tensor[0].item()
            if first != self._size:
                return Bandwidth(error=f"rank {self._rank} has the sum {first:g} of {self._size} ones")
            tensor.zero_()
            began = self._now(gpu)
            for _ in range(ROUNDS):
                distributed.all_reduce(tensor)
            seconds = (self._now(gpu) - began) / ROUNDS
            return Bandwidth(gb_s=bus_bytes(mib * 2**20, self._size) / 1e9 / seconds)
        except RuntimeError as error:
            return Bandwidth(error=f"rank {self._rank}: {str(error).splitlines()[0]}")
        finally:
            distributed.destroy_process_group()

    def _now(self, gpu: bool) -> float:
        if gpu:
            import torch

            torch.cuda.synchronize()
        return time.perf_counter()


def bus_bytes(size: int, ranks: int) -> float:
    """Bytes that each of `ranks` sends in an all-reduce of `size` bytes at best."""
    return 2 * (ranks - 1) / ranks * size


def judge_bandwidth(backend: str, nodes: int, results: Sequence[Bandwidth] | None) -> list[Finding]:
    """Rates the bandwidth that the ranks have measured.

    Args:
        backend: nccl | gloo
        nodes: on which they ran.
        results: one per rank; None: not all of them could be started in time.
    """
    check, of = "network", number(nodes, "node")
    if results is None:
        return [
            skip(
                check,
                f"{backend} all-reduce: its processes did not start in time on {of}; are they all in use?",
            )
        ]
    if not results:
        return [skip(check, "no all-reduce: there is one process to train with, or none")]
    errors = [result.error for result in results if result.error]
    if errors:
        return [
            fail(
                check,
                f"{backend} all-reduce over {of} failed: {errors[0]}. Open all ports between the nodes; where they have "
                "several networks, name the interface (NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME).",
            )
        ]
    speeds = [result.gb_s for result in results]
    text = f"{backend} all-reduce, {len(results)} ranks on {of}: {span(speeds, 'GB/s', 2)} of bus bandwidth"
    if backend == "nccl" and nodes > 1 and min(speeds) < SLOW_GB_S:
        return [
            warn(
                check,
                f"{text}, less than {SLOW_GB_S:g}. Is it the right network? NCCL_DEBUG=INFO says which one it takes, "
                "NCCL_SOCKET_IFNAME and NCCL_IB_HCA choose another; train.zero_stage=1 sends least.",
            )
        ]
    return [ok(check, text)]
