"""`make demo` at miniature size: the real stages, the real simulator, the real server, one after the other."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

TASKS = "[drawer-close-v3,door-close-v3]"
MINIATURE = [
    f"record.tasks={TASKS}",
    "record.episodes_per_task=4",
    "record.labelled_per_task=2",
    *(
        f"pretrain.{name}.{setting}"
        for name in ("gfdm", "gidm")
        for setting in (
            "train.steps=4",
            "train.global_batch=4",
            "train.micro_batch=4",
            "train.validation_batches=1",
            "train.validate_every=4",
            "train.checkpoint_every=2",
            "data.holdout=0.3",
        )
    ),
    # W&B of one training starts and ends as that of all.
    "pretrain.gfdm.tracking.wandb=false",
    "finetune.tracking.wandb=false",
    "finetune.train.steps=2",
    "finetune.train.global_batch=4",
    "finetune.train.micro_batch=4",
    "finetune.train.validation_batches=1",
    "finetune.data.holdout=0.3",
    f"evaluate.tasks={TASKS}",
    "evaluate.episodes_per_task=1",
    "evaluate.max_steps=20",
    "evaluate.serve.port=0",
]


def demo_command(repository: Path, *overrides: str) -> list[str]:
    config = repository / "configs" / "demo" / "demo.yaml"
    return [
        sys.executable,
        str(repository / "jobs" / "demo.py"),
        "--config",
        str(config),
        *MINIATURE,
        *overrides,
    ]


def run_demo(repository: Path, home: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "DEFI_HOME": str(home)}
    return subprocess.run(
        demo_command(repository), env=environment, capture_output=True, text=True, timeout=500, cwd=home
    )


def wait_for(process: subprocess.Popen[bytes], told: Path, condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 300
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, told.read_text()
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_demo_survives_ctrl_c_ends_with_a_report_and_is_reused(repository: Path, tmp_path: Path) -> None:
    # Ctrl-C as soon as the corpus is there: the recording is kept, pretraining is cut off. A second one, because
    # stopping at a checkpoint would wait for the workers that are only starting.
    told = tmp_path / "interrupted"
    with told.open("wb") as output:
        interrupted = subprocess.Popen(
            demo_command(repository),
            env={**os.environ, "DEFI_HOME": str(tmp_path)},
            stdout=output,
            stderr=output,
            cwd=tmp_path,
            start_new_session=True,
        )
    # Its status is shown: what Ctrl-C does is decided.
    wait_for(interrupted, told, lambda: "gfdm" in told.read_text())
    os.killpg(interrupted.pid, signal.SIGINT)
    wait_for(interrupted, told, lambda: "Ctrl-C again to stop at once" in told.read_text())
    os.killpg(interrupted.pid, signal.SIGINT)
    assert interrupted.wait(60) == 130, told.read_text()
    assert "run the same command again" in told.read_text()
    assert not (tmp_path / "demo" / "report.html").exists()

    first = run_demo(repository, tmp_path)
    assert first.returncode == 0, first.stdout + first.stderr
    assert re.search(r"\[1/5\].*reused", first.stdout)
    for expected in (
        "policy",
        "random",
        "expert",
        "GFDM loss on held-out video",
        "codes in use",
        "served policy",
    ):
        assert expected in first.stdout
    report = Path(re.search(r"report: (.+)", first.stdout)[1])  # type: ignore[index]
    page = report.read_text()
    assert "<svg" in page and "data:image/png;base64," in page and "data:video/mp4;base64," in page
    assert not re.search(r'(?:src|href)="(?!data:|#)', page), "the page needs nothing beside itself"
    results = json.loads((tmp_path / "demo" / "evaluation" / "summary.json").read_text())
    assert results["arms"]["policy"]["pooled"]["episodes"] == 2

    second = run_demo(repository, tmp_path)
    assert second.returncode == 0, second.stdout + second.stderr
    assert len(re.findall("reused", second.stdout)) == 4
