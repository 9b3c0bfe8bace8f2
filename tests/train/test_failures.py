"""An elastic run on several raylets, hit by one failure after the other: benchmarks/failures.py, as anyone can run it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.timeout(850)
def test_whatever_fails_one_after_the_other_a_run_ends_with_every_sample_learned_from_once(
    repository: Path,
) -> None:
    script = repository / "benchmarks" / "failures.py"
    command = [sys.executable, str(script), "--quick", "--away", "12"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stdout + done.stderr
    table = {
        name: (int(again), int(meanwhile), int(workers))
        for name, again, meanwhile, workers in re.findall(
            r"^\| ([^|]+) \| (\d+) \| (\d+) \| [\d.]+ s \| (\d) \|$", done.stdout, re.M
        )
    }
    if disk := table.pop("local disk full for two checkpoints", None):
        assert disk[0] == 0 and disk[1] > 2 * 10
    again, meanwhile, _ = table.pop("store away for 12 s")
    assert again == 0 and meanwhile > 5, "training goes on meanwhile"
    assert table.pop("a spot node is announced to go, and goes")[0] <= 10, "a checkpoint was made for it"
    # A worker that is killed and a checkpoint that is damaged are in test_run.
    assert {name: workers for name, (_, _, workers) in table.items()} == {"a node comes": 2}
    assert "every sample learned from exactly once" in done.stdout
