"""The data engine beside raw decord and Ray's own ways to read video. Prints one table.

    python benchmarks/data.py [--clips 48] [--rounds 3] [--corpus FOLDER]

One clip is 16 frames at 256x256, spread evenly over a video; every contender decodes the same frames of the same
files on PROCESSES processes. Contenders take turns, round by round, and a ratio is the median of its rounds'
ratios to raw decord in the same round (pairs: to raw decord's pairs), so that a machine that is busy for a while slows
both sides. Start-up is outside the clock: it is the speed in mid-stream that is compared.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import logging
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import ray
import ray.data
from videos import write_corpus

from defi_platform.config import CorpusConfig, DataConfig, DecodeConfig, EncodeConfig, ModelConfig
from defi_platform.data.decode.probe import probe
from defi_platform.data.decode.seek_index import SeekIndex
from defi_platform.data.decode.video_readers import VideoReader
from defi_platform.data.ingest.pipeline import ingest
from defi_platform.data.latents.cache import CacheLocation
from defi_platform.data.loader.stream import stream
from defi_platform.data.manifest.table import Manifest
from defi_platform.data.sampling.plan import Plan
from defi_platform.data.sampling.samplers import ClipRule, PairRule, Rule
from defi_platform.data.sampling.sharding import Shard
from defi_platform.encode_latents import encode_latents

PROCESSES = 2
FRAMES, SIZE = 16, 256
MICRO_BATCH = 4
WARM = 4 * MICRO_BATCH
AHEAD = 6 * MICRO_BATCH
"""Samples that a contender may hold finished or begun beyond those that it has handed over."""
VIDEO = {"frames": 300, "height": 480, "width": 640}
SMALL_VIDEO = {"frames": 24, "height": 144, "width": 192}
"""For the memory rows, where only the number of files counts."""
MEMORY = "memory"
CONTENDERS = {
    "raw": "raw decord in plain processes",
    "ours": "this engine: `dataset.stream` into a consumer",
    "map_batches": "Ray Data, `map_batches` with decord",
    "read_videos": "Ray Data, `read_videos` and a filter",
    "raw_pairs": "raw decord in plain processes: pairs",
    "pairs": "this engine: pairs",
    "av1": "this engine: clips of AV1",
    "cache": "this engine: clips from the latent cache",
    "s3": "this engine: clips from S3 (moto on the same cores)",
}


# --------------------------------------------------------------------------- corpora


def configured(corpus: str, folder: Path) -> DataConfig:
    """The data engine's settings for one corpus."""
    return DataConfig(
        corpora={"bench": CorpusConfig(path=corpus)},
        manifest=str(folder),
        height=SIZE,
        width=SIZE,
        holdout=0.0,
        decode=DecodeConfig(processes=PROCESSES),
    )


def planned(corpus: str, folder: Path, rule: Rule) -> tuple[DataConfig, Plan]:
    data = configured(corpus, folder)
    return data, Plan.of(ingest(data), data, rule, seed=0)


def encoded(corpus: str, folder: Path, cache: str) -> tuple[Plan, DataConfig, CacheLocation]:
    """A corpus with all its frames in a latent cache, as nano's GFDM at this size would read them."""
    data = configured(corpus, folder)
    data.cache, data.clip_frames = cache, FRAMES
    model = ModelConfig(overrides={"height": SIZE, "width": SIZE, "frames": FRAMES})
    summary = encode_latents(EncodeConfig(kind="gfdm", model=model, data=data))
    plan = Plan.of(Manifest.open(data.manifest), data, ClipRule(FRAMES), seed=0)
    return plan, data, CacheLocation(cache, summary.info)


# --------------------------------------------------------------------------- contenders

Clip = tuple[str, list[int]]


def rate(counts: Iterator[int], samples: int) -> float:
    """Samples per second of a contender in mid-stream.

    The first WARM samples pass untimed; as many as are in flight remain undone at the end, so that neither the
    filling nor the draining of the pipeline is taken for speed.

    Args:
        counts: size of each micro-batch as it arrives; yields more than WARM + samples in all.
    """
    seen, since, timed = 0, 0.0, 0
    for count in counts:
        seen += count
        if since:
            timed += count
            if timed >= samples:
                return timed / (time.perf_counter() - since)
        elif seen >= WARM:
            since = time.perf_counter()
    raise RuntimeError(f"the stream ended after {seen} samples, {WARM + samples} were to come")


def ours(plan: Plan, data: DataConfig, cache: CacheLocation | None = None, *, samples: int) -> float:
    """Samples per second that reach a consumer."""
    with contextlib.closing(_stream(plan, data, WARM + samples + AHEAD, cache)) as batches:
        return rate((len(batch["sample"]) for batch in batches), samples)


def _stream(plan: Plan, data: DataConfig, stop: int, cache: CacheLocation | None = None) -> Any:
    return stream(plan, data, Shard.single(0, stop, MICRO_BATCH), cache=cache)


def raw_decord(clip: Clip) -> int:
    """What the data engine is measured against: nothing but decord."""
    import decord

    path, indices = clip
    reader = decord.VideoReader(path, width=SIZE, height=SIZE, num_threads=1)
    assert len(reader.get_batch(indices).asnumpy()) == len(indices)
    return 1


def raw(pool: Any, clips: Sequence[Clip], samples: int) -> float:
    """Clips per second of raw decord in plain processes, which throw away what they decode."""
    started = time.perf_counter()
    pool.map(raw_decord, clips[:samples], chunksize=1)
    return samples / (time.perf_counter() - started)


def naive_map_batches(clips: Sequence[Clip], samples: int) -> float:
    """decord in a `map_batches` of tasks, as Ray's examples have it."""

    def decode(batch: dict[str, Any]) -> dict[str, Any]:
        import decord

        readers = [decord.VideoReader(path, width=SIZE, height=SIZE) for path in batch["path"]]
        frames = [
            reader.get_batch(list(indices)).asnumpy()
            for reader, indices in zip(readers, batch["indices"], strict=True)
        ]
        return {"frames": np.stack(frames)}

    rows = [{"path": path, "indices": indices} for path, indices in clips]
    dataset = ray.data.from_items(rows, override_num_blocks=len(rows) // MICRO_BATCH)
    decoded = dataset.map_batches(decode, batch_size=MICRO_BATCH)
    return rate((len(b["frames"]) for b in decoded.iter_batches(batch_size=MICRO_BATCH)), samples)


def ray_read_videos(clips: Sequence[Clip], samples: int) -> float:
    """`ray.data.read_videos`, which decodes every frame, and a filter that keeps the wanted ones."""
    wanted = set(clips[0][1])
    dataset = ray.data.read_videos([path for path, _ in clips], resize=(SIZE, SIZE))
    kept = dataset.filter(lambda row: row["frame_index"] in wanted)
    batches = kept.iter_batches(batch_size=FRAMES * MICRO_BATCH)
    return rate((len(b["frame"]) // FRAMES for b in batches), samples)


# --------------------------------------------------------------------------- memory


def peak_pss(work: Callable[[], object]) -> int:
    """Most bytes that this process and everything it started (Ray too) held at once while `work` ran; shared
    pages count once."""
    peak, done = 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.2):
            total = 0
            for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
                with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                    total += process.memory_full_info().pss
            peak = max(peak, total)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        work()
    finally:
        done.set()
        watcher.join()
    return peak


def measure_memory(corpus: str) -> None:
    """Ingests a corpus and streams it once, in this process; prints the peak in MB."""
    started()

    def work() -> None:
        with tempfile.TemporaryDirectory() as manifest:
            data, plan = planned(corpus, Path(manifest), ClipRule(FRAMES))
            for _ in _stream(plan, data, plan.num_videos):
                pass

    print(json.dumps({"peak_mb": peak_pss(work) / 1e6}))
    ray.shutdown()


def memory_in_a_process_of_its_own(corpus: Path) -> float:
    """MB."""
    command = [sys.executable, __file__, "--" + MEMORY, str(corpus)]
    answer = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True, text=True)
    return float(json.loads(answer.stdout.splitlines()[-1])["peak_mb"])


# --------------------------------------------------------------------------- the table


def started() -> None:
    """A Ray of PROCESSES logical CPUs on this machine, quiet."""
    quiet: dict[str, Any] = {"include_dashboard": False, "log_to_driver": False, "logging_level": "ERROR"}
    ray.init(address="local", num_cpus=PROCESSES, **quiet)
    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)


@contextlib.contextmanager
def on_s3(folder: Path) -> Iterator[str]:
    """The files of `folder` in a bucket of a moto server, a process of its own on the loopback."""
    sys.path.append(str(Path(__file__).parents[1] / "tests" / "data"))
    from s3_server import s3_server

    from defi_platform import storage

    secrets = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "AWS_DEFAULT_REGION": "us-east-1"}
    with s3_server() as endpoint:
        os.environ.update(secrets, AWS_ENDPOINT_URL=endpoint)
        import s3fs

        s3fs.S3FileSystem(endpoint_url=endpoint).mkdir("bench")
        for path in sorted(folder.iterdir()):
            storage.write_bytes(f"s3://bench/clips/{path.name}", path.read_bytes())
        yield "s3://bench/clips"


def clips_of(plan: Plan, count: int) -> list[Clip]:
    """The plan's first samples, for contenders that know no plan."""
    samples = plan.resolve_many(np.arange(count))
    uris = plan.manifest.take("uri", np.array([sample.row for sample in samples]))
    return [(uri, list(sample.indices)) for uri, sample in zip(uris, samples, strict=True)]


def alternated(contenders: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Every contender's figure in each of the rounds, taken in turns."""
    found: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, contender in contenders.items():
            found[name].append(contender())
    return found


def speeds(arguments: argparse.Namespace, scratch: Path) -> None:
    """The rows about speed."""
    clips, chosen = arguments.clips, set(arguments.only or CONTENDERS)
    videos = WARM + clips + AHEAD
    corpus = Path(arguments.corpus or write_corpus(scratch / "h264", videos, "libx264", **VIDEO))
    with contextlib.ExitStack() as stack:
        pool = stack.enter_context(multiprocessing.get_context("spawn").Pool(PROCESSES))
        bucket = stack.enter_context(on_s3(corpus)) if "s3" in chosen else ""
        started()
        data, plan = planned(str(corpus), scratch / "m", ClipRule(FRAMES))
        same = clips_of(plan, videos)
        pool.map(raw_decord, same[:PROCESSES])
        contenders: dict[str, Callable[[], float]] = {"raw": lambda: raw(pool, same, clips)}
        contenders["ours"] = lambda: ours(plan, data, samples=clips)
        contenders["map_batches"] = lambda: naive_map_batches(same, clips)
        contenders["read_videos"] = lambda: ray_read_videos(same, max(MICRO_BATCH, clips // 4))
        if "pairs" in chosen:
            _, pairs = planned(str(corpus), scratch / "m", PairRule())
            same_pairs = clips_of(pairs, 2 * clips)
            contenders["raw_pairs"] = lambda: raw(pool, same_pairs, 2 * clips)
            contenders["pairs"] = lambda: ours(pairs, data, samples=2 * clips)
            chosen.add("raw_pairs")
        if "av1" in chosen:
            av1 = write_corpus(scratch / "av1", videos, "libsvtav1", **VIDEO)
            of_av1 = planned(str(av1), scratch / "m-av1", ClipRule(FRAMES))
            contenders["av1"] = lambda: ours(of_av1[1], of_av1[0], samples=clips)
        if "cache" in chosen:
            # Shorter videos: encoding is not what is timed, and reading does not depend on their length.
            short = write_corpus(scratch / "short", videos, "libx264", **(VIDEO | {"frames": 48}))
            of_cache = encoded(str(short), scratch / "m-short", str(scratch / "cache"))
            contenders["cache"] = lambda: ours(*of_cache, samples=40 * clips)
        if "s3" in chosen:
            of_s3 = planned(bucket, scratch / "m-s3", ClipRule(FRAMES))
            contenders["s3"] = lambda: ours(of_s3[1], of_s3[0], samples=clips)
        found = alternated({k: v for k, v in contenders.items() if k in {"raw", *chosen}}, arguments.rounds)
        stack.callback(ray.shutdown)
    print(
        f"| {PROCESSES} processes | samples/s | frames/s | ratio to raw decord, and its range over the rounds |"
    )
    print("|---|---|---|---|")
    for name, values in found.items():
        base, frames = ("raw_pairs", 2) if name.endswith("pairs") else ("raw", FRAMES)
        ratios = [value / other for value, other in zip(values, found[base], strict=True)]
        speed = statistics.median(values)
        print(
            f"| {CONTENDERS[name]} | {speed:.2f} | {speed * frames:.0f} | {statistics.median(ratios):.2f} "
            f"({min(ratios):.2f} to {max(ratios):.2f}) |"
        )


def opening(scratch: Path) -> None:
    """The rows about opening a video of ten minutes, in processor time."""
    import av
    import decord

    path = str(
        next(write_corpus(scratch / "long", 1, "libx264", frames=18_000, height=120, width=160).iterdir())
    )
    index = SeekIndex.from_bytes(probe(path, 1 << 31, score_frames=False, report=lambda _: None).seek_index)

    def all_packets() -> None:
        with av.open(path) as container:
            assert sum(1 for _ in container.demux(video=0)) > 18_000

    ways = {
        "decord": lambda: decord.VideoReader(path, num_threads=1),
        "PyAV, reading all packets (this engine before)": all_packets,
        "this engine, with the seek index of the manifest": lambda: VideoReader(path, index).close(),
    }
    print("\n| opening a video of 10 minutes | ms of processor time |\n|---|---|")
    for name, way in ways.items():
        print(f"| {name} | {min(_cpu_s(way) for _ in range(5)) * 1e3:.1f} |")


def _cpu_s(work: Callable[[], object]) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started


def memory(scratch: Path, videos: int) -> None:
    """The rows about memory."""
    small = memory_in_a_process_of_its_own(write_corpus(scratch / "some", videos, "libx264", **SMALL_VIDEO))
    large = memory_in_a_process_of_its_own(
        write_corpus(scratch / "tenfold", 10 * videos, "libx264", **SMALL_VIDEO)
    )
    print("\n| peak memory of all processes, ingest and one epoch | MB | ratio |\n|---|---|---|")
    print(
        f"| {videos} videos | {small:.0f} | 1.00 |\n| {10 * videos} videos | {large:.0f} | {large / small:.2f} |"
    )


def main() -> int:
    os.environ.setdefault("SVT_LOG", "1")  # the AV1 encoder greets with a page of settings otherwise
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clips", type=int, default=48, help="clips that are timed per round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--corpus", help="folder of H.264 videos to use instead of synthetic ones")
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, help="contenders besides raw decord")
    parser.add_argument("--memory-videos", type=int, default=240, help="in the smaller corpus; 0: none")
    parser.add_argument("--" + MEMORY, metavar="FOLDER", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory:
        measure_memory(arguments.memory)
        return 0
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("ray", "decord", "av"))
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores; {versions}\n")
    with tempfile.TemporaryDirectory() as scratch:
        speeds(arguments, Path(scratch))
        opening(Path(scratch))
        if arguments.memory_videos:
            memory(Path(scratch), arguments.memory_videos)
    return 0


if __name__ == "__main__":
    sys.exit(main())
