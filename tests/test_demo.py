"""`make demo` at miniature size: the real stages, the real simulator, the real server, one after the other; and the
README's jobs, which are its stages."""

from __future__ import annotations

import json
import os
import re
import runpy
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent / "cluster"))
from readme import the_one

pytestmark = pytest.mark.slow

TASKS = "[drawer-close-v3,door-close-v3]"
SMALL_TRAINING = "train.global_batch=4 train.micro_batch=4 train.validation_samples=4 train.sampled_clips=2 data.holdout=0.3"
SMALL_PRETRAINING = f"train.steps=4 train.validate_every=4 train.checkpoint_every=2 {SMALL_TRAINING}"
MINIATURE = {
    "record": f"tasks={TASKS} episodes_per_task=4 labelled_per_task=2",
    # W&B of one training starts and ends as that of all.
    "pretrain.gfdm": f"tracking.wandb=false {SMALL_PRETRAINING}",
    "pretrain.gidm": SMALL_PRETRAINING,
    "finetune": f"tracking.wandb=false train.steps=2 {SMALL_TRAINING}",
    "evaluate": f"tasks={TASKS} episodes_per_task=1 max_steps=20 serve.port=0",
}
"""Part of the demo's configuration -> overrides."""
STEP_BY_STEP = {
    "record_demos": MINIATURE["record"],
    "pretrain_gfdm": MINIATURE["pretrain.gfdm"],
    "pretrain_gidm": MINIATURE["pretrain.gidm"],
    "pretrain": " ".join(
        f"{name}.{setting}" for name in ("gfdm", "gidm") for setting in MINIATURE[f"pretrain.{name}"].split()
    ),
    "finetune_policy": MINIATURE["finetune"],
    "evaluate_policy": MINIATURE["evaluate"],
}
"""Job of the README -> overrides that make it the demo's stage."""


def demo_command(repository: Path) -> list[str]:
    config = repository / "configs" / "demo" / "demo.yaml"
    overrides = [f"{part}.{setting}" for part, small in MINIATURE.items() for setting in small.split()]
    return [sys.executable, str(repository / "jobs" / "demo.py"), "--config", str(config), *overrides]


def run_demo(repository: Path, home: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "DEFI_HOME": str(home)}
    return subprocess.run(
        demo_command(repository), env=environment, capture_output=True, text=True, timeout=500, cwd=home
    )


def wait_for(process: subprocess.Popen[bytes], printed: Path, condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 300
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, printed.read_text()
        time.sleep(0.05)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def finished(repository: Path, home: Path) -> str:
    """A demo that was interrupted and has then gone on to its end. Returns: what it printed."""
    # Ctrl-C as soon as the corpus is there: the recording is kept, pretraining is cut off. A second one, because
    # stopping at a checkpoint would wait for the workers that are only starting.
    printed = home / "interrupted"
    with printed.open("wb") as output:
        interrupted = subprocess.Popen(
            demo_command(repository),
            env={**os.environ, "DEFI_HOME": str(home)},
            stdout=output,
            stderr=output,
            cwd=home,
            start_new_session=True,
        )
    # Its status is shown: what Ctrl-C does is decided.
    wait_for(interrupted, printed, lambda: "gfdm" in printed.read_text())
    os.killpg(interrupted.pid, signal.SIGINT)
    wait_for(interrupted, printed, lambda: "Ctrl-C again to stop at once" in printed.read_text())
    os.killpg(interrupted.pid, signal.SIGINT)
    assert interrupted.wait(240) == 130, printed.read_text()
    assert "run the same command again" in printed.read_text()
    assert not (home / "demo" / "report.html").exists()

    first = run_demo(repository, home)
    assert first.returncode == 0, first.stdout + first.stderr
    return first.stdout


@pytest.mark.timeout(900)
def test_the_demo_survives_ctrl_c_and_ends_with_a_report(finished: str, home: Path) -> None:
    assert re.search(r"\[1/5\].*reused", finished)
    for expected in (
        "policy",
        "random",
        "expert",
        "GFDM loss on held-out video",
        "codes in use",
        "served policy",
    ):
        assert expected in finished
    report = Path(re.search(r"report: (.+)", finished)[1])  # type: ignore[index]
    page = report.read_text()
    assert "<svg" in page and "data:image/png;base64," in page and "data:video/mp4;base64," in page
    assert not re.search(r'(?:src|href)="(?!data:|#)', page), "the page needs nothing beside itself"
    results = json.loads((home / "demo" / "evaluation" / "summary.json").read_text())
    assert results["arms"]["policy"]["pooled"]["episodes"] == 2
    assert results["policy"]["preset"] == "nano", "what the policy that it served said of itself"


def test_the_demo_started_again_reuses_all_of_it(finished: str, repository: Path, home: Path) -> None:
    second = run_demo(repository, home)
    assert second.returncode == 0, second.stdout + second.stderr
    assert len(re.findall("reused", second.stdout)) == 4


def test_the_readmes_jobs_step_by_step_are_the_demos_stages(
    finished: str,
    repository: Path,
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Each line as it is written there, but in this process and at the demo's size, finds what the demo has left."""
    monkeypatch.setenv("DEFI_HOME", str(home))
    monkeypatch.setenv("PYTHONPATH", "")  # the jobs add to it
    monkeypatch.chdir(repository)
    monkeypatch.syspath_prepend(repository / "jobs")
    printed = {}
    for job, small in STEP_BY_STEP.items():
        arguments = shlex.split(f"{the_one('Step by step', f'python jobs/{job}.py')} {small}")[1:]
        monkeypatch.setattr(sys, "argv", arguments)
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(arguments[0], run_name="__main__")
        assert not ended.value.code, job
        printed[job] = capsys.readouterr().out
    assert "already recorded" in printed["record_demos"]
    complete = {job: text.count("is complete, nothing to do") for job, text in printed.items()}
    assert complete == {
        "record_demos": 0,
        "pretrain_gfdm": 1,
        "pretrain_gidm": 1,
        "pretrain": 2,
        "finetune_policy": 1,
        "evaluate_policy": 0,
    }
    assert "evaluated before, reused" in printed["evaluate_policy"]
