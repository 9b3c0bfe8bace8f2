"""The platform on an autoscaling cluster that loses machines, on this one: `make demo-cluster`.

    python cluster/demo.py [--folder FOLDER] [--port 6379] [--dashboard-port 8265] [--stages ingest,pretrain,serve]

Everything runs as supervised jobs (jobs/supervise.py) on the cluster of local.py. Decode nodes come and go with an
ingest; both pretrainings run in parallel; one decode node, one train node and the head are killed while they work; then
the policy is served to simulators while its replicas come and go. What has to hold is checked, and the times are written
to times.md in the folder.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType

import psutil

sys.path.append(str(Path(__file__).resolve().parent))
from demo_corpus import rows_of_manifest, write_corpus
from demo_watch import (
    Progress,
    Timeline,
    checkpoint_step,
    count_nodes,
    count_replicas,
    episodes_of,
    opened_blocks,
    train_rows,
    trained_step,
)
from local import LocalCluster, LocalClusterError, default_folder, token_environment

REPOSITORY = Path(__file__).resolve().parents[1]
VIDEOS = 200
STEPS = {"gfdm": 160, "gidm": 600}
BATCH = 4
CHECKPOINT_EVERY = 10
TASKS = ("button-press-v3", "door-close-v3")
EVALUATIONS = {"fleet": (3, 8, 60), "lone": (1, 3, 500)}
"""Simulators, episodes per task, and steps per episode. The lone one still runs when the fleet's replica goes."""
TIMEOUT_S = 1200.0
"""For each thing that is waited for. Long: other work on the machine is no failure."""
INTERRUPTED = 130
"""Exit code of a supervisor whose job was stopped."""


class Demo:
    """The demo's state: its cluster, its folder, and the rows of its table.

    Args:
        cluster: may be up already.
        folder: receives everything.
        policy_port: of the served policy.
    """

    def __init__(self, cluster: LocalCluster, folder: Path, policy_port: int):
        self.cluster, self.folder, self.policy_port = cluster, folder, policy_port
        self.rows: list[tuple[str, str]] = []
        self.nodes: Timeline
        self.jobs: dict[str, subprocess.Popen[bytes]] = {}

    def note(self, what: str, result: str) -> None:
        """Adds a row to the table."""
        self.rows.append((what, result))
        print(f"{what}: {result}", flush=True)

    def start(self, name: str, job: str, *overrides: str) -> None:
        """Starts a supervised job. Its log is NAME.log."""
        command = [
            sys.executable, str(REPOSITORY / "jobs" / "supervise.py"), "--address", self.cluster.url,
            "--working-dir", str(REPOSITORY), job, *overrides,
        ]  # fmt: skip
        with (self.folder / f"{name}.log").open("w") as log:
            self.jobs[name] = subprocess.Popen(command, stdout=log, stderr=log)

    def until(self, what: str, condition: Callable[[], bool]) -> None:
        """Waits. Raises: AssertionError when a job fails meanwhile; TimeoutError naming `what`."""
        deadline = time.monotonic() + TIMEOUT_S
        while not condition():
            for name, job in self.jobs.items():
                if job.poll():
                    log = self.folder / f"{name}.log"
                    raise AssertionError(
                        f"{name} ended with {job.returncode}; the end of {log}:\n{log.read_text()[-3000:]}"
                    )
            if time.monotonic() > deadline:
                raise TimeoutError(f"waited {TIMEOUT_S:.0f} s for {what}; the logs are in {self.folder}")
            time.sleep(0.1)

    def finish(self, *names: str) -> None:
        """Waits for the end of supervised jobs. Raises: as `until`."""
        self.until(f"the end of {', '.join(names)}", lambda: all(self.jobs[n].poll() == 0 for n in names))

    def gone(self, node_type: str, since: float) -> float:
        """Waits until no node of a type is left. Returns: seconds from `since` to then."""
        deadline = time.monotonic() + 300
        while self.nodes.now()[node_type]:
            assert time.monotonic() < deadline, f"{node_type} nodes were not released: {self.nodes.now()}"
            time.sleep(0.5)
        return (self.nodes.last_above(node_type, 0, 0.0) or since) - since

    def idle(self, node_type: str, since: float) -> str:
        """Node-seconds without work of a type, of all that there were from `since` to now."""
        idle, there = (
            self.nodes.total_s(n, since, time.monotonic()) for n in (f"idle {node_type}", node_type)
        )
        return f"{idle:.0f} of {there:.0f} node-seconds"


def ingest(demo: Demo) -> None:
    """Ingests the corpus twice: once undisturbed, and once with a decode node that is killed."""
    write_corpus(demo.folder / "videos", VIDEOS)
    tables = {}
    for name in ("undisturbed", "killed"):
        manifest = demo.folder / f"manifest_{name}"
        opened = functools.partial(opened_blocks, manifest, "videos")
        began = time.monotonic()
        demo.start(
            f"ingest_{name}", "ingest_videos", f"data.corpora.videos.path={demo.folder / 'videos'}",
            "data.corpora.videos.filters.scores=true", f"data.manifest={manifest}",
        )  # fmt: skip
        if name == "killed":
            demo.until("two decode nodes", lambda: demo.nodes.now()["decode"] == 2)
            demo.until("opened files", lambda opened=opened: opened() >= 4)  # type: ignore[misc]
            with Progress(opened).longest_pause() as pause:
                kill(next(iter(demo.cluster.node_processes("decode").values())))
                demo.finish(f"ingest_{name}")
            demo.note(
                "ingest, a decode node gets SIGKILL: longest time without opened files", f"{pause[0]:.1f} s"
            )
        else:
            demo.finish(f"ingest_{name}")
        ended = time.monotonic()
        tables[name] = rows_of_manifest(manifest)
        demo.note(f"ingest of {VIDEOS} videos, {name}: from the command to its end", f"{ended - began:.0f} s")
        if name == "undisturbed":
            for count in (1, 2):
                first = demo.nodes.first("decode", count, began)
                assert first, f"there were never {count} decode nodes"
                demo.note(f"  decode node {count} joins after", f"{first - began:.0f} s")
            demo.note("  decode nodes are gone after its end within", f"{demo.gone('decode', ended):.0f} s")
            demo.note("  decode nodes were idle", demo.idle("decode", began))
    assert tables["killed"] == tables["undisturbed"], "the manifests differ"
    assert len(tables["killed"]) == VIDEOS
    demo.note("  both manifests", f"equal, {VIDEOS} rows")


def pretrain(demo: Demo) -> None:
    """Pretrains GFDM and GIDM in parallel; kills a train node and the head while they work."""
    runs = {kind: demo.folder / kind for kind in STEPS}
    began = time.monotonic()
    for kind in STEPS:
        demo.start(kind, f"pretrain_{kind}", *training(demo, kind))

    def checkpoints_of_all(steps: int) -> Callable[[], bool]:
        targets = {run: min(trained_step(run) + steps, STEPS[kind]) for kind, run in runs.items()}
        return lambda: all(checkpoint_step(run) >= target for run, target in targets.items())

    demo.until("first checkpoints", checkpoints_of_all(CHECKPOINT_EVERY))
    seen = demo.nodes.now()
    assert seen["train"] == 2, f"both should run in parallel on two train nodes: {seen}"
    demo.note("pretrainings: both have a checkpoint after", f"{time.monotonic() - began:.0f} s")

    def cost(what: str, inflict: Callable[[], None]) -> None:
        """The longest time without a new step of the run that lost most, until all are beyond where they were."""
        watched = {
            kind: Progress(functools.partial(trained_step, run), STEPS[kind]) for kind, run in runs.items()
        }
        done = [kind for kind, one in watched.items() if one.measure() >= STEPS[kind]]
        assert not done, f"{done} was over before {what}: it has too few steps"
        with contextlib.ExitStack() as stack:
            pauses = {kind: stack.enter_context(one.longest_pause()) for kind, one in watched.items()}
            inflict()
            # Of steps until now some may be from workers that did not notice at once.
            targets = {kind: min(one.measure() + 1, STEPS[kind]) for kind, one in watched.items()}
            demo.until(
                f"new steps after {what}",
                lambda: all(one.measure() >= targets[kind] for kind, one in watched.items()),
            )
        longest = ", ".join(f"{kind} {pause[0]:.0f} s" for kind, pause in pauses.items())
        demo.note(f"pretrainings, {what}: longest time without a new step", longest)

    # The head first: both lose as much by it. A run that loses its node is overtaken by the other, which may end meanwhile.
    cost("the head gets SIGKILL and is started again", lambda: lose_head(demo))
    demo.until("checkpoints before the next failure", checkpoints_of_all(1))
    cost("a train node gets SIGKILL", lambda: kill(next(iter(demo.cluster.node_processes("train").values()))))
    demo.finish(*STEPS)
    ended = time.monotonic()
    for kind, run in runs.items():
        check_run(run, kind)
    demo.note("pretrainings: from the commands to the end of both", f"{ended - began:.0f} s")
    demo.note("  train nodes are gone within", f"{demo.gone('train', ended):.0f} s")
    demo.note("  train nodes were idle", demo.idle("train", began))
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
        "train.validation_samples": 4,
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


def kill(process: psutil.Process) -> None:
    """Ends a raylet and all that runs on it as the loss of its machine would: nothing has time for anything."""
    for one in (process, *process.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()


def lose_head(demo: Demo) -> None:
    """Kills every process of the head, then starts the cluster again, as whoever runs it would."""
    for process in demo.cluster.head_processes().values():
        kill(process)
    time.sleep(5)
    began = time.monotonic()
    assert demo.cluster.up(), "the head was not dead"
    demo.note("the head is up again after", f"{time.monotonic() - began:.0f} s")


def serve(demo: Demo) -> None:
    """Serves a policy to simulators; the second replica comes and goes while an episode runs."""
    import torch
    from ray.job_submission import JobStatus, JobSubmissionClient

    from defi_models import presets
    from defi_models.policy import DeFIPolicy

    torch.manual_seed(0)
    policy = DeFIPolicy(presets.policy("nano", cameras=["workspace"])).save_pretrained(demo.folder / "policy")
    began = time.monotonic()
    demo.start(
        "serve", "serve_policy", f"policy={policy}", f"port={demo.policy_port}", "replicas.min=1", "replicas.max=2",
        "threads=1", "max_batch_size=8", "scaling.target_in_flight=1.5", "scaling.downscale_delay_s=10",
    )  # fmt: skip
    replicas = Timeline(lambda: count_replicas(demo.cluster.url))
    demo.until("the first replica", lambda: replicas.now()["RUNNING"] == 1)
    demo.note("served policy: first replica after", f"{time.monotonic() - began:.0f} s")
    began = time.monotonic()
    for name, (workers, episodes, steps) in EVALUATIONS.items():
        demo.start(
            name, "evaluate_policy", f"url=ws://127.0.0.1:{demo.policy_port}", f"tasks=[{','.join(TASKS)}]",
            "arms=[policy]", f"episodes_per_task={episodes}", f"max_steps={steps}",
            f"workers={workers}", "execute_steps=1", "video_every=0", f"output={demo.folder / name}",
        )  # fmt: skip
    demo.finish(*EVALUATIONS)
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
    for name, (_, episodes, _) in EVALUATIONS.items():
        units = Counter((row["task"], row["seed"]) for row, _ in episodes_of(demo.folder / name))
        assert len(units) == units.total() == episodes * len(TASKS), f"{name}: episodes were lost: {units}"
    total = sum(episodes * len(TASKS) for _, episodes, _ in EVALUATIONS.values())
    demo.note(f"  {total} episodes in {ended - began:.0f} s", "none lost")
    replicas.close()
    began = time.monotonic()
    client = JobSubmissionClient(demo.cluster.url)
    for job in client.list_jobs():
        if job.status == JobStatus.RUNNING and job.submission_id:
            client.stop_job(job.submission_id)
    code = demo.jobs.pop("serve").wait(TIMEOUT_S)
    assert code == INTERRUPTED, f"the supervisor of a stopped job ended with {code}"
    demo.note(
        "  `ray job stop` has ended the served policy and its supervisor after",
        f"{time.monotonic() - began:.0f} s",
    )


STAGES = {"ingest": ingest, "pretrain": pretrain, "serve": serve}
"""In their order; `pretrain` reads what `ingest` has left in the folder, `serve` needs neither."""
OUTPUTS = {
    "ingest": ("videos", "manifest_undisturbed", "manifest_killed"),
    "pretrain": tuple(STEPS),
    "serve": ("policy", *EVALUATIONS),
}
"""What a stage leaves in the folder."""


def run(demo: Demo, stages: Sequence[str]) -> None:
    """Runs stages, and ends what they started in any case."""
    began = time.monotonic()
    demo.cluster.down()
    assert demo.cluster.up()
    demo.nodes = Timeline(lambda: count_nodes(demo.cluster))
    try:
        while not demo.nodes.points:
            time.sleep(0.5)
        assert sum(demo.nodes.now()[name] for name in ("decode", "train")) == 0, demo.nodes.now()
        demo.note("the head alone is up after", f"{time.monotonic() - began:.0f} s")
        for stage in stages:
            STAGES[stage](demo)
    finally:
        for job in demo.jobs.values():
            job.kill()
        demo.nodes.close()
        demo.cluster.down()
    demo.note("all of it", f"{(time.monotonic() - began) / 60:.1f} min")


def interrupt(number: int, frame: FrameType | None) -> None:
    """Ends the demo. Raises: KeyboardInterrupt."""
    raise KeyboardInterrupt


def main() -> int:
    """Runs the demo. Returns: the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--folder",
        type=Path,
        default=default_folder(),
        help="a short path; what the stages leave in it is removed before",
    )
    parser.add_argument("--port", type=int, default=6379, help="of the head")
    parser.add_argument("--dashboard-port", type=int, default=8265, help="of the dashboard")
    parser.add_argument("--policy-port", type=int, default=8000, help="of the served policy")
    parser.add_argument(
        "--stages", default=",".join(STAGES), help="without `ingest` its manifest of an earlier demo is used"
    )
    arguments = parser.parse_args()
    stages = [stage for stage in STAGES if stage in arguments.stages.split(",")]
    if not stages or len(stages) < len(arguments.stages.split(",")):
        parser.error(f"--stages {arguments.stages}: choose from {', '.join(STAGES)}")
    folder = arguments.folder.resolve()
    cluster = LocalCluster(folder / "cluster", arguments.port, arguments.dashboard_port)
    work = folder / "demo"
    for output in [name for stage in stages for name in OUTPUTS[stage]]:
        shutil.rmtree(work / output, ignore_errors=True)
    if "pretrain" in stages and "ingest" not in stages and not (work / "manifest_killed").exists():
        parser.error(f"--stages {arguments.stages}: {work} has no manifest; run the stage `ingest` too")
    work.mkdir(parents=True, exist_ok=True)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)  # its cluster is to end with it, also as a shell's background job
    demo = Demo(cluster, work, arguments.policy_port)
    try:
        os.environ |= token_environment() | {"MUJOCO_GL": os.environ.get("MUJOCO_GL", "egl")}
        run(demo, stages)
    except LocalClusterError as error:
        print(error, file=sys.stderr)
        return 1
    finally:
        table = "".join(f"| {what.strip()} | {result} |\n" for what, result in demo.rows)
        (work / "times.md").write_text(f"| what | measured |\n|---|---|\n{table}")
        print(f"{work / 'times.md'}\n| what | measured |\n|---|---|\n{table}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
