"""The same episodes on one worker and on two, after five kills, and by two drivers at once.

    python benchmarks/evaluation.py [tasks=[MT10]] [seeds=20] [max_steps=40] [kills=5] [url=ws://...] [keep=FOLDER]

A nano policy with random weights is served once (`model.deterministic`), and drivers in processes of their own evaluate it on
Meta-World: with one worker; with two; with two and SIGKILL to the driver at random moments, each time followed by the same
command; and with two drivers of one worker each on one output. Every pass must end with the rows of the first, down to the hash
of each observation, action and reward, and with one file per episode. Ends with 1 and says where if not.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray

from defi_platform.cluster import ray_session
from defi_platform.config import InferenceConfig, RayConfig, ServeConfig
from defi_platform.config.loader import load_config
from defi_platform.evaluate.results.episodes import read_episodes

JOB = Path(__file__).resolve().parents[1] / "jobs" / "evaluate_policy.py"
EXACT = (
    "arm",
    "task",
    "seed",
    "unit",
    "steps_file",
    "success",
    "solved",
    "subtasks",
    "steps",
    "reward",
    "initial_state",
)
"""Of a row, all that is to be the same; the name of the steps' file has the hash of its content."""


@dataclass
class EvaluationBenchmarkConfig:
    """benchmarks/evaluation.py."""

    tasks: list[str] = field(default_factory=lambda: ["MT10"])
    """Tasks of Meta-World, or groups of them."""
    seeds: int = 20
    """Episodes per task."""
    arms: list[str] = field(default_factory=lambda: ["policy"])
    max_steps: int = 40
    kills: int = 5
    """Drivers to kill, each after a random number of episodes, so that the machine's load does not matter."""
    url: str | None = None
    """Policy that is served already, with a policy_digest; null: a nano policy with random weights."""
    address: str | None = None
    """Ray cluster for all passes; null: one of this machine."""
    keep: str | None = None
    """Folder for the outputs; null: a temporary one."""


@dataclass(frozen=True)
class Pass:
    """One way to the table."""

    name: str
    wall_s: float
    rows: list[dict[str, Any]]
    """`EXACT` of each."""
    rates: dict[str, Any]
    files: int
    """Episodes in the store."""
    lost: int
    """Drivers that were killed."""


class Passes:
    """Runs drivers on a cluster that stays."""

    def __init__(self, config: EvaluationBenchmarkConfig, folder: Path, url: str, address: str):
        self._config, self._folder, self._url, self._address = config, folder, url, address

    def run(self, name: str, *, workers: int, drivers: int = 1, kill_at: Sequence[int] = ()) -> Pass:
        """One pass.

        Args:
            name: of the pass.
            workers: of each driver.
            drivers: at the same time.
            kill_at: numbers of finished episodes, at each of which a driver before those is killed.
        """
        output = self._folder / name.replace(" ", "_")
        start, lost = time.monotonic(), 0
        for finished in kill_at:
            driver = self._start(output, workers)
            while driver.poll() is None and len(list((output / "episodes").glob("*.json"))) < finished:
                time.sleep(0.05)
            if driver.poll() is not None:
                break  # it was faster than its killer
            driver.send_signal(signal.SIGKILL)
            driver.wait()
            lost += 1
        running = [self._start(output, workers) for _ in range(drivers)]
        for driver in running:
            if driver.wait():
                said = Path(f"{output}.log").read_text(errors="replace")[-2000:]
                raise SystemExit(f"{name}: a driver ended with {driver.returncode}:\n{said}")
        rows = read_episodes(str(output))
        summary = json.loads((output / "summary.json").read_text())
        return Pass(
            name,
            time.monotonic() - start,
            [{key: row[key] for key in EXACT} for row in rows],
            summary["arms"],
            len(list((output / "episodes").glob("*.json"))),
            lost,
        )

    def _start(self, output: Path, workers: int) -> subprocess.Popen[bytes]:
        config = self._config
        overrides = {
            "url": self._url,
            "ray.address": self._address,
            "tasks": f"[{','.join(config.tasks)}]",
            "arms": f"[{','.join(config.arms)}]",
            "episodes_per_task": config.seeds,
            "max_steps": config.max_steps,
            "video_every": 0,
            "workers": workers,
            "output": output,
        }
        command = [sys.executable, str(JOB), *(f"{key}={value}" for key, value in overrides.items())]
        with open(f"{output}.log", "ab") as log:
            return subprocess.Popen(command, stdout=log, stderr=log, env=os.environ)


def differences(first: Pass, other: Pass) -> list[str]:
    """Where two passes differ, in words."""
    found = []
    if len(first.rows) != len(other.rows):
        found.append(f"{other.name}: {len(other.rows)} rows, {first.name} has {len(first.rows)}")
    for one, two in zip(first.rows, other.rows, strict=False):
        changed = [key for key in EXACT if one[key] != two[key]]
        if changed:
            found.append(
                f"{other.name}: {one['arm']} {one['task']} {one['seed']} differs in {', '.join(changed)}"
            )
    if first.rates != other.rates:
        found.append(f"{other.name}: another table")
    for passed in (first, other):
        if passed.files != len(passed.rows):
            found.append(f"{passed.name}: {passed.files} files of {len(passed.rows)} episodes")
    return found


def measure(config: EvaluationBenchmarkConfig, folder: Path, url: str, address: str) -> list[Pass]:
    """All passes.

    Args:
        config: sizes.
        folder: for the outputs.
        url: of the policy.
        address: of the Ray cluster.
    """
    passes = Passes(config, folder, url, address)
    one = passes.run("1 worker", workers=1)
    two = passes.run("2 workers", workers=2)
    # One episode at least is left to run after the last kill.
    moments = sorted(random.Random(0).sample(range(1, len(one.rows)), config.kills))
    killed = passes.run("2 workers, killed", workers=2, kill_at=moments)
    return [one, two, killed, passes.run("2 drivers", workers=1, drivers=2)]


def report(passes: list[Pass]) -> int:
    """Prints the table and every difference. Returns: the exit code."""
    print("| pass | episodes | drivers killed | wall s | rows and step hashes |\n|---|---|---|---|---|")
    found = []
    for passed in passes:
        wrong = differences(passes[0], passed)
        found += wrong
        same = "the first pass" if passed is passes[0] else "differ" if wrong else "identical"
        print(f"| {passed.name} | {len(passed.rows)} | {passed.lost} | {passed.wall_s:.0f} | {same} |")
    print("\n".join(found))
    return bool(found)


@contextlib.contextmanager
def served(config: EvaluationBenchmarkConfig, folder: Path) -> Iterator[tuple[str, str]]:
    """Yields the urls of the policy and of the Ray cluster."""
    with ray_session(RayConfig(address=config.address, local_cpus=4)):
        address = ray.get_runtime_context().gcs_address
        if config.url:
            yield config.url, address
            return
        import torch

        from defi_models import presets
        from defi_models.policy import DeFIPolicy
        from defi_platform.serve.deployment.server import deploy

        torch.manual_seed(0)
        policy = DeFIPolicy(presets.policy("nano", cameras=["workspace"])).save_pretrained(folder / "policy")
        serve = ServeConfig(policy=str(policy), port=0, threads=1, model=InferenceConfig(deterministic=True))
        with deploy(serve) as server:
            yield server.url, address


def main() -> int:
    """Runs the benchmark. Returns: 0 when every pass is that of the first."""
    config = load_config(EvaluationBenchmarkConfig, None, sys.argv[1:])
    with contextlib.ExitStack() as stack:
        folder = Path(config.keep or stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        url, address = stack.enter_context(served(config, folder))
        return report(measure(config, folder, url, address))


if __name__ == "__main__":
    sys.exit(main())
