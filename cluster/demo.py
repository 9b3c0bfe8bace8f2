"""The platform on an autoscaling cluster that loses machines, on this one: `make demo-cluster`.

    python cluster/demo.py [--folder FOLDER] [--port 6379] [--dashboard-port 8265]

Everything runs as supervised jobs (jobs/supervise.py) on the cluster of local.py. Decode nodes come and go with an
ingest; both pretrainings run in parallel; one decode node, one train node and the head are killed while they work; then
the policy is served to simulators while its replicas come and go. What has to hold is checked, and the times are written
to times.md in the folder.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

sys.path.append(str(Path(__file__).resolve().parent))
from demo_watch import (
    Progress,
    Timeline,
    checkpoint_step,
    count_nodes,
    count_replicas,
    opened_blocks,
    train_rows,
    trained_step,
)
from local import LocalCluster, default_folder, token_environment

REPOSITORY = Path(__file__).resolve().parents[1]
VIDEOS, DIFFERENT_VIDEOS, FPS = 320, 8, 30
STEPS = {"gfdm": 160, "gidm": 480}
BATCH = 4
CHECKPOINT_EVERY = 10
TASKS, EPISODES = ("button-press-v3", "door-close-v3"), 6
TIMEOUT_S = 600.0


class Demo:
    """The demo's state: its cluster, its folder, and the rows of its table.

    Args:
        cluster: may be up already.
        folder: receives everything; emptied before.
        policy_port: of the served policy.
    """

    def __init__(self, cluster: LocalCluster, folder: Path, policy_port: int):
        self.cluster, self.folder, self.policy_port = cluster, folder, policy_port
        self.rows: list[tuple[str, str]] = []
        self.nodes: Timeline
        self.jobs: list[subprocess.Popen[bytes]] = []

    def note(self, what: str, result: str) -> None:
        """Adds a row to the table."""
        self.rows.append((what, result))
        print(f"{what}: {result}", flush=True)

    def start(self, name: str, job: str, *overrides: str) -> subprocess.Popen[bytes]:
        """Starts a supervised job. Its log is NAME.log."""
        command = [
            sys.executable, str(REPOSITORY / "jobs" / "supervise.py"), "--address", self.cluster.url,
            "--working-dir", str(REPOSITORY), job, *overrides,
        ]  # fmt: skip
        with (self.folder / f"{name}.log").open("w") as log:
            started = subprocess.Popen(command, stdout=log, stderr=log)
        self.jobs.append(started)
        return started

    def finish(self, name: str, job: subprocess.Popen[bytes]) -> None:
        """Waits for the end of a supervised job. Raises: AssertionError when it did not succeed."""
        log = self.folder / f"{name}.log"
        with contextlib.suppress(subprocess.TimeoutExpired):
            job.wait(TIMEOUT_S)
        assert job.returncode == 0, (
            f"{name} ended with {job.returncode}; the end of {log}:\n{log.read_text()[-3000:]}"
        )

    def gone(self, node_type: str, since: float) -> float:
        """Waits until no node of a type is left. Returns: seconds from `since` to then."""
        deadline = time.monotonic() + 120
        while self.nodes.now()[node_type]:
            assert time.monotonic() < deadline, f"{node_type} nodes were not released: {self.nodes.now()}"
            time.sleep(0.5)
        return (self.nodes.last_above(node_type, 0, 0.0) or since) - since


def write_corpus(folder: Path) -> None:
    """Writes videos of a square that moves over a gradient; several names share a file's content."""
    from defi_platform.data.writers.h264 import encode_h264

    folder.mkdir(parents=True)
    height, width, count = 240, 320, 10 * FPS
    y, x = np.mgrid[0:height, 0:width]
    for number in range(DIFFERENT_VIDEOS):
        ground = np.stack([x * 255 // width, y * 255 // height, (x + y + 40 * number) % 256], -1) // 2
        frames = []
        for t in range(count):
            frame = ground.astype(np.uint8)
            left, top = (3 * t + 40 * number) % (width - 40), 60 + 10 * number
            frame[top : top + 40, left : left + 40] = (250, 200, 30 * number)
            frames.append(frame)
        (folder / f"video_{number:04d}.mp4").write_bytes(encode_h264(frames, FPS))
    for number in range(DIFFERENT_VIDEOS, VIDEOS):
        os.link(folder / f"video_{number % DIFFERENT_VIDEOS:04d}.mp4", folder / f"video_{number:04d}.mp4")


def rows_of_manifest(folder: Path) -> list[dict[str, Any]]:
    """All rows of a manifest, in its own order."""
    import pyarrow.parquet as pq

    (file,) = (folder / "corpora" / "videos").glob("videos-*.parquet")
    rows: list[dict[str, Any]] = pq.read_table(file).to_pylist()
    return rows


def ingest(demo: Demo) -> None:
    """Ingests the corpus twice: once undisturbed, and once with a decode node that is killed."""
    tables = {}
    for name in ("undisturbed", "killed"):
        manifest = demo.folder / f"manifest_{name}"
        progress = Progress(lambda manifest=manifest: opened_blocks(manifest, "videos"))  # type: ignore[misc]
        began = time.monotonic()
        job = demo.start(
            f"ingest_{name}", "ingest_videos", f"data.corpora.videos.path={demo.folder / 'videos'}",
            "data.corpora.videos.filters.scores=true", f"data.manifest={manifest}",
        )  # fmt: skip
        if name == "killed":
            progress.until("opened files on two nodes", lambda: demo.nodes.now()["decode"] == 2, TIMEOUT_S)
            progress.until(
                "opened files", lambda manifest=manifest: opened_blocks(manifest, "videos") >= 4, TIMEOUT_S
            )  # type: ignore[misc]
            with progress.longest_pause() as pause:
                kill(next(iter(demo.cluster.node_processes("decode").values())))
                demo.finish(f"ingest_{name}", job)
            demo.note(
                "ingest, a decode node gets SIGKILL: longest time without opened files", f"{pause[0]:.1f} s"
            )
        else:
            demo.finish(f"ingest_{name}", job)
        ended = time.monotonic()
        tables[name] = rows_of_manifest(manifest)
        demo.note(f"ingest of {VIDEOS} videos, {name}: from the command to its end", f"{ended - began:.0f} s")
        if name == "undisturbed":
            for count in (1, 2):
                first = demo.nodes.first("decode", count, began)
                assert first, f"there were never {count} decode nodes"
                demo.note(f"  decode node {count} joins after", f"{first - began:.0f} s")
            demo.note("  decode nodes are gone after its end within", f"{demo.gone('decode', ended):.0f} s")
            idle = demo.nodes.total_s("idle decode", began, time.monotonic())
            there = demo.nodes.total_s("decode", began, time.monotonic())
            demo.note("  decode nodes were idle", f"{idle:.0f} of {there:.0f} node-seconds")
    assert tables["killed"] == tables["undisturbed"], "the manifests differ"
    assert len(tables["killed"]) == VIDEOS
    demo.note("  both manifests", f"equal, {VIDEOS} rows")


def pretrain(demo: Demo) -> None:
    """Pretrains GFDM and GIDM in parallel; kills a train node and the head while they work."""
    runs = {kind: demo.folder / kind for kind in STEPS}
    began = time.monotonic()
    jobs = {kind: demo.start(kind, f"pretrain_{kind}", *training(demo, kind)) for kind in STEPS}
    both = Progress(lambda: sum(trained_step(run) for run in runs.values()))

    def checkpoints_of_all(steps: int) -> Callable[[], bool]:
        targets = {run: min(trained_step(run) + steps, STEPS[kind]) for kind, run in runs.items()}
        return lambda: all(checkpoint_step(run) >= target for run, target in targets.items())

    both.until("first checkpoints", checkpoints_of_all(CHECKPOINT_EVERY), TIMEOUT_S)
    seen = demo.nodes.now()
    assert seen["train"] == 2, f"both should run in parallel on two train nodes: {seen}"
    demo.note("pretrainings: both have a checkpoint after", f"{time.monotonic() - began:.0f} s")

    def cost(what: str, inflict: Callable[[], None]) -> None:
        """The longest time without a new step of the run that lost most, until all are beyond where they were."""
        watched = {kind: Progress(lambda run=run: trained_step(run)) for kind, run in runs.items()}  # type: ignore[misc]
        before = {kind: one.measure() for kind, one in watched.items()}
        done = [kind for kind, step in before.items() if step >= STEPS[kind]]
        assert not done, f"{done} was over before {what}: it has too few steps"
        with contextlib.ExitStack() as stack:
            pauses = {kind: stack.enter_context(one.longest_pause()) for kind, one in watched.items()}
            inflict()
            both.until(
                f"new steps after {what}",
                lambda: all(
                    one.measure() >= min(before[kind] + 2, STEPS[kind]) for kind, one in watched.items()
                ),
                TIMEOUT_S,
            )
        longest = ", ".join(f"{kind} {pause[0]:.0f} s" for kind, pause in pauses.items())
        demo.note(f"pretrainings, {what}: longest time without a new step", longest)
        both.until("checkpoints before the next failure", checkpoints_of_all(1), TIMEOUT_S)

    cost("a train node gets SIGKILL", lambda: kill(next(iter(demo.cluster.node_processes("train").values()))))
    cost("the head gets SIGKILL and is started again", lambda: lose_head(demo))
    for kind, job in jobs.items():
        demo.finish(kind, job)
        check_run(runs[kind], kind)
    ended = time.monotonic()
    demo.note("pretrainings: from the commands to the end of both", f"{ended - began:.0f} s")
    demo.note("  train nodes are gone within", f"{demo.gone('train', ended):.0f} s")
    steps = " and ".join(f"{steps}" for steps in STEPS.values())
    demo.note("  end", f"steps {steps}, every sample learned from exactly once")


def training(demo: Demo, kind: str) -> list[str]:
    """The command line of a pretraining."""
    values = {
        "data.corpora.metaworld": "null",
        "data.corpora.videos.path": demo.folder / "videos",
        "data.corpora.videos.filters.scores": "true",
        "data.manifest": demo.folder / "manifest_killed",
        "train.output": demo.folder / kind,
        "train.steps": STEPS[kind],
        "train.global_batch": BATCH,
        "train.micro_batch": BATCH,
        "train.resources_per_worker": "{CPU: 1, accelerator: 1}",
        "train.checkpoint_every": CHECKPOINT_EVERY,
        "train.validate_every": STEPS[kind],
        "train.validation_batches": 1,
        "train.log_every": 1,
        "train.max_failures": 10,
        "tracking.wandb": "false",
    }
    config = f"configs/demo/pretrain_{kind}.yaml"
    return ["--config", config, *(f"{key}={value}" for key, value in values.items())]


def check_run(run: Path, kind: str) -> None:
    """Checks that a run is as whole as one to which nothing has happened. Raises: AssertionError."""
    summary = json.loads((run / "summary.json").read_text())
    assert summary["steps"] == STEPS[kind], summary
    counts = Counter(row["samples"] for row in train_rows(run))
    counts.subtract(BATCH * step for step in range(1, STEPS[kind] + 1))
    wrong = {samples // BATCH: count for samples, count in counts.items() if count}
    assert not wrong, f"{kind}: steps that are missing (-1) or there twice (1): {wrong}"


def kill(process: Any) -> None:
    """Ends a raylet as the loss of its machine would: it has no time for anything."""
    process.kill()


def lose_head(demo: Demo) -> None:
    """Kills every process of the head, then starts the cluster again, as whoever runs it would."""
    for process in demo.cluster.head_processes().values():
        process.kill()
    time.sleep(5)
    began = time.monotonic()
    assert demo.cluster.up(), "the head was not dead"
    demo.note("the head is up again after", f"{time.monotonic() - began:.0f} s")


def serve(demo: Demo) -> None:
    """Serves a policy to simulators; the second replica comes and goes while an episode runs."""
    import torch

    from defi_models import presets
    from defi_models.policy import DeFIPolicy

    torch.manual_seed(0)
    policy = DeFIPolicy(presets.policy("nano", cameras=["workspace"])).save_pretrained(demo.folder / "policy")
    began = time.monotonic()
    server = demo.start(
        "serve", "serve_policy", f"policy={policy}", f"port={demo.policy_port}", "replicas.min=1", "replicas.max=2",
        "threads=1", "max_batch_size=8", "scaling.target_in_flight=1.5", "scaling.downscale_delay_s=10",
    )  # fmt: skip
    replicas = Timeline(lambda: count_replicas(demo.cluster.url))
    waiting = Progress(lambda: len(list(demo.folder.glob("*/episodes/*_*_*.json"))))
    waiting.until("the first replica", lambda: replicas.now()["RUNNING"] == 1, TIMEOUT_S)
    demo.note("served policy: first replica after", f"{time.monotonic() - began:.0f} s")
    began = time.monotonic()
    fleets = {"fleet": (3, EPISODES, 40), "lone": (1, 2, 500)}
    evaluations = {
        name: demo.start(
            name, "evaluate_policy", f"url=ws://127.0.0.1:{demo.policy_port}", f"tasks=[{','.join(TASKS)}]",
            "arms=[policy]", f"episodes_per_task={episodes}", f"max_steps={steps}", f"workers={workers}",
            "execute_steps=1", "video_every=0", f"output={demo.folder / name}",
        )
        for name, (workers, episodes, steps) in fleets.items()
    }  # fmt: skip
    for name, evaluation in evaluations.items():
        demo.finish(name, evaluation)
    ended = time.monotonic()
    second = replicas.first("RUNNING", 2, began)
    assert second, f"there never was a second replica: {replicas.points[-3:]}"
    demo.note("  second replica after the evaluations' commands", f"{second - began:.0f} s")
    last = replicas.last_above("RUNNING", 1, began)
    assert last and replicas.now()["RUNNING"] == 1, f"the second replica is still there: {replicas.now()}"
    unix = time.time() - time.monotonic()
    through = [row for row, (start, end) in episodes_of(demo.folder / "lone") if start < last + unix < end]
    assert last < ended and through, "no episode was running when the second replica went"
    demo.note("  second replica gone after", f"{last - began:.0f} s, {len(through)} episode(s) in flight")
    for name, (_, episodes, _) in fleets.items():
        units = Counter((row["task"], row["seed"]) for row, _ in episodes_of(demo.folder / name))
        assert len(units) == units.total() == episodes * len(TASKS), f"{name}: episodes were lost: {units}"
    total = sum(episodes * len(TASKS) for _, episodes, _ in fleets.values())
    demo.note(f"  {total} episodes in {ended - began:.0f} s", "none lost")
    replicas.close()
    server.send_signal(signal.SIGINT)
    server.wait(60)


def episodes_of(output: Path) -> Iterator[tuple[dict[str, Any], tuple[float, float]]]:
    """Yields the row of each finished episode, and the Unix times between which it ran."""
    for file in sorted((output / "episodes").glob("*_*_*.json")):
        row = json.loads(file.read_text())
        end = file.stat().st_mtime
        yield row, (end - row["wall_s"], end)


def run(demo: Demo) -> None:
    """Runs all stages, and ends what they started in any case."""
    began = time.monotonic()
    demo.cluster.down()
    assert demo.cluster.up()
    demo.nodes = Timeline(lambda: count_nodes(demo.cluster))
    try:
        while not demo.nodes.points:
            time.sleep(0.5)
        assert sum(demo.nodes.now()[name] for name in ("decode", "train")) == 0, demo.nodes.now()
        demo.note("the head alone is up after", f"{time.monotonic() - began:.0f} s")
        write_corpus(demo.folder / "videos")
        ingest(demo)
        pretrain(demo)
        serve(demo)
    finally:
        for job in demo.jobs:
            job.kill()
        demo.nodes.close()
        demo.cluster.down()
    demo.note("all of it", f"{(time.monotonic() - began) / 60:.1f} min")


def main() -> int:
    """Runs the demo. Returns: the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, default=default_folder(), help="a short path; emptied before")
    parser.add_argument("--port", type=int, default=6379, help="of the head")
    parser.add_argument("--dashboard-port", type=int, default=8265, help="of the dashboard")
    parser.add_argument("--policy-port", type=int, default=8000, help="of the served policy")
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    cluster = LocalCluster(folder / "cluster", arguments.port, arguments.dashboard_port)
    work = folder / "demo"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    os.environ |= token_environment() | {"MUJOCO_GL": os.environ.get("MUJOCO_GL", "egl")}
    demo = Demo(cluster, work, arguments.policy_port)
    try:
        run(demo)
    finally:
        table = "".join(f"| {what.strip()} | {result} |\n" for what, result in demo.rows)
        (work / "times.md").write_text(f"| what | measured |\n|---|---|\n{table}")
        print(f"{work / 'times.md'}\n| what | measured |\n|---|---|\n{table}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
