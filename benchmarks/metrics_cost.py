"""CPU time that metrics cost: the process that emits them, Ray's agent, and their share of the work they count.

python benchmarks/metrics_cost.py [--rounds N]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY / "platform"), str(REPOSITORY), str(REPOSITORY / "tests" / "data")]

import numpy as np  # noqa: E402
import psutil  # noqa: E402
import ray  # noqa: E402
from corpora import write_video  # noqa: E402

from defi_platform.config import CorpusConfig, DataConfig, DecodeConfig  # noqa: E402
from defi_platform.data.ingest.pipeline import ingest  # noqa: E402
from defi_platform.data.loader import sample_decoder  # noqa: E402
from defi_platform.data.loader.sample_decoder import SampleDecoder  # noqa: E402
from defi_platform.data.sampling.plan import Plan  # noqa: E402
from defi_platform.data.sampling.samplers import ClipRule  # noqa: E402
from defi_platform.metrics import catalogue  # noqa: E402
from defi_platform.serve.inference.metrics import ServiceMetrics  # noqa: E402
from defi_platform.train.observability.run_metrics import RunMetrics  # noqa: E402

MICRO_BATCH, FRAMES, SIZE = 8, 16, 64
CALLS = 50_000
REPORT_S = 12.0
"""Longer than Ray's processes take between two reports."""
PHASES = ("data", "forward", "backward", "optimizer", "checkpoint", "validation", "other")


def cpu_us(work: Callable[[], object], number: int) -> float:
    """Microseconds of this process's CPU time, all its threads included, for one call."""
    began = time.process_time()
    for _ in range(number):
        work()
    return (time.process_time() - began) / number * 1e6


def agent_us(work: Callable[[], object], number: int) -> float:
    """Microseconds of the CPU time of Ray's agent for one call, what it uses by itself taken off."""
    children = psutil.Process().children(recursive=True)
    agent = next(child for child in children if "DashboardAgent" in " ".join(child.cmdline()))

    def used() -> float:
        times = agent.cpu_times()
        return float(times.user + times.system)

    before = used()
    time.sleep(REPORT_S)
    idle = used() - before
    before = used()
    for _ in range(number):
        work()
    time.sleep(REPORT_S)
    return (used() - before - idle) / number * 1e6


def micro_batch_us(folder: Path, rounds: int) -> float:
    """Microseconds of CPU time of a decode actor and its decoder process for a micro-batch, without metrics."""
    for number in range(8):
        write_video(folder / "corpus" / f"{number}.mp4", range(number * 20, number * 20 + 40))
    data = DataConfig(
        corpora={"toy": CorpusConfig(path=str(folder / "corpus"))},
        manifest=str(folder / "manifest"),
        holdout=0.0,
        height=SIZE,
        width=SIZE,
        decode=DecodeConfig(processes=1),
    )
    before = {child.pid for child in psutil.Process().children()}
    manifest = ingest(data)
    decoder = SampleDecoder(Plan.of(manifest, data, ClipRule(frames=FRAMES), seed=0), data)
    workers = [child for child in psutil.Process().children() if child.pid not in before]

    def used() -> float:
        decoding = sum(sum(worker.cpu_times()[:2]) for worker in workers)
        return time.process_time() + float(decoding)

    began = used()
    for number in range(rounds):
        decoder({"start": np.array([number * MICRO_BATCH]), "stop": np.array([(number + 1) * MICRO_BATCH])})
    spent = used() - began
    decoder.close()
    return spent / rounds * 1e6


def main() -> None:
    """Measures and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=40, help="micro-batches to decode")
    rounds = parser.parse_args().rounds
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
    with tempfile.TemporaryDirectory() as folder:
        batch_us = micro_batch_us(Path(folder), rounds)
    columns = {"corpus": np.array(["toy"] * MICRO_BATCH), "skipped": np.array([""] * MICRO_BATCH)}
    columns |= {"sample": np.arange(MICRO_BATCH), "frames": np.zeros(1)}

    def micro_batch() -> None:
        catalogue.DATA_BATCH_SECONDS.observe(0.1, run="runs/a")
        sample_decoder._count(columns, "runs/a")

    service, run = ServiceMetrics("digest"), RunMetrics("runs/a", "gfdm", 1000)
    phases = dict.fromkeys(PHASES, 0.1)
    rows: list[tuple[str, Callable[[], object]]] = [
        ("a micro-batch", micro_batch),
        ("a logged row of training", lambda: run.updates(10, 80, {"loss": 0.1}, phases)),
        ("an answer of a policy", lambda: service.answer(1.0, 20.0, 22.0, 4)),
    ]
    print(f"{'event':28}{'us in the process':>20}{'us in the agent':>20}")
    for name, work in rows:
        mine, agents = cpu_us(work, CALLS), agent_us(work, CALLS)
        print(f"{name:28}{mine:20.1f}{agents:20.1f}")
        if name == rows[0][0]:
            share = (mine + agents) / batch_us
    print(
        f"\na micro-batch of {MICRO_BATCH} clips of {FRAMES} frames, {SIZE}x{SIZE}, takes {batch_us / 1e3:.1f} ms of CPU "
        f"time; its metrics are {share:.2%} of that"
    )
    ray.shutdown()


if __name__ == "__main__":
    main()
