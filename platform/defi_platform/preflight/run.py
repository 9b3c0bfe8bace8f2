"""The run of all checks on a connected cluster, and the command `jobs/check_cluster.py`."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray._private.authentication.authentication_utils import is_token_auth_enabled
from ray._private.worker import get_dashboard_url
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from defi_platform import roles, storage
from defi_platform.cluster.actors import kill_all
from defi_platform.errors import one_line
from defi_platform.preflight import access, machine
from defi_platform.preflight.all_reduce import CPU_MIB, GPU_MIB, Bandwidth, Rank, judge_bandwidth
from defi_platform.preflight.findings import CLIENT, Finding, fail, named, warn
from defi_platform.preflight.folders import (
    DEFAULT_MIB,
    Access,
    Folder,
    WriteTest,
    judge_folder,
    try_reading,
    try_writing,
)
from defi_platform.preflight.identity import judge_versions, make_identity
from defi_platform.preflight.probe import Probe
from defi_platform.serve.listener import registry

PINGS = 5
"""Answers by which the clock of a node is measured; the quickest counts."""


@dataclass(frozen=True)
class Node:
    """A living node of the cluster."""

    id: str
    address: str
    role: str
    """Of its label `defi.role`; "" without."""
    resources: Mapping[str, float]
    is_head: bool = False

    @property
    def name(self) -> str:
        """Address, beginning of Ray's id, and role: several nodes may share an address."""
        what = self.role or ("head" if self.is_head else "")
        return f"{self.address}/{self.id[:6]}" + (f" ({what})" if what else "")


@dataclass(frozen=True)
class Needs:
    """Needs of a job."""

    folders: Sequence[Folder] = ()
    host: str = ""
    port: int | None = None
    """To listen on; None: nothing listens."""
    schedulable: Callable[[], str] = field(default=lambda: "")
    """Says that the cluster can run the job; raises a UserError where it never can."""


def nodes() -> list[Node]:
    """The living nodes of the connected cluster, the head first."""
    found = [
        Node(
            node["NodeID"],
            node["NodeManagerAddress"],
            (node.get("Labels") or {}).get(roles.LABEL, ""),
            node["Resources"],
            "node:__internal_head__" in node["Resources"],
        )
        for node in ray.nodes()
        if node["Alive"]
    ]
    return sorted(found, key=lambda node: (not node.is_head, node.role, node.address, node.id))


def check(needs: Needs, mib: int = DEFAULT_MIB, timeout_s: float = 60.0) -> Iterator[Finding]:
    """Runs all checks on the connected cluster, and yields what they find as it comes.

    Args:
        needs: of the job that is to run.
        mib: size of the file that each node writes and reads.
        timeout_s: seconds that one check may take on a node.
    """
    everywhere = nodes()
    yield from _resources(needs)
    identities, silent = _identities(everywhere, timeout_s)
    yield from judge_versions({CLIENT: make_identity()(), **identities})
    for name, problem in silent.items():
        yield fail("versions", f"node {name} runs no task of ours: {problem}")
    able = [node for node in everywhere if node.name in identities and not identities[node.name]["error"]]
    with _probes(able) as probes:
        yield from _token(probes, everywhere, timeout_s)
        yield from _machines(probes, able, timeout_s)
        yield from machine.judge_clocks(_skews(probes, timeout_s))
        for folder in needs.folders:
            yield from _folder(folder, probes, mib, timeout_s)
        yield from _ports(needs, probes, timeout_s)
    yield from _network(able, timeout_s)


def _resources(needs: Needs) -> Iterator[Finding]:
    from defi_platform.errors import UserError

    try:
        text = needs.schedulable()
    except UserError as error:
        yield fail("resources", one_line(error))
    else:
        if text:
            yield Finding("resources", "ok", text)


def _identities(
    everywhere: Sequence[Node], timeout_s: float
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Returns: node -> its identity, and node -> why it has not answered."""
    identity: Any = ray.remote(num_cpus=0, max_retries=0)(make_identity())
    asked = {
        node.name: identity.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node.id, soft=False)
        ).remote()
        for node in everywhere
    }
    return _answers(asked, timeout_s)


def _answers(asked: Mapping[str, Any], timeout_s: float) -> tuple[dict[str, Any], dict[str, str]]:
    """Returns: node -> its answer, and node -> why there is none."""
    if not asked:
        return {}, {}
    ray.wait(list(asked.values()), num_returns=len(asked), timeout=timeout_s)
    found, silent = {}, {}
    for name, answer in asked.items():
        try:
            found[name] = ray.get(answer, timeout=0)
        except ray.exceptions.GetTimeoutError:
            silent[name] = f"no answer in {timeout_s:g} s"
        except ray.exceptions.RayError as error:
            silent[name] = _cause(error)
    return found, silent


def _cause(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


@contextlib.contextmanager
def _probes(able: Sequence[Node]) -> Iterator[dict[str, Any]]:
    """Yields the probes by the names of their nodes, and ends them."""
    actor: Any = ray.remote(num_cpus=0)(Probe)
    probes = {
        node.name: actor.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node.id, soft=False)
        ).remote()
        for node in able
    }
    try:
        yield probes
    finally:
        kill_all(probes.values())


def _token(probes: Mapping[str, Any], everywhere: Sequence[Node], timeout_s: float) -> list[Finding]:
    modes, silent = _answers({n: probe.asks_for_token.remote() for n, probe in probes.items()}, timeout_s)
    dashboard = get_dashboard_url() or ""
    answer = access.answer_without_token(dashboard) if dashboard else ""
    modes = {CLIENT: is_token_auth_enabled(), **modes}
    local = access.is_local([node.address for node in everywhere])
    return [*_unanswered("token", silent), *access.judge_token(modes, dashboard, answer, local)]


def _machines(probes: Mapping[str, Any], able: Sequence[Node], timeout_s: float) -> Iterator[Finding]:
    gpus = {node.name: node.resources.get("GPU", 0.0) for node in able}
    found, silent = _answers(
        {name: probe.machine.remote(bool(gpus[name])) for name, probe in probes.items()}, timeout_s
    )
    yield from _unanswered("machine", silent)
    if not found:
        return
    stores = {node.name: node.resources.get("object_store_memory", 0.0) for node in able}
    yield from machine.judge_shared_memory(found, stores)
    yield from machine.judge_disks(found)
    yield from machine.judge_files(found)
    yield from machine.judge_decoders(found)
    yield from machine.judge_gpus(found, gpus)


def _skews(probes: Mapping[str, Any], timeout_s: float) -> dict[str, tuple[float, float]]:
    """Node -> (seconds that its clock is ahead of this one's, seconds of uncertainty)."""
    skews = {}
    for name, probe in probes.items():
        best: tuple[float, float] | None = None
        for _ in range(PINGS):
            asked = time.time()
            try:
                theirs = ray.get(probe.now.remote(), timeout=timeout_s)
            except ray.exceptions.RayError:
                break  # what does not answer is reported by the checks that need more of it
            answered = time.time()
            measured = (theirs - (asked + answered) / 2, (answered - asked) / 2)
            best = measured if best is None or measured[1] < best[1] else best
        if best is not None:
            skews[name] = best
    return skews


def _folder(folder: Folder, probes: Mapping[str, Any], mib: int, timeout_s: float) -> list[Finding]:
    if not folder.writes:
        asked = {name: probe.read.remote(folder.uri, mib) for name, probe in probes.items()}
        here = try_reading(folder.uri, mib)
        found, silent = _answers(asked, timeout_s)
        return judge_folder(folder, {CLIENT: here, **found}, sorted(silent))
    test = WriteTest(folder.uri)
    try:
        test.prepare()
    except (OSError, storage.StorageError) as error:
        return judge_folder(folder, {CLIENT: Access(error=one_line(error))}, [])
    try:
        asked = {name: probe.write.remote(test.folder, mib) for name, probe in probes.items()}
        here = try_writing(test.folder, mib)
        found, silent = _answers(asked, timeout_s)
        return judge_folder(folder, {CLIENT: here, **found}, sorted(silent))
    finally:
        try:
            test.delete()
        except (OSError, storage.StorageError) as error:
            print(f"{test.folder} could not be deleted: {one_line(error)}", flush=True)


def _ports(needs: Needs, probes: Mapping[str, Any], timeout_s: float) -> list[Finding]:
    if needs.port is None:
        return access.judge_ports(None, {}, "")
    served = registry.read()
    if served is not None and served.port == needs.port:
        return access.judge_ports(needs.port, {}, f"{served.host}:{served.port}")
    problems, silent = _answers(
        {name: probe.port_problem.remote(needs.host, needs.port) for name, probe in probes.items()}, timeout_s
    )
    return [*_unanswered("ports", silent), *access.judge_ports(needs.port, problems, "")]


def _network(able: Sequence[Node], timeout_s: float) -> list[Finding]:
    """An all-reduce over one process per GPU; without GPUs over one per node that may train."""
    gpus = [(node, int(node.resources.get("GPU", 0))) for node in able]
    backend = "nccl" if any(count for _, count in gpus) else "gloo"
    if backend == "nccl":
        places = [node for node, count in gpus for _ in range(count)]
    else:
        with_role = [node for node in able if node.role == roles.TRAIN]
        places = with_role or [node for node in able if node.resources.get("CPU")]
    if len(places) < 2:
        return judge_bandwidth(backend, len(places), [])
    actor: Any = ray.remote(num_cpus=0, num_gpus=1 if backend == "nccl" else 0)(Rank)
    ranks = [
        actor.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node.id, soft=False)).remote(
            number, len(places), backend
        )
        for number, node in enumerate(places)
    ]
    count = len({node.id for node in places})
    try:
        _, waiting = ray.wait(
            [rank.address.remote() for rank in ranks], num_returns=len(ranks), timeout=timeout_s
        )
        if waiting:
            return judge_bandwidth(backend, count, None)
        address = ray.get(ranks[0].address.remote())
        size = GPU_MIB if backend == "nccl" else CPU_MIB
        asked = {str(n): rank.measure.remote(address, size, timeout_s) for n, rank in enumerate(ranks)}
        found, silent = _answers(asked, 2 * timeout_s)
        missing = [Bandwidth(error=f"rank {rank}: {why}") for rank, why in silent.items()]
        return judge_bandwidth(backend, count, [*found.values(), *missing])
    except ray.exceptions.RayError as error:
        return judge_bandwidth(backend, count, [Bandwidth(error=_cause(error))])
    finally:
        kill_all(ranks)


def _unanswered(check_name: str, silent: Mapping[str, str]) -> list[Finding]:
    return [warn(check_name, f"{named([name])}: {why}") for name, why in silent.items()]
