"""Which samples a run learns from when its workers are killed in the middle of an epoch and go on as another number.

    python benchmarks/exact_resume.py [--streaming VENV | --without-streaming] [--steps 21]

Two workers are killed, one goes on from their last checkpoint and is killed, three go on to the end of the epoch. Our side
is a training of GIDM on real video with the whole data path, on Ray; the other is MosaicML streaming (PyPI), whose loader
and saved state are used as its documentation says, in a virtual environment of its own: --streaming names one that holds
`mosaicml-streaming`, else it is made (2 GB, a few minutes). Counted are the samples of the steps that checkpoints hold, as
the final weights have seen them: those seen twice, those never seen, and the steps that consist of other samples than the
same step of a run that nobody disturbed. MosaicML streaming reads two epochs, one that its batches fill and one that leaves
the last of them short; our sample numbers run on from epoch to epoch, so no batch of ours is ever short. Prints the sample
numbers of our side and one table; exits with 1 when ours repeats, loses or reorders any.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import venv
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from videos import write_corpus

from defi_platform.cluster import ray_session
from defi_platform.config import (
    CorpusConfig,
    DataConfig,
    PretrainConfig,
    RayConfig,
    TrackingConfig,
    TrainConfig,
)
from defi_platform.data.sampling.sharding import Shard
from defi_platform.train.checkpoint import format as checkpoints
from defi_platform.train.driver.run import TrainingFailed, train
from defi_platform.train.recipes.gidm import GIDMRecipe

BATCH, CHECKPOINT_EVERY = 12, 2
"""Samples of a step over all workers: 6, 12 or 4 each."""
PEER = Path(__file__).resolve().parent / "resume" / "streaming_rank.py"
PACKAGE = "mosaicml-streaming==0.13.0"
TIMEOUT_S = 600.0

Steps = dict[int, list[int]]
"""Step -> its sample numbers, sorted."""


@dataclass(frozen=True)
class Attempt:
    """A part of a run: with so many workers, until all are killed after a step, or to the end where it is None."""

    workers: int
    kill_at: int | None


def attempts(steps: int) -> list[Attempt]:
    """Two workers, one, three; the first two are killed one step past a checkpoint."""
    third = steps // 3 // CHECKPOINT_EVERY * CHECKPOINT_EVERY
    return [Attempt(2, third + 1), Attempt(1, 2 * third + 1), Attempt(3, None)]


@dataclass(frozen=True)
class Score:
    """What became of an epoch's samples."""

    repeated: int
    """Samples seen more than once, the times beyond the first counted."""
    lost: int
    """Samples never seen."""
    reordered: int
    """Steps of other samples than the same step of an undisturbed run."""

    @classmethod
    def of(cls, seen: Steps, undisturbed: Steps, samples: int) -> Score:
        """Of a run's steps, an undisturbed run's, and the number of samples that both should see once."""
        counts = Counter(sample for step in seen.values() for sample in step)
        wanted = range(samples)
        return cls(
            repeated=sum(count - 1 for count in counts.values()),
            lost=sum(sample not in counts for sample in wanted),
            reordered=sum(seen.get(step) != undisturbed[step] for step in undisturbed),
        )


def learned(rows: Iterable[dict[str, Any]], plan: list[Attempt]) -> Steps:
    """Steps as the last weights have seen them: what came after an attempt's last checkpoint does not count.

    Args:
        rows: `from` (workers of the attempt), `step` and `samples` of each worker.
        plan: the attempts, each with another number of workers.
    """
    kept: Steps = {}
    limits = {
        one.workers: None if one.kill_at is None else one.kill_at // CHECKPOINT_EVERY * CHECKPOINT_EVERY
        for one in plan
    }
    for row in rows:
        last = limits[row["from"]]
        if last is None or row["step"] <= last:
            kept[row["step"]] = sorted([*kept.get(row["step"], []), *row["samples"]])
    return kept


def rows_in(folder: Path) -> list[dict[str, Any]]:
    """What workers have written."""
    lines = (line for file in sorted(folder.glob("seen_*.jsonl")) for line in file.read_text().splitlines())
    return [json.loads(line) for line in lines]


# --------------------------------------------------------------------------- ours


class WatchedGIDM(GIDMRecipe):
    """GIDM whose workers write down the samples of each step that the loop has taken, and kill themselves once.

    Args:
        config: of the run.
        kill_at: step after which every worker dies.
    """

    def __init__(self, config: PretrainConfig, kill_at: int | None):
        super().__init__(config)
        self.kill_at, self.taken = kill_at, list[int]()

    def stream(self, plan: Any, shard: Shard) -> Iterator[dict[str, Any]]:
        for batch in super().stream(plan, shard):
            self.taken += batch["sample"].tolist()
            yield batch

    def after_update(self, engine: Any, step: int) -> dict[str, float]:
        import torch.distributed as distributed

        rank, workers = distributed.get_rank(), distributed.get_world_size()
        run = Path(self.config.train.output)
        with (run / f"seen_{workers}_{rank}.jsonl").open("a") as file:
            file.write(json.dumps({"from": workers, "step": step, "samples": self.taken}) + "\n")
        self.taken = []
        if step == self.kill_at:
            deadline = time.monotonic() + TIMEOUT_S
            due = step // CHECKPOINT_EVERY * CHECKPOINT_EVERY
            while not any(one.step >= due for one in checkpoints.committed(str(run))):
                assert time.monotonic() < deadline, f"no checkpoint of step {due} in {run}"
                time.sleep(0.1)
            distributed.barrier()  # or the death of the first one would keep the others from writing
            os.kill(os.getpid(), signal.SIGKILL)
        return super().after_update(engine, step)


def recipe_of(corpus: Path, run: Path, steps: int, attempt: Attempt) -> WatchedGIDM:
    """The training of one attempt."""
    return WatchedGIDM(
        PretrainConfig(
            data=DataConfig(
                corpora={"videos": CorpusConfig(path=str(corpus))},
                manifest=str(corpus.parent / "manifest"),
                pair_interval_s=0.5,
            ),
            train=TrainConfig(
                output=str(run),
                steps=steps,
                global_batch=BATCH,
                micro_batch=BATCH // attempt.workers // 2,
                num_workers=attempt.workers,
                resources_per_worker={"CPU": 0.5},
                checkpoint_every=CHECKPOINT_EVERY,
                validate_every=10**6,
                log_every=1,
                threads=1,
                restart_dead_codes_every=0,
                max_failures=0,
            ),
            tracking=TrackingConfig(wandb=False),
        ),
        attempt.kill_at,
    )


def ours(scratch: Path, steps: int) -> tuple[Steps, Steps]:
    """Steps of the killed run and of one with two workers that nobody disturbs."""
    corpus = write_corpus(scratch / "corpus", 24, "libx264", frames=48, height=96, width=96)
    found = []
    with ray_session(RayConfig()):
        for name, plan in (("killed", attempts(steps)), ("undisturbed", [Attempt(2, None)])):
            run = scratch / name
            for attempt in plan:
                print(f"ours: {name}, {attempt.workers} workers", flush=True)
                try:
                    train(RayConfig(), [recipe_of(corpus, run, steps, attempt)])
                except TrainingFailed:
                    if attempt.kill_at is None:
                        raise
            found.append(learned(rows_in(run), plan))
    return found[0], found[1]


# --------------------------------------------------------------------------- MosaicML streaming


def streaming_python(folder: Path | None, scratch: Path) -> Path:
    """The interpreter of a virtual environment that holds streaming; made where none is given."""
    if folder is None:
        folder = scratch / "streaming"
        print(f"making a virtual environment with {PACKAGE}", flush=True)
        venv.create(folder, with_pip=True)
        subprocess.run([folder / "bin" / "pip", "install", "--quiet", PACKAGE], check=True)
    return folder / "bin" / "python"


def start_ranks(python: Path, workers: int, arguments: list[str]) -> None:
    """Runs one attempt; workers that kill themselves are no error, all others are."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {
        "WORLD_SIZE": workers,
        "LOCAL_WORLD_SIZE": workers,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    ranks = []
    for rank in range(workers):
        own = {name: str(value) for name, value in (common | {"RANK": rank, "LOCAL_RANK": rank}).items()}
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | own
        ranks.append(subprocess.Popen([python, PEER, *arguments], env=environment))
    codes = [rank.wait(TIMEOUT_S) for rank in ranks]
    if any(code not in (0, -signal.SIGKILL) for code in codes):
        raise SystemExit(f"streaming's workers ended with {codes}")


def streaming(scratch: Path, steps: int, samples: int, python: Path) -> tuple[Steps, Steps]:
    """Steps of the killed run and of one with two workers that nobody disturbs.

    Args:
        scratch: empty folder.
        steps: of an epoch.
        samples: of the dataset.
        python: interpreter of the virtual environment.
    """
    data = str(scratch / "data")
    subprocess.run([python, PEER, "--write", str(samples), "--data", data], check=True)
    found = []
    for name, plan in (("killed", attempts(steps)), ("undisturbed", [Attempt(2, None)])):
        run = scratch / name
        run.mkdir()
        for attempt in plan:
            print(f"streaming, {samples} samples: {name}, {attempt.workers} workers", flush=True)
            arguments = ["--data", data, "--run", str(run), "--batch", str(BATCH), "--steps", str(steps)]
            arguments += ["--checkpoint-every", str(CHECKPOINT_EVERY), "--kill-at", str(attempt.kill_at or 0)]
            # What a killed process has left in shared memory would stop the next one.
            subprocess.run(
                [python, "-c", "import streaming.base.util as u; u.clean_stale_shared_memory()"], check=True
            )
            start_ranks(python, attempt.workers, arguments)
        found.append(learned(rows_in(run), plan))
    return found[0], found[1]


def main() -> int:
    """Command line; see the top of the file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--streaming", type=Path, help="virtual environment that holds mosaicml-streaming")
    parser.add_argument("--without-streaming", action="store_true", help="our side alone")
    parser.add_argument("--steps", type=int, default=21, help="of an epoch, 12 samples each; at least 9")
    arguments = parser.parse_args()
    if arguments.steps < 9:
        parser.error("--steps must be 9 or more")
    whole = arguments.steps * BATCH
    with tempfile.TemporaryDirectory(prefix="exact-resume-") as folder:
        scratch = Path(folder)
        killed, undisturbed = ours(scratch, arguments.steps)
        sides = [("ours", whole, killed, undisturbed)]
        if not arguments.without_streaming:
            python = streaming_python(arguments.streaming, scratch)
            for samples in (whole, whole - 2):
                apart = scratch / f"streaming_{samples}"
                apart.mkdir()
                found = streaming(apart, arguments.steps, samples, python)
                sides.append((f"MosaicML streaming, epoch of {samples}", samples, *found))
    numbers = sorted(sample for step in killed.values() for sample in step)
    print(f"\nsample numbers that our weights have seen, {len(numbers)} of {whole}:\n{numbers}\n")
    for attempt in attempts(arguments.steps):
        end = f"killed after step {attempt.kill_at}" if attempt.kill_at else "to the end"
        print(f"{attempt.workers} workers, {end}")
    steps = f"steps of other samples, of {arguments.steps}"
    print(f"\n| side | run | samples repeated | lost | {steps} |\n|---|---|---|---|---|")
    for side, samples, hit, calm in sides:
        for name, seen in (("2 -> 1 -> 3, killed", hit), ("2, undisturbed", calm)):
            score = Score.of(seen, calm, samples)
            print(f"| {side} | {name} | {score.repeated} | {score.lost} | {score.reordered} |")
    return 0 if Score.of(killed, undisturbed, whole) == Score(0, 0, 0) else 1


if __name__ == "__main__":
    sys.exit(main())
