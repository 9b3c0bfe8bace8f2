"""Evaluations made of rows: a benchmark without a simulator, and outcomes that a test chooses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa

from defi_platform.evaluate.benchmarks.interface import ActionSpec, Benchmark, Step, Task, View
from defi_platform.evaluate.results.evaluation import write_results
from defi_platform.evaluate.results.protocol import protocol_of

VIEW = View(("front",), 64, 64)


class Pushing(Benchmark):
    """Two tasks; its simulator is never built."""

    name = "pushing"
    cameras = ("front",)
    default_view = VIEW
    state_names = ("x", "y")
    action = ActionSpec(("dx", "dy"), (-1.0, -1.0), (1.0, 1.0))
    control_hz = 10.0
    options: ClassVar[Mapping[str, tuple[Any, ...]]] = {"floor": ("smooth", "rough")}

    @classmethod
    def tasks(cls, options: Mapping[str, Any]) -> tuple[Task, ...]:
        return (Task("cube", "push the cube", 50), Task("ball", "push the ball", 60))

    def protocol(self) -> dict[str, Any]:
        raise AssertionError("never built")

    def reset(self, task: str, seed: int) -> Any:
        raise AssertionError("never built")

    def step(self, action: Any) -> Step:
        raise AssertionError("never built")

    def render(self) -> dict[str, Any]:
        raise AssertionError("never built")


class Apart(Pushing):
    """Its two tasks are never averaged."""

    @classmethod
    def groups(cls) -> Mapping[str, Sequence[str]]:
        return {"matching": ("cube",), "variants": ("ball",)}


class Chained(Pushing):
    """Chains of three."""

    chain_length = 3


def episode(task: str, seed: int, success: bool | None, **other: Any) -> dict[str, Any]:
    """A row; success None: left out after two aborts."""
    faults = [{"kind": "abort", "message": "signal 6", "place": "host:41"}] * 2 if success is None else []
    row = {
        "benchmark": "pushing", "arm": "policy", "task": task, "seed": seed, "success": success,
        "solved": int(bool(success)), "subtasks": [
            {"name": task, "instruction": f"push the {task}", "success": bool(success), "steps": 20 + seed % 7}
        ],
        "steps": 20 + seed % 7, "reward": 0.5, "wall_s": 1.25, "latency_ms": [10.0, 30.0], "instructions": [],
        "simulator_errors": faults, "initial_state": [seed / 10, -seed / 10], "initial_positions": [], "policy_digest": "d1",
        "video": None, "host": "one", "unit": f"{task}{seed}",
        "steps_file": None,
    }  # fmt: skip
    return {**row, **other}


def steps_of(row: Mapping[str, Any]) -> pa.Table:
    """Four steps with a request at the first and the third."""
    return pa.table(
        {
            "step": pa.array(range(4), pa.int32()),
            "subtask": pa.array([0] * 4, pa.int32()),
            "observation_sha256": ["aa", "", "bb", ""],
            "action": pa.array([[0.5, 2.0]] * 4, pa.list_(pa.float32())),
            "executed": pa.array([[0.5, 1.0]] * 4, pa.list_(pa.float32())),
            "reward": np.array([0, 0, 0, row["reward"]], np.float32),
            "success": [False, False, False, bool(row["success"])],
        }
    )


def evaluated(
    output: Path,
    rows: Sequence[Mapping[str, Any]],
    benchmark: type[Benchmark] = Pushing,
    more: Mapping[str, Any] | None = None,
    **changes: Any,
) -> dict[str, Any]:
    """Writes the results of `rows`; `more` is for the summary, `changes` of the protocol."""
    seeds = {
        task: sorted({row["seed"] for row in rows if row["task"] == task})
        for task in {row["task"] for row in rows}
    }
    protocol = {
        **protocol_of(
            benchmark, options={"floor": "smooth"}, view=VIEW, tasks=["cube", "ball"], max_steps=None,
            execute_steps=2, seeds=seeds, simulator={"version": "3.1"}, policy={"digest": "d1"}, rows=rows,
        ),
        **changes,
    }  # fmt: skip
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    return write_results(
        str(output), rows, ((row, steps_of(row)) for row in rows), arms=arms, protocol=protocol,
        benchmark=benchmark, more={"skipped": {}, "wall_s": 3.0, **(more or {})},
    )  # fmt: skip
