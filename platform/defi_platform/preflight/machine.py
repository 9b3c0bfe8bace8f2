"""Checks of one machine: shared memory, disk, file descriptors, clock, decoders and GPUs."""

from __future__ import annotations

import resource
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass

from defi_platform.data.decode.video_readers import CODECS, missing_codecs
from defi_platform.preflight.findings import Finding, by_value, fail, named, number, ok, skip, span, warn

SHARED_MEMORY = "/dev/shm"
MIB, GIB = 2**20, 2**30
LEAST_FREE_SHM = 64 * MIB
"""Below it, Ray's next object goes to disk and a worker that maps memory dies of SIGBUS."""
FULL_DISK = 0.95
"""Share of a disk in use at which Ray stops to write to it (RAY_local_fs_capacity_threshold)."""
FEW_FILES, MANY_FILES = 4_096, 65_536
"""File descriptors of a process: below the first, servers and shuffles fail; the second is what Ray's docs ask for."""
FAST_CLOCK_S, WRONG_CLOCK_S = 1.0, 60.0
"""Clock skew that spoils times in logs, and one that stores and tokens may refuse."""


@dataclass(frozen=True)
class Machine:
    """Figures of the machine, or container, that a process runs on."""

    shm_total: int
    """Bytes of /dev/shm; 0 where there is none."""
    shm_free: int
    disk_total: int
    """Bytes of the disk that holds temporary files, Ray's logs and what it spills."""
    disk_free: int
    disk: str
    """Folder of temporary files."""
    files: int
    """File descriptors that a process may have."""
    no_decoder: tuple[str, ...]
    """Codecs of `CODECS` without a decoder."""
    gpus: tuple[str, ...] = ()
    """Names of the devices that torch sees, where the node is to have some."""
    gpu_problem: str = ""


def measure(with_gpus: bool) -> Machine:
    """Figures of this machine.

    Args:
        with_gpus: asks torch for its devices, which takes seconds.
    """
    try:
        shm = shutil.disk_usage(SHARED_MEMORY)
        shm_total, shm_free = shm.total, shm.free
    except OSError:
        shm_total = shm_free = 0
    folder = tempfile.gettempdir()
    disk = shutil.disk_usage(folder)
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    gpus, problem = _gpus() if with_gpus else ((), "")
    return Machine(
        shm_total, shm_free, disk.total, disk.free, folder, files, tuple(missing_codecs()), gpus, problem
    )


def _gpus() -> tuple[tuple[str, ...], str]:
    import torch

    if not torch.cuda.is_available():
        built = torch.version.cuda
        return (
            (),
            "this torch is built for CPUs only" if built is None else f"no driver for CUDA {built} answers",
        )
    try:
        for device in range(torch.cuda.device_count()):
            torch.zeros(8, device=device).sum().item()
    except RuntimeError as error:
        return (), str(error).splitlines()[0]
    return tuple(torch.cuda.get_device_name(device) for device in range(torch.cuda.device_count())), ""


def judge_shared_memory(found: Mapping[str, Machine], stores: Mapping[str, float]) -> list[Finding]:
    """Compares /dev/shm with the object store that Ray keeps in it.

    Args:
        found: node -> its figures.
        stores: node -> bytes of its object store.
    """
    findings = []
    full = {node: one for node, one in found.items() if one.shm_free < LEAST_FREE_SHM}
    for node, one in full.items():
        findings.append(
            fail(
                "memory",
                f"node {node}: {SHARED_MEMORY} is full, {one.shm_free / MIB:,.0f} of {one.shm_total / MIB:,.0f} MiB "
                "free. Delete what lies there, or give the container more: --shm-size, or on Kubernetes an emptyDir "
                "of medium Memory.",
            )
        )
    for node, one in found.items():
        if node not in full and one.shm_total < stores.get(node, 0.0):
            findings.append(
                warn(
                    "memory",
                    f"node {node}: {SHARED_MEMORY} has {one.shm_total / GIB:.1f} GiB, the object store "
                    f"{stores[node] / GIB:.1f}: Ray keeps objects on disk, which is slow. Give the container more "
                    "(--shm-size, emptyDir of medium Memory), or start Ray with a smaller --object-store-memory.",
                )
            )
    if not findings:
        findings.append(
            ok(
                "memory",
                f"{SHARED_MEMORY} {span([one.shm_free / GIB for one in found.values()], 'GiB', 1)} free, object store "
                f"{span([stores.get(node, 0.0) / GIB for node in found], 'GiB', 1)}",
            )
        )
    return findings


def judge_disks(found: Mapping[str, Machine]) -> list[Finding]:
    """Finds disks on which Ray can write no log and spill no object."""
    full = {node: one for node, one in found.items() if one.disk_free < (1 - FULL_DISK) * one.disk_total}
    findings = [
        fail(
            "disk",
            f"node {node}: the disk of {one.disk} is {1 - one.disk_free / one.disk_total:.0%} full, and Ray writes to "
            f"none beyond {FULL_DISK:.0%}. Free some, or start Ray with --temp-dir on another disk.",
        )
        for node, one in full.items()
    ]
    free = [one.disk_free / GIB for one in found.values()]
    return findings or [ok("disk", f"{span(free, 'GiB')} free for logs and spilled objects")]


def judge_files(found: Mapping[str, Machine]) -> list[Finding]:
    """Compares the limits of file descriptors with what servers and shuffles need."""
    limits = {node: one.files for node, one in found.items()}
    findings = []
    fix = f"Raise it to {MANY_FILES:,}: `ulimit -n`, LimitNOFILE= of systemd, or --ulimit nofile of a container."
    for limit, nodes in by_value(limits).items():
        assert isinstance(limit, int)
        if 0 <= limit < MANY_FILES:
            make = fail if limit < FEW_FILES else warn
            findings.append(
                make("files", f"{named(nodes, len(limits))}: a process may open {limit:,} files. {fix}")
            )
    return findings or [ok("files", "a process may open " + span(map(float, limits.values()), "files"))]


def judge_clocks(skews: Mapping[str, tuple[float, float]]) -> list[Finding]:
    """Finds clocks that differ from this client's.

    Args:
        skews: node -> (seconds that its clock is ahead, seconds that this may be wrong by).
    """
    findings = []
    for node, (ahead, error) in skews.items():
        least = abs(ahead) - error
        if least > FAST_CLOCK_S:
            way = "ahead of" if ahead > 0 else "behind"
            make = fail if least > WRONG_CLOCK_S else warn
            findings.append(
                make(
                    "clock",
                    f"node {node}: its clock is {abs(ahead):,.1f} s {way} this client's; stores refuse requests from "
                    "wrong times. Run chrony or another NTP client there.",
                )
            )
    largest = max((abs(ahead) + error for ahead, error in skews.values()), default=0.0)
    return findings or [ok("clock", f"at most {largest:.3f} s from this client's")]


def judge_decoders(found: Mapping[str, Machine]) -> list[Finding]:
    """Finds nodes that cannot decode a kind of video."""
    missing = by_value({node: one.no_decoder for node, one in found.items() if one.no_decoder})
    findings = []
    for codecs, nodes in missing.items():
        assert isinstance(codecs, tuple)
        findings.append(
            fail(
                "decoders",
                f"{named(nodes, len(found))}: PyAV has no decoder for {', '.join(codecs)}. Install PyAV from its wheel "
                "(`pip install av`), which brings FFmpeg with all of them.",
            )
        )
    return findings or [ok("decoders", f"{', '.join(CODECS)}: on {number(len(found), 'node')}")]


def judge_gpus(found: Mapping[str, Machine], promised: Mapping[str, float]) -> list[Finding]:
    """Compares the GPUs that torch sees with those that Ray hands out.

    Args:
        found: node -> its figures.
        promised: node -> GPUs that Ray knows there.
    """
    nodes = [node for node, count in promised.items() if count and node in found]
    if not nodes:
        return [skip("gpus", "no node that runs has one")]
    findings, names = [], list[str]()
    for node in nodes:
        one = found[node]
        names += one.gpus
        if one.gpu_problem:
            findings.append(
                fail(
                    "gpus",
                    f"node {node}: Ray has {promised[node]:g} GPUs, torch none ({one.gpu_problem}). Use the CUDA "
                    "variant of the image, with a driver at least as new, and start it with its GPUs.",
                )
            )
        elif len(one.gpus) < promised[node]:
            findings.append(
                fail(
                    "gpus",
                    f"node {node}: Ray hands out {promised[node]:g} GPUs, torch sees {len(one.gpus)}. Start Ray there "
                    "with --num-gpus of what is there, or without CUDA_VISIBLE_DEVICES.",
                )
            )
    kinds = sorted(set(names))
    return findings or [
        ok("gpus", f"{number(len(names), 'GPU')} on {number(len(nodes), 'node')}: {', '.join(kinds)}")
    ]
