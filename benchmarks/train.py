"""Training speed of our loop (Ray Train + DeepSpeed) against a bare PyTorch loop and DDP, step by step in turns.

    python benchmarks/train.py [--turns 12] [--kinds gidm gfdm] [--workers 1 2] [--zero 0 1]

Same nano model, same batch, same frames held in memory, one torch thread per worker. Both sides run at the same time
and take turns of TURN steps: while one computes the other waits, so that a machine that is slow for a while slows
both. A turn counts by the mean of its steps, the ratio is the median over the turns' ratios. What is measured:

- samples/s with 1 and 2 workers, and the ratio to bare PyTorch or DDP (target: at least 0.95);
- the share of a step that waits for data, and that checkpoints cost when there is one every 50 steps (under 3 %);
- the same share for data that is really read, from the latent cache (under 2 %);
- GFDM and GIDM trained at once, each on its own core, against the longer of them alone (at most 1.15 times).
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform as host
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import torch
import torch.distributed as distributed
import torch.multiprocessing as multiprocessing
from videos import write_corpus

from defi_platform.config import (
    CorpusConfig,
    DataConfig,
    EncodeConfig,
    PretrainConfig,
    RayConfig,
    TrackingConfig,
    TrainConfig,
)
from defi_platform.data.sampling.sharding import Shard
from defi_platform.encode_latents import encode_latents
from defi_platform.train.driver.run import train
from defi_platform.train.engine.seeds import sample_generators
from defi_platform.train.observability.metrics_log import read_metrics
from defi_platform.train.observability.phase_timer import PHASES
from defi_platform.train.recipe import EvalReport, Recipe
from defi_platform.train.recipes.gfdm import GFDMRecipe
from defi_platform.train.recipes.gidm import GIDMRecipe

BATCH = {"gfdm": 8, "gidm": 32}
"""Samples per worker; at nano, steps of about half a second."""
HELD, TURN, CHECKPOINT_EVERY = 8, 5, 50
FRAMES = {"gfdm": 8, "gidm": 2}
OURS, BARE = 0, 1
"""Whose turn is the first and whose the second."""
POLL_S = 0.02
"""Waiting must cost the other side nothing; a thousandth of a second took 6 % of a core per waiting process."""


@dataclass(frozen=True)
class Turns:
    """A counter in a file: even while one side computes, odd while the other does.

    Raises: TimeoutError when the other side does not come.
    """

    path: str
    side: int

    def take(self, turn: int) -> None:
        """Waits until it is this side's turn of that number."""
        deadline = time.monotonic() + 600
        while int(Path(self.path).read_text() or -1) != 2 * turn + self.side:
            if time.monotonic() > deadline:
                raise TimeoutError(f"turn {turn}")
            time.sleep(POLL_S)

    def pass_on(self, turn: int) -> None:
        """Ends this side's turn."""
        Path(self.path).write_text(str(2 * turn + self.side + 1))


def held_batches(kind: str) -> list[dict[str, Any]]:
    """A few batches of random frames; the arithmetic of training does not depend on what they show."""
    generator = torch.Generator().manual_seed(0)
    shape = (BATCH[kind], FRAMES[kind], 64, 64, 3)
    return [
        {
            "frames": torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator),
            "text": [f"task {number % 4}" for number in range(BATCH[kind])],
        }
        for _ in range(HELD)
    ]


class FromMemory:
    """Replaces a recipe's data by batches held in memory."""

    kind: str
    turns: Turns | None = None

    def prepare(self) -> None:
        pass

    def plan(self, split: str) -> str:
        return split

    def fingerprint(self, plan: Any) -> str:
        return "memory"

    def skipped(self) -> dict[str, int]:
        return {}

    def evaluate(self, *given: Any) -> EvalReport:
        if self.turns:
            # The stream is not asked again after its last batch.
            self.turns.pass_on((given[-1] - 1) // TURN)
        return EvalReport()

    def stream(self, plan: Any, shard: Shard) -> Iterator[dict[str, Any]]:
        held = held_batches(self.kind)
        turns = self.turns if plan == "train" else None
        for step in range(shard.start // shard.global_batch, shard.stop // shard.global_batch):
            if turns and step % TURN == 0:
                if step and shard.rank == 0:
                    turns.pass_on(step // TURN - 1)
                turns.take(step // TURN)
            samples = shard.samples(step * shard.global_batch, 0)
            yield held[step % HELD] | {"sample": torch.arange(samples.start, samples.stop)}

    validation_stream = Recipe.validation_stream


class MemoryGFDM(FromMemory, GFDMRecipe):
    """GFDM on batches held in memory."""


class MemoryGIDM(FromMemory, GIDMRecipe):
    """GIDM on batches held in memory."""


def settings(kind: str, output: Path, steps: int, workers: int, zero_stage: int) -> PretrainConfig:
    return PretrainConfig(
        train=TrainConfig(
            output=str(output), steps=steps, global_batch=BATCH[kind] * workers, micro_batch=BATCH[kind], num_workers=workers,
            resources_per_worker={"CPU": 1.0}, learning_rate=1e-4, log_every=TURN, validate_every=10**6,
            validation_samples=BATCH[kind], checkpoint_every=CHECKPOINT_EVERY, threads=1, restart_dead_codes_every=0,
            zero_stage=zero_stage,
        ),
        data=DataConfig(manifest=str(output / "manifest")),
        tracking=TrackingConfig(wandb=False),
    )  # fmt: skip


def recipe_of(
    kind: str, output: Path, steps: int, workers: int, zero_stage: int = 1, turns: Turns | None = None
) -> Recipe:
    recipe = {"gfdm": MemoryGFDM, "gidm": MemoryGIDM}[kind](
        settings(kind, output, steps, workers, zero_stage)
    )
    recipe.turns = turns
    return recipe


@dataclass(frozen=True)
class Trained:
    """Times of one of our runs."""

    turns: list[float]
    """Mean seconds of the steps of each turn, without waiting for it, checkpoints and validation."""
    total_s: float
    data: float
    checkpoint: float
    """Shares of the whole."""


def ours(recipes: list[Recipe]) -> dict[str, Trained]:
    """Trains; several recipes at once."""
    train(RayConfig(), recipes)
    found = {}
    for recipe in recipes:
        rows = read_metrics(f"{recipe.config.train.output}/metrics.jsonl")
        # The first step has its own row; the first turn is warm-up.
        later = [row for row in rows if row["split"] == "train" and row["step"] > TURN]
        # A row's own checkpoint comes after it, so it is counted in the next.
        seconds = {phase: sum(row[f"{phase}_s"] for row in later) for phase in PHASES}
        total = sum(seconds.values()) - seconds["validation"]
        working = [phase for phase in PHASES if phase not in ("data", "checkpoint", "validation")]
        found[recipe.kind] = Trained(
            [sum(row[f"{phase}_s"] for phase in working) for row in later],
            total,
            seconds["data"] / total,
            seconds["checkpoint"] / total,
        )
    return found


# --------------------------------------------------------------------------- the bare loop


def bare_worker(rank: int, kind: str, steps: int, workers: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model: Any = recipe_of(kind, Path(folder) / "bare", steps, workers).build()
    model.train()
    if workers > 1:
        store = f"file://{folder}/store"
        distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=workers)
        model = torch.nn.parallel.DistributedDataParallel(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=1e-2)
    held, seconds, turns = held_batches(kind), [], Turns(f"{folder}/turn", BARE)
    for step in range(steps):
        if step % TURN == 0:
            turns.take(step // TURN)
        began = time.perf_counter()
        first = (step * workers + rank) * BATCH[kind]
        generators = sample_generators(0, "noise", range(first, first + BATCH[kind]))
        loss = model(held[step % HELD], generator=generators)["loss"]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()
        seconds.append(time.perf_counter() - began)
        if rank == 0 and (step + 1) % TURN == 0:
            turns.pass_on(step // TURN)
    if rank == 0:
        Path(folder, "bare.json").write_text(json.dumps(seconds))


def run_bare(kind: str, steps: int, workers: int, folder: str) -> None:
    arguments = (kind, steps, workers, folder)
    multiprocessing.start_processes(bare_worker, arguments, nprocs=workers, start_method="spawn")


# --------------------------------------------------------------------------- the table


def per_turn(seconds: list[float]) -> list[float]:
    """The mean step of each turn but the first."""
    return [statistics.mean(seconds[first : first + TURN]) for first in range(TURN, len(seconds), TURN)]


def compare(folder: Path, kind: str, turns: int, workers: int, zero_stage: int) -> None:
    folder.mkdir()
    (folder / "turn").write_text("0")
    steps = turns * TURN
    command = [sys.executable, __file__, "--bare", kind, str(steps), str(workers), str(folder)]
    with subprocess.Popen(command) as plain:
        recipe = recipe_of(kind, folder / "ours", steps, workers, zero_stage, Turns(f"{folder}/turn", OURS))
        try:
            mine = ours([recipe])[kind]
        except BaseException:
            plain.kill()
            raise
    if plain.returncode:
        raise RuntimeError(f"the bare loop ended with code {plain.returncode}")
    bare = per_turn(json.loads((folder / "bare.json").read_text()))
    ratios = sorted(b / o for o, b in zip(mine.turns, bare, strict=True))
    middle = statistics.quantiles(ratios, n=4)
    batch = BATCH[kind] * workers
    print(
        f"| {kind} | {workers} | {zero_stage} | {batch / statistics.median(mine.turns):.1f} | "
        f"{batch / statistics.median(bare):.1f} | {middle[1]:.3f} ({middle[0]:.2f} to {middle[2]:.2f}) | "
        f"{mine.checkpoint:.2%} |",
        flush=True,
    )


def from_cache(folder: Path, steps: int) -> None:
    """GFDM from the latent cache, as jobs/encode_latents.py fills it."""
    folder.mkdir()
    corpus = write_corpus(folder / "corpus", 24, "libx264", frames=48, height=96, width=96)
    config = settings("gfdm", folder / "run", steps, 1, 1)
    config.data = DataConfig(
        corpora={"bench": CorpusConfig(path=str(corpus))},
        manifest=str(folder / "manifest"),
        cache=str(folder / "cache"),
    )
    encode_latents(EncodeConfig(kind="gfdm", data=config.data))
    found = ours([GFDMRecipe(config)])["gfdm"]
    print(f"\nGFDM from the latent cache, one worker: {found.data:.2%} of a step waits for data", flush=True)


def side_by_side(folder: Path, steps: int) -> None:
    def run(name: str, *kinds: str) -> dict[str, Trained]:
        return ours([recipe_of(kind, folder / f"{name}-{kind}", steps, 1) for kind in kinds])

    folder.mkdir()
    times = []
    for number in range(2):
        alone = {kind: run(f"alone-{number}", kind)[kind].total_s for kind in ("gfdm", "gidm")}
        together = run(f"both-{number}", "gfdm", "gidm")
        longer = max(alone, key=lambda kind: alone[kind])
        times.append(together[longer].total_s / alone[longer])
    print(
        f"\nboth at once, one worker each: {longer} takes {statistics.mean(times):.2f} times as long as alone "
        f"({min(times):.2f} to {max(times):.2f})"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--turns", type=int, default=12)
    parser.add_argument("--kinds", nargs="+", default=["gidm", "gfdm"], choices=["gidm", "gfdm"])
    parser.add_argument("--workers", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--zero", nargs="+", type=int, default=[0, 1], help="ZeRO stages")
    parser.add_argument("--ratios-only", action="store_true")
    parser.add_argument("--bare", nargs=4, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.bare:
        kind, steps, workers, folder = given.bare
        run_bare(kind, int(steps), int(workers), folder)
        return
    print(
        f"{host.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, ray {ray.__version__}; nano models, "
        f"{BATCH} samples per worker, one thread each, {given.turns} turns of {TURN} steps\n"
    )
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    with tempfile.TemporaryDirectory(prefix="defi-bench-train-") as scratch:
        folder = Path(scratch)
        print("| model | workers | ZeRO | ours/s | bare/s | ratio (its quartiles) | checkpoints |")
        print("|---|---|---|---|---|---|---|")
        for kind, workers, stage in itertools.product(given.kinds, given.workers, given.zero):
            compare(folder / f"{kind}-{workers}-{stage}", kind, given.turns, workers, stage)
        if not given.ratios_only:
            from_cache(folder / "cached", given.turns * TURN)
            side_by_side(folder / "both", given.turns * TURN)
    ray.shutdown()


if __name__ == "__main__":
    main()
