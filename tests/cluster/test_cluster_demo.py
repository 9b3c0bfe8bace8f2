"""The parts of `make demo-cluster` by which it judges and measures; the whole of it takes 25 minutes and runs by itself."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2] / "cluster"))
import demo
import demo_watch
from demo_watch import Progress, Timeline


def test_make_starts_it(repository: Path) -> None:
    # Under `make test` the inner make would also print the folder that it enters and leaves.
    made = subprocess.run(
        ["make", "--no-print-directory", "-n", "demo-cluster"],
        cwd=repository,
        capture_output=True,
        text=True,
        check=True,
    )
    assert made.stdout.splitlines()[-1].endswith("python cluster/demo.py")


@pytest.mark.parametrize("change", [None, "missing", "twice", "unfinished"])
def test_a_run_passes_only_with_every_sample_exactly_once(tmp_path: Path, change: str | None) -> None:
    steps = demo.STEPS["gfdm"]
    rows = [{"split": "train", "step": step, "samples": demo.BATCH * step} for step in range(1, steps + 1)]
    if change == "missing":
        del rows[7]
    if change == "twice":
        rows.append(rows[7])
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "metrics.jsonl").write_text(lines + '{"split": "train", "st')  # a line on its way
    (tmp_path / "summary.json").write_text(json.dumps({"steps": steps - (change == "unfinished")}))
    assert demo_watch.trained_step(tmp_path) == steps
    if change is None:
        demo.check_run(tmp_path, "gfdm")
    else:
        with pytest.raises(AssertionError):
            demo.check_run(tmp_path, "gfdm")


def test_a_timeline_adds_up_the_seconds_of_nodes() -> None:
    timeline = Timeline(lambda: None)
    timeline.close()
    timeline.points = [(0.0, Counter()), (1.0, Counter(decode=1)), (3.0, Counter(decode=2)), (4.0, Counter())]
    assert timeline.total_s("decode", 0.0, 4.0) == 2 * 1 + 1 * 2
    assert timeline.total_s("decode", 2.0, 3.5) == 1 * 1 + 0.5 * 2
    assert timeline.first("decode", 2, 0.0) == 3.0 and timeline.first("decode", 3, 0.0) is None
    assert timeline.last_above("decode", 1, 0.0) == 3.0
    assert timeline.most("decode", 0.0) == 2


def test_the_longest_pause_is_the_time_without_anything_new() -> None:
    done, asked = 0, threading.Event()

    def measure() -> int:
        asked.set()
        return done

    with Progress(measure).longest_pause() as pause:
        assert asked.wait(60)
        time.sleep(0.5)
        done = 1
        time.sleep(0.3)
    assert pause[0] > 0.45


def test_nothing_more_is_expected_of_what_has_reached_its_end() -> None:
    with Progress(lambda: 5, end=5).longest_pause() as pause:
        time.sleep(0.4)
    assert pause[0] == 0.0


def test_a_failed_job_ends_the_wait_for_anything(tmp_path: Path) -> None:
    waiting = demo.Demo(demo.LocalCluster(tmp_path), tmp_path, 8000)
    (tmp_path / "fleet.log").write_text("ConfigError: a key has no value")
    waiting.jobs["fleet"] = subprocess.Popen([sys.executable, "-c", "raise SystemExit(2)"])
    with pytest.raises(AssertionError, match=r"fleet ended with 2.*\n.*a key has no value"):
        waiting.until("what never comes", lambda: False)


@pytest.mark.parametrize("stages", ["", "ingest,serv", "pretrain"])
def test_stages_that_cannot_run_are_refused(
    tmp_path: Path, stages: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["demo.py", "--folder", str(tmp_path), "--stages", stages])
    with pytest.raises(SystemExit):
        demo.main()
    assert f"--stages {stages}: " in capsys.readouterr().err
