"""An elastic run on a cluster of three nodes, of which one is announced to go and goes, and another comes:
`python elastic_job.py FOLDER`."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
import tiny
from ray.cluster_utils import Cluster
from tiny import TinyRecipe

from defi_platform.config import PretrainConfig, RayConfig, TrackingConfig, TrainConfig
from defi_platform.train import checkpoints
from defi_platform.train.run import train

LONGEST_S = 240.0


LAST = 25
"""Step in which the run waits for the new node."""


class HeldRecipe(TinyRecipe):
    """Waits in steps 6 and LAST for a file of that name, so that the cluster changes in the middle of the run, and takes
    its time in between for as long as the node that is announced to go is there."""

    def after_update(self, engine, step):
        run = Path(self.config.train.output)
        deadline = time.monotonic() + LONGEST_S
        while step in (6, LAST) and not (run / f"gate_{step}").exists():
            if time.monotonic() > deadline:
                raise TimeoutError(f"gate_{step}")
            time.sleep(0.1)
        if 6 < step < LAST and not (run / "node_lost").exists():
            time.sleep(3.0)
        return super().after_update(engine, step)


def wait_for(what: str, condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LONGEST_S
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(what)
        time.sleep(0.2)


def announce(cluster: Cluster, node: Any) -> None:
    """What a cloud does before it takes a spot instance away."""
    command = [
        "ray", "drain-node", "--address", cluster.address, "--node-id", node.node_id, "--reason",
        "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot", "--deadline-remaining-seconds", "600",
    ]  # fmt: skip
    subprocess.run([str(Path(sys.executable).with_name(command[0])), *command[1:]], check=True)


def main() -> int:
    output = Path(sys.argv[1])
    # The agent's own fixed port may be another Ray's.
    head = {"num_cpus": 1, "include_dashboard": False, "dashboard_agent_listen_port": 0}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    lost = cluster.add_node(num_cpus=1)
    ray.init(address=cluster.address, log_to_driver=False)
    cluster.wait_for_nodes()
    config = PretrainConfig(
        train=TrainConfig(
            output=str(output), steps=28, global_batch=4, micro_batch=2, num_workers=2, min_workers=1,
            resize_check_s=1.0, log_every=1, checkpoint_every=1000, validate_every=1000, validation_batches=1,
            threads=1, zero_stage=2, ema_decay=0.9, learning_rate=1e-2,
        ),
        tracking=TrackingConfig(wandb=False),
    )  # fmt: skip
    run = threading.Thread(target=lambda: train(RayConfig(), [HeldRecipe(config, "elastic")]), daemon=True)
    run.start()

    def attempts() -> list[int]:
        there = (output / "metrics.jsonl").exists()
        return [row["workers"] for row in tiny.rows(output, "attempt")] if there else []

    def reached(step: int) -> bool:
        return bool(attempts()) and step in tiny.losses(output)

    wait_for("step 5 with two workers", lambda: reached(5))
    print("workers", attempts(), flush=True)
    announce(cluster, lost)
    (output / "gate_6").touch()
    wait_for("a checkpoint because of the notice", lambda: bool(checkpoints.committed(str(output))))
    cluster.remove_node(lost, allow_graceful=False)
    (output / "node_lost").touch()
    wait_for("one worker", lambda: attempts()[-1] == 1)
    wait_for("the step before the last wait, with one worker", lambda: reached(LAST - 1))
    print("workers", attempts(), flush=True)
    cluster.add_node(num_cpus=1)
    wait_for("two workers again", lambda: attempts()[-1] == 2)
    (output / f"gate_{LAST}").touch()
    run.join(LONGEST_S)
    print("workers", attempts(), flush=True)
    ray.shutdown()
    cluster.shutdown()
    return int(run.is_alive())


if __name__ == "__main__":
    sys.exit(main())
