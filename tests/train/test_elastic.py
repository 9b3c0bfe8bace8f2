"""Workers come and go with the nodes of a real cluster of several raylets."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny


@pytest.mark.slow
def test_a_node_that_is_announced_to_go_loses_no_step_and_a_new_one_grows_the_run_again(
    tmp_path: Path,
) -> None:
    script = Path(__file__).with_name("elastic_job.py")
    job = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "run")], capture_output=True, text=True, timeout=500
    )
    assert job.returncode == 0, job.stdout + job.stderr
    run = tmp_path / "run"
    attempts = tiny.rows(run, "attempt")
    workers = [row["workers"] for row in attempts]
    assert workers[0] == 2 and 1 in workers and workers[-1] == 2, workers
    (notice,) = tiny.rows(run, "preemption")
    assert attempts[workers.index(1)]["step"] == notice["step"] > 6, "there is no other checkpoint"
    rows = tiny.rows(run, "train")
    assert [row["samples"] for row in rows] == [4 * step for step in range(1, 29)]
    assert json.loads((run / "summary.json").read_text())["steps"] == 28
    assert tiny.final_count(run) == 112, "every sample was learned from once"
