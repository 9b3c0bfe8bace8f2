"""The protocol of an evaluation: everything that a rate depends on, and what it ran on, as one JSON value."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from defi_platform.errors import ConfigError
from defi_platform.evaluate.benchmarks.interface import Benchmark, View

OUTCOME = (
    "benchmark", "options", "view", "horizons", "execute_steps", "action", "control_hz", "pooled_by", "groups",
    "simulator",
)  # fmt: skip
"""Parts that decide outcomes: rates of evaluations that differ in one of them are not of the same thing."""
_PACKAGES = ("defi-platform", "numpy", "ray", "torch")


def protocol_of(
    benchmark: type[Benchmark],
    *,
    options: Mapping[str, Any],
    view: View,
    tasks: Sequence[str],
    max_steps: int | None,
    execute_steps: int | None,
    seeds: Mapping[str, Sequence[int]],
    simulator: Mapping[str, Any],
    policy: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """The protocol in full, as JSON values.

    Args:
        benchmark: class of the benchmark.
        options: its own, as `resolved_options` gives them.
        view: cameras and image size.
        tasks: that were evaluated.
        max_steps: per (sub)task; None: each task's horizon.
        execute_steps: actions of a chunk that were executed; None where nothing asked for chunks.
        seeds: of the initial states by task, in order; a task may have none.
        simulator: what the benchmark says of itself where it ran (`Benchmark.protocol`).
        policy: identity of the policy: digest or name.
        rows: of the episodes; they name the hosts.
    """
    horizons = {task.name: task.horizon for task in benchmark.tasks(options)}
    return {
        "benchmark": benchmark.name,
        "options": dict(options),
        "view": asdict(view),
        "horizons": {task: max_steps or horizons[task] for task in tasks},
        "execute_steps": execute_steps,
        "action": asdict(benchmark.action),
        "control_hz": benchmark.control_hz,
        "pooled_by": benchmark.pooled_by,
        "groups": {name: list(members) for name, members in benchmark.groups().items()},
        "simulator": dict(simulator),
        "seeds": _extent({task: some for task, some in seeds.items() if some}),
        "policy": dict(policy),
        "versions": versions(),
        "hardware": {**hardware(), "hosts": sorted({row["host"] for row in rows if row.get("host")})},
    }


def _extent(seeds: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """First and last seed, and how many of each task: a number, or one by task where they differ."""
    counts = {task: len(some) for task, some in seeds.items()}
    return {
        "first": min(map(min, seeds.values())),
        "last": max(map(max, seeds.values())),
        "per_task": next(iter(counts.values())) if len(set(counts.values())) == 1 else counts,
    }


def versions() -> dict[str, str]:
    """Versions of Python and of the packages on this side of the simulator."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # run from a checkout, or by a lighter install
            found[name] = "not installed as a package"
    return found


def hardware() -> dict[str, Any]:
    """Processor, cores and memory of this machine."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "machine": platform.machine(),
        "system": f"{platform.system()} {platform.release()}",
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(memory / 1e9, 1),
    }


def differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Dotted name -> (value there, value here) of what decides outcomes and is not the same.

    Args:
        first: protocol of an evaluation.
        second: that of another; horizons count for the tasks that both have.

    Raises:
        ConfigError: a protocol lacks a part.
    """
    found: dict[str, tuple[Any, Any]] = {}
    for part in OUTCOME:
        for protocol in (first, second):
            if part not in protocol:
                raise ConfigError(
                    f"a protocol says nothing about {part}: it was not written by this version; evaluate again."
                )
        one, other = first[part], second[part]
        if part == "horizons":
            shared = one.keys() & other.keys()
            one, other = ({task: value[task] for task in shared} for value in (one, other))
        _compare(part, one, other, found)
    return found


def _compare(name: str, one: Any, other: Any, found: dict[str, tuple[Any, Any]]) -> None:
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        for key in sorted(one.keys() | other.keys()):
            _compare(f"{name}.{key}", one.get(key), other.get(key), found)
    elif one != other:
        found[name] = (one, other)
