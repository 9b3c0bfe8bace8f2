"""benchmarks/exact_resume.py counts what it says, and our half of it: 2 -> 1 -> 3 workers see each sample once.

That the loop reads exactly these numbers is checked by the loop itself at every step, and by running the script.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from defi_platform.data.sampling.sharding import Shard

STEPS = 21


@pytest.fixture(scope="module")
def script(repository: Path) -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("exact_resume", repository / "benchmarks/exact_resume.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(repository / "benchmarks"))
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    sys.path.remove(str(repository / "benchmarks"))


def rows_of(script: ModuleType, plan: list[Any]) -> list[dict[str, Any]]:
    """What the workers of each attempt read, from the last checkpoint on; killed ones read past theirs."""
    rows, first = [], 0
    for attempt in plan:
        last = attempt.kill_at or STEPS
        for rank in range(attempt.workers):
            shard = Shard(
                start=first * script.BATCH,
                stop=STEPS * script.BATCH,
                rank=rank,
                world_size=attempt.workers,
                global_batch=script.BATCH,
                micro_batch=script.BATCH // attempt.workers // 2,
            )
            for step in range(first + 1, last + 1):
                for micro in range(shard.accumulation):
                    samples = list(shard.samples((step - 1) * script.BATCH, micro))
                    rows.append({"from": attempt.workers, "step": step, "samples": samples})
        first = last // script.CHECKPOINT_EVERY * script.CHECKPOINT_EVERY
    return rows


def test_2_then_1_then_3_workers_killed_mid_epoch_see_each_sample_once_in_its_step(
    script: ModuleType,
) -> None:
    plan = script.attempts(STEPS)
    assert [(one.workers, one.kill_at) for one in plan] == [(2, 7), (1, 13), (3, None)]
    rows = rows_of(script, plan)
    # Steps 7 and 13 were computed twice: the first time by workers whose weights are lost.
    assert sum(len(row["samples"]) for row in rows) == (STEPS + 2) * script.BATCH
    killed = script.learned(rows, plan)
    calm = [script.Attempt(2, None)]
    undisturbed = script.learned(rows_of(script, calm), calm)
    assert sorted(sample for step in killed.values() for sample in step) == list(range(252))
    assert script.Score.of(killed, undisturbed, 252) == script.Score(0, 0, 0)


def test_what_is_repeated_lost_and_moved_is_counted(script: ModuleType) -> None:
    undisturbed = {1: [0, 1], 2: [2, 3], 3: [4, 5]}
    score = script.Score.of({1: [0, 1], 2: [0, 2], 3: [4, 5, 5]}, undisturbed, 6)
    assert score == script.Score(repeated=2, lost=1, reordered=2)
    assert script.Score.of({1: [0, 1]}, undisturbed, 6) == script.Score(0, 4, 2)
