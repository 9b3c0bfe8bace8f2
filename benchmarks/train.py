"""Training speed of our loop (Ray Train + DeepSpeed) beside a bare PyTorch loop and DDP, in the same session.

    python benchmarks/train.py [--steps 60] [--rounds 2] [--kinds gidm gfdm] [--workers 1 2]

Same nano model, same batch, same frames held in memory, one torch thread per worker. Ours and the bare loop are run
in turns; each row is the median step of all rounds. What is measured:

- samples/s with 1 and 2 workers, and the ratio to bare PyTorch or DDP (target: at least 0.95);
- the share of a step that waits for data, and that checkpoints cost when there is one every 50 steps (under 3 %);
- GFDM and GIDM trained at once, each on a core of its own, against the longer of them alone (at most 1.15 times).
"""

from __future__ import annotations

import argparse
import json
import os
import platform as host
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray
import torch
import torch.distributed as distributed
import torch.multiprocessing as multiprocessing

from defi_platform.config import PretrainConfig, RayConfig, TrackingConfig, TrainConfig
from defi_platform.train.draws import sample_generators
from defi_platform.train.metrics import read_metrics
from defi_platform.train.recipe import Recipe
from defi_platform.train.recipes.gfdm import GFDMRecipe
from defi_platform.train.recipes.gidm import GIDMRecipe
from defi_platform.train.run import train
from defi_platform.train.step_clock import PHASES

BATCH, HELD, WARM_UP, CHECKPOINT_EVERY = 8, 8, 5, 50
FRAMES = {"gfdm": 8, "gidm": 2}


def held_batches(kind: str) -> list[dict[str, Any]]:
    """A few batches of random frames; the arithmetic of training does not depend on what they show."""
    generator = torch.Generator().manual_seed(0)
    shape = (BATCH, FRAMES[kind], 64, 64, 3)
    return [
        {
            "frames": torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator),
            "text": [f"task {number % 4}" for number in range(BATCH)],
        }
        for _ in range(HELD)
    ]


class FromMemory:
    """Takes the place of a recipe's data."""

    kind: str

    def prepare(self) -> None:
        pass

    def plan(self, split: str) -> str:
        return split

    def fingerprint(self, plan: Any) -> str:
        return "memory"

    def skipped(self) -> dict[str, int]:
        return {}

    def conclude(self, *_: Any) -> Any:
        from defi_platform.train.recipe import Conclusion

        return Conclusion()

    def stream(
        self,
        plan: Any,
        *,
        start: int,
        stop: int,
        rank: int,
        world_size: int,
        global_batch: int,
        micro_batch: int,
    ) -> Iterator[dict[str, Any]]:
        held = held_batches(self.kind)
        for step in range(start // global_batch, stop // global_batch):
            first = step * global_batch + rank * micro_batch
            yield held[step % HELD] | {"sample": torch.arange(first, first + micro_batch)}


class MemoryGFDM(FromMemory, GFDMRecipe):
    pass


class MemoryGIDM(FromMemory, GIDMRecipe):
    pass


def recipe_of(kind: str, output: Path, steps: int, workers: int) -> Recipe:
    config = PretrainConfig(
        train=TrainConfig(
            output=str(output), steps=steps, global_batch=BATCH * workers, micro_batch=BATCH, num_workers=workers,
            resources_per_worker={"CPU": 1.0}, learning_rate=1e-4, log_every=1, validate_every=10**6,
            validation_batches=1, checkpoint_every=CHECKPOINT_EVERY, threads=1, restart_dead_codes_every=0,
        ),
        tracking=TrackingConfig(wandb=False),
    )  # fmt: skip
    config.data.manifest = str(output / "manifest")
    return {"gfdm": MemoryGFDM, "gidm": MemoryGIDM}[kind](config)


def ours(folder: Path, kinds: list[str], steps: int, workers: int) -> dict[str, dict[str, Any]]:
    """Median step seconds and phase shares of each kind; several kinds train at once."""
    outputs = {kind: folder / f"{kind}-{time.monotonic_ns()}" for kind in kinds}
    train(RayConfig(), [recipe_of(kind, outputs[kind], steps, workers) for kind in kinds])
    found = {}
    for kind, output in outputs.items():
        rows = [row for row in read_metrics(str(output / "metrics.jsonl")) if row["split"] == "train"]
        rows = [row for row in rows if row["step"] > WARM_UP]
        # A row's own checkpoint comes after it, so it is counted in the next.
        whole = [sum(row[f"{phase}_s"] for phase in PHASES) for row in rows]
        found[kind] = {
            "step_s": statistics.median(whole),
            "total_s": sum(whole),
            "data": sum(row["data_s"] for row in rows) / sum(whole),
            "checkpoint": sum(row["checkpoint_s"] for row in rows) / sum(whole),
        }
    return found


def bare_worker(rank: int, kind: str, steps: int, workers: int, store: str, target: str) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as scratch:
        model: Any = recipe_of(kind, Path(scratch), steps, workers).build()
    model.train()
    if workers > 1:
        distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=workers)
        unused = {"find_unused_parameters": False}
        model = torch.nn.parallel.DistributedDataParallel(model, **unused)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=1e-2)
    held, seconds = held_batches(kind), []
    for step in range(steps):
        began = time.perf_counter()
        first = step * BATCH * workers + rank * BATCH
        loss = model(held[step % HELD], generator=sample_generators(0, "noise", range(first, first + BATCH)))[
            "loss"
        ]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()
        seconds.append(time.perf_counter() - began)
    if rank == 0:
        Path(target).write_text(json.dumps(statistics.median(seconds[WARM_UP:])))


def bare(folder: Path, kind: str, steps: int, workers: int) -> float:
    """Median step seconds of a plain loop in processes of its own."""
    target = folder / f"bare-{time.monotonic_ns()}.json"
    subprocess.run(
        [sys.executable, __file__, "--bare", kind, str(steps), str(workers), str(target)], check=True
    )
    return float(json.loads(target.read_text()))


def run_bare(kind: str, steps: int, workers: int, target: str) -> None:
    if workers == 1:
        bare_worker(0, kind, steps, 1, "", target)
        return
    arguments = (kind, steps, workers, f"{target}.store", target)
    multiprocessing.start_processes(bare_worker, arguments, nprocs=workers, start_method="spawn")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--kinds", nargs="+", default=["gidm", "gfdm"], choices=["gidm", "gfdm"])
    parser.add_argument("--workers", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--skip-parallel", action="store_true")
    parser.add_argument("--bare", nargs=4, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.bare:
        kind, steps, workers, target = given.bare
        run_bare(kind, int(steps), int(workers), target)
        return
    print(
        f"{host.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, ray {ray.__version__}; "
        f"nano models, batch {BATCH} per worker, one thread each, median of {given.rounds} x {given.steps} steps\n"
    )
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    with tempfile.TemporaryDirectory(prefix="defi-bench-train-") as scratch:
        folder = Path(scratch)
        print(
            f"{'':8}{'workers':>8}{'ours/s':>10}{'bare/s':>10}{'ratio':>8}{'data wait':>11}{'checkpoints':>13}"
        )
        for kind in given.kinds:
            for workers in given.workers:
                compare(folder, kind, given.steps, given.rounds, workers)
        if not given.skip_parallel:
            side_by_side(folder, given.steps)
    ray.shutdown()


def compare(folder: Path, kind: str, steps: int, rounds: int, workers: int) -> None:
    mine, plain = [], []
    for _ in range(rounds):
        mine.append(ours(folder, [kind], steps, workers)[kind])
        plain.append(bare(folder, kind, steps, workers))
    step, other = statistics.median(one["step_s"] for one in mine), statistics.median(plain)
    samples = BATCH * workers
    data, saved = (statistics.median(one[key] for one in mine) for key in ("data", "checkpoint"))
    print(
        f"{kind:8}{workers:>8}{samples / step:>10.1f}{samples / other:>10.1f}{other / step:>8.3f}{data:>11.2%}"
        f"{saved:>13.2%}",
        flush=True,
    )


def side_by_side(folder: Path, steps: int) -> None:
    alone = {kind: ours(folder, [kind], steps, 1)[kind]["total_s"] for kind in ("gfdm", "gidm")}
    together = ours(folder, ["gfdm", "gidm"], steps, 1)
    longer = max(alone, key=lambda kind: alone[kind])
    print(
        f"\nboth at once, one worker each: {longer} takes {together[longer]['total_s']:.1f} s, alone "
        f"{alone[longer]:.1f} s: {together[longer]['total_s'] / alone[longer]:.2f} times"
    )


if __name__ == "__main__":
    main()
