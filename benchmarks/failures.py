"""Cost of each failure to a run: one elastic run on a cluster of several raylets, hit by one after the other.

    python benchmarks/failures.py [--away 60] [--quick]

The run folder lies on S3 (moto behind a proxy that can refuse), W&B has a server that does not answer. The model is
tiny and its steps are paced, so that what is seen is what the platform does. Reported for each failure: the steps that
were done again, those done meanwhile, the longest time without a step, and the workers after it. The run has to end
with every sample learned from exactly once and nobody having done anything about it; otherwise this fails.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests" / "train"))
sys.path.append(str(Path(__file__).resolve().parents[1] / "tests" / "data"))

import tiny
from s3_server import EVERYTHING, FlakyProxy, s3_server

from defi_platform import storage
from defi_platform.config import PretrainConfig, RayConfig, TrackingConfig, TrainConfig
from defi_platform.train.checkpoint import format as checkpoints
from defi_platform.train.driver.run import train
from defi_platform.train.observability.metrics_log import read_metrics
from defi_platform.train.worker.run_results import METRICS, SUMMARY

RUN = "s3://runs/hit"
CHECKPOINT_EVERY, BATCH = 10, 4
LONG, QUICK = (1000, 0.2), (500, 0.4)
"""Steps, and the seconds that one takes at least until the last failure is over."""
TIMEOUT_S = 180.0
"""For what has to happen after a failure."""
ASK_STORE_S = 0.3
"""Between two looks at the store, whose server works for each."""
DISK_BYTES = 1 << 20


class PacedRecipe(tiny.TinyRecipe):
    """Writes each step to a file, and takes its time for it until the last failure is over.

    Args:
        marks: folder of those files.
        disk: what the workers take for their local disk.
        pace_s: seconds of a step.
    """

    def __init__(self, config: PretrainConfig, marks: Path, disk: Path, pace_s: float):
        super().__init__(config, "hit")
        self.marks, self.disk, self.pace_s = marks, disk, pace_s
        self.attempt_written = False

    def build(self) -> Any:
        from defi_platform.train.observability import wandb_tracker as tracking

        tempfile.tempdir = str(self.disk)
        tracking.INIT_TIMEOUT_S = 2.0
        return super().build()

    def after_update(self, engine: Any, step: int) -> dict[str, float]:
        import torch.distributed as distributed

        rank, workers = distributed.get_rank(), distributed.get_world_size()
        if not self.attempt_written:
            self.attempt_written = True
            (self.marks / f"pid_{rank}").write_text(str(os.getpid()))
            if rank == 0:
                with (self.marks / "attempts").open("a") as file:
                    file.write(json.dumps({"from": step - 1, "workers": workers}) + "\n")
        if rank == 0:
            (self.marks / "new").write_text(str(step))
            (self.marks / "new").replace(self.marks / "step")
        while not (self.marks / "over").exists():
            time.sleep(self.pace_s)
            if step < self.config.train.steps - 1:
                break
        return super().after_update(engine, step)


@dataclass(frozen=True)
class Cost:
    """Cost of one failure."""

    failure: str
    again: int
    """Steps that were done a second time."""
    meanwhile: int
    """Steps by which the run was past the one it had reached when the failure was over: 2 where it had to wait."""
    pause_s: float
    """Longest time without a step."""
    workers: int
    """Afterwards."""


class Watch:
    """Steps and attempts that the run has written so far."""

    def __init__(self, marks: Path, run: threading.Thread):
        self._marks, self._run = marks, run

    def step(self) -> int:
        with contextlib.suppress(FileNotFoundError):
            return int((self._marks / "step").read_text())
        return 0

    def attempts(self) -> list[dict[str, int]]:
        with contextlib.suppress(FileNotFoundError):
            return [json.loads(line) for line in (self._marks / "attempts").read_text().splitlines()]
        return []

    def pid(self, rank: int) -> int:
        return int((self._marks / f"pid_{rank}").read_text())

    def until(self, what: str, condition: Callable[[], bool], every_s: float = 0.05) -> None:
        """Waits. Raises: TimeoutError when that takes too long, or the run has ended."""
        deadline = time.monotonic() + TIMEOUT_S
        while not condition():
            if time.monotonic() > deadline or not self._run.is_alive():
                raise TimeoutError(f"waited for {what} at step {self.step()}, attempts {self.attempts()}")
            time.sleep(every_s)

    def cost(self, failure: str, inflict: Callable[[], Any], over: Callable[[], bool]) -> Cost:
        """Inflicts a failure and waits until it is over and the run is past the step that it had reached.

        Args:
            failure: its name.
            inflict: causes it.
            over: true when it is over.
        """
        reached, before = self.step(), len(self.attempts())
        with self.longest_pause() as pause:
            inflict()
            self.until(failure, lambda: over() and self.step() > reached + 1)
        new = self.attempts()[before:]
        again = sum(max(0, reached - attempt["from"]) for attempt in new[:1])
        cost = Cost(failure, again, self.step() - reached, pause[0], self.attempts()[-1]["workers"])
        print(f"step {self.step()}: {cost}", file=sys.stderr, flush=True)
        return cost

    @contextlib.contextmanager
    def longest_pause(self) -> Iterator[list[float]]:
        """Yields a list whose only value is the longest time without a step inside, in seconds, once it has ended."""
        pause, ended = [0.0], threading.Event()

        def poll() -> None:
            last, since = self.step(), time.monotonic()
            while not ended.wait(0.05):
                if self.step() != last:
                    last, since = self.step(), time.monotonic()
                pause[0] = max(pause[0], time.monotonic() - since)

        poller = threading.Thread(target=poll, daemon=True)
        poller.start()
        try:
            yield pause
        finally:
            ended.set()
            poller.join()


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[bool]:
    """Mounts a file system of DISK_BYTES. Yields: False where only root could, and `folder` is an ordinary one."""
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(folder)]
    mounted = subprocess.run(command, capture_output=True).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(folder)], check=True)


def damage(checkpoint: checkpoints.Checkpoint) -> None:
    """Other bytes of the same length."""
    shard = storage.join(checkpoint.uri, checkpoint.markers[0]["file"])
    storage.write_bytes(shard, bytes(checkpoint.markers[0]["bytes"]))


def announce(cluster: Any, node: Any) -> None:
    """Announces a preemption, as a cloud does before it takes a spot instance away."""
    command = [
        "ray", "drain-node", "--address", cluster.address, "--node-id", node.node_id, "--reason",
        "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot", "--deadline-remaining-seconds", "600",
    ]  # fmt: skip
    subprocess.run(
        [str(Path(sys.executable).with_name(command[0])), *command[1:]], check=True, stdout=subprocess.DEVNULL
    )


def inflict_all(
    cluster: Any,
    nodes: list[Any],
    watch: Watch,
    proxy: FlakyProxy,
    disk: Path | None,
    away_s: float,
    quick: bool,
) -> list[Cost]:
    """One failure after the other; each begins when the run has got over the one before.

    Args:
        nodes: all but the head.
        disk: the small one, where there is one.
        quick: leave out what a harder failure of the list shows too.
    """

    def newest() -> int:
        found = checkpoints.committed(RUN)
        return found[0].step if found else 0

    def attempted(workers: int | None = None) -> Callable[[], bool]:
        """Whether there was another attempt since, and the newest one has so many workers."""
        before = len(watch.attempts())
        return lambda: len(watch.attempts()) > before and workers in (None, watch.attempts()[-1]["workers"])

    def kill() -> None:
        os.kill(watch.pid(1), signal.SIGKILL)

    def refuse() -> None:
        proxy.refuse = EVERYTHING
        threading.Timer(away_s, lambda: setattr(proxy, "refuse", b"")).start()

    def fill_disk() -> None:
        assert disk
        filler = disk / "filler"
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        target = watch.step() + 2 * CHECKPOINT_EVERY
        watch.until("steps without room for checkpoints", lambda: watch.step() > target)
        filler.unlink()

    def kill_and_damage() -> None:
        kill()
        time.sleep(0.5)
        found = checkpoints.committed(RUN)[0]
        damage(found)
        damaged.append(found.step)

    def spot_node_goes() -> None:
        announce(cluster, nodes[-1])
        reached = watch.step()
        watch.until("a checkpoint because of the notice", lambda: newest() > reached, ASK_STORE_S)
        cluster.remove_node(nodes.pop(), allow_graceful=False)

    def node_goes() -> None:
        cluster.remove_node(nodes.pop(), allow_graceful=False)

    def node_comes() -> None:
        nodes.append(cluster.add_node(num_cpus=1))

    costs: list[Cost] = []
    damaged: list[int] = []

    def hit(failure: str, inflict: Callable[[], Any], over: Callable[[], bool]) -> None:
        costs.append(watch.cost(failure, inflict, over))
        since = watch.step()
        watch.until("a checkpoint before the next failure", lambda: newest() > since, ASK_STORE_S)

    if disk:
        hit("local disk full for two checkpoints", fill_disk, lambda: True)
    hit(f"store away for {away_s:.0f} s", refuse, lambda: proxy.refuse == b"")
    if not quick:
        hit("a worker gets SIGKILL", kill, attempted())
        hit("a worker gets SIGKILL, the newest checkpoint is damaged", kill_and_damage, attempted())
        assert watch.attempts()[-1]["from"] < damaged[0], "it went on from a damaged checkpoint"
    hit("a spot node is announced to go, and goes", spot_node_goes, attempted(1))
    hit("a node comes", node_comes, attempted(2))
    if not quick:
        hit("a node goes without a word", node_goes, attempted(1))
        hit("it comes back", node_comes, attempted(2))
    return costs


def config(quick: bool) -> PretrainConfig:
    steps, _ = QUICK if quick else LONG
    return PretrainConfig(
        train=TrainConfig(
            output=RUN, steps=steps, global_batch=BATCH, micro_batch=2, num_workers=2, min_workers=1, max_failures=-1,
            resize_check_s=1.0, log_every=1, checkpoint_every=CHECKPOINT_EVERY, keep_checkpoints=3, validate_every=steps,
            validation_samples=2, threads=1, zero_stage=2, ema_decay=0.9, export_weights="average", learning_rate=1e-2,
        ),
        tracking=TrackingConfig(wandb=not quick),
    )  # fmt: skip


def run_and_hit(folder: Path, endpoint: str, away_s: float, quick: bool) -> list[Cost]:
    """The whole of it. Raises: AssertionError when the run did not end as it should, TimeoutError when it hangs."""
    steps, pace_s = QUICK if quick else LONG
    proxy = FlakyProxy(int(endpoint.rsplit(":", 1)[1]))
    # Before Ray starts, so that its processes inherit it.
    os.environ |= {
        "AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "y", "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": proxy.endpoint, "WANDB_MODE": "online", "WANDB_API_KEY": "0" * 40,
        "WANDB_BASE_URL": "http://127.0.0.1:9", "RAY_USAGE_STATS_ENABLED": "0",
        "PYTHONPATH": str(Path(tiny.__file__).parent),
    }  # fmt: skip
    import fsspec
    import ray
    from ray.cluster_utils import Cluster

    fsspec.filesystem("s3", endpoint_url=endpoint).mkdir("runs")
    disk, marks = folder / "disk", folder / "marks"
    disk.mkdir(), marks.mkdir()
    # The agent's own fixed port may be another Ray's.
    head = {"num_cpus": 1, "include_dashboard": False, "dashboard_agent_listen_port": 0}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    nodes = [cluster.add_node(num_cpus=1)]
    ray.init(address=cluster.address, log_to_driver=False)
    cluster.wait_for_nodes()
    ended: list[Any] = []
    run = threading.Thread(
        target=lambda: ended.extend(train(RayConfig(), [PacedRecipe(config(quick), marks, disk, pace_s)])),
        daemon=True,
    )
    try:
        with small_disk(disk) as mounted:
            run.start()
            watch = Watch(marks, run)
            watch.until("the first checkpoint", lambda: bool(checkpoints.committed(RUN)), ASK_STORE_S)
            costs = inflict_all(cluster, nodes, watch, proxy, disk if mounted else None, away_s, quick)
            (marks / "over").touch()
            run.join(TIMEOUT_S)
        assert ended, "the run did not end"
        check_result(steps, len(watch.attempts()), tracked=not quick)
    finally:
        ray.shutdown()
        cluster.shutdown()
        proxy.close()
    if not mounted:
        print("left out: a full disk, because only root can mount a small one")
    return costs


def check_result(steps: int, attempts: int, tracked: bool) -> None:
    """Raises: AssertionError unless the run is as whole as one to which nothing has happened."""
    import torch

    summary = json.loads(storage.read_text(storage.join(RUN, SUMMARY)))
    assert summary["steps"] == steps
    logged = [row["samples"] for row in read_metrics(storage.join(RUN, METRICS)) if row["split"] == "train"]
    odd = Counter(logged)
    odd.subtract(BATCH * step for step in range(1, steps + 1))
    wrong = {samples // BATCH: count for samples, count in odd.items() if count}
    assert not wrong, f"steps that are missing (-1) or there twice (1) in {METRICS}: {wrong}"
    with storage.local_copy(storage.join(RUN, "model", "model.pt")) as model:
        seen = int(torch.load(model, weights_only=True)["seen"])
    assert seen == BATCH * steps, f"{seen} samples were learned from, not {BATCH * steps}"
    kept = [name for name in storage.names(storage.join(RUN, "wandb")) if name.startswith("offline-run-")]
    assert bool(kept) == tracked, "W&B's data is not where it should be"
    print(
        f"{steps} steps in {attempts} attempts: every sample learned from exactly once; "
        f"{summary['checkpoints_left_out']} checkpoints left out" + ("; W&B kept offline" if tracked else "")
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--away", type=float, default=60.0, help="seconds without the store")
    parser.add_argument("--quick", action="store_true", help="fewer restarts, and without W&B")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, s3_server() as endpoint:
        costs = run_and_hit(Path(folder), endpoint, arguments.away, arguments.quick)
    print(
        "\n| failure | steps done again | steps meanwhile | longest time without a step | workers after it |"
    )
    print("|---|---|---|---|---|")
    for cost in costs:
        print(f"| {cost.failure} | {cost.again} | {cost.meanwhile} | {cost.pause_s:.1f} s | {cost.workers} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
