"""Memory and CPU time of the ingest's driver, and of another checkout's, over a made-up listing: no video is opened.

python benchmarks/listing.py [videos] [--against CHECKOUT] [--first-only]

The driver lists by itself here, but in the last row: there the corpus is listed in a decoder process, as an ingest does,
and the seconds are those of both processes, with the second one's start.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

FIRST, AGAIN, ONE_NEW = "first ingest", "again, nothing changed", "again, one video new"
IN_PROCESS = "first ingest, with the listing process"
INGESTS = (FIRST, AGAIN, ONE_NEW, IN_PROCESS)
MEASURE, LISTING_PROCESS = "--measure", "--listing-process"
MADE_UP = "DEFI_MADE_UP_LISTING"
"""Environment variable for the listing process: number of videos, root of the corpus."""


def peak_mb() -> int:
    """Most memory this process has had resident; mapped files count."""
    # Not getrusage: its peak is inherited from the process that started this one.
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) // 1024


def name_of(number: int) -> str:
    """Name of a made-up file, a thousand to a folder."""
    return f"videos/train/{number // 1000:05d}/{number:08d}.mp4"


def make_up_files(root: str, videos: int) -> None:
    """Has whoever lists `root` in this process find more files there than there are."""
    from defi_platform import storage

    walked = storage.walk

    def walk(folder: str, *options: Any) -> Iterator[storage.Entry]:
        yield from walked(folder, *options)
        if folder == root:
            for number in range(videos):
                name = name_of(number)
                size = 1_000_000 + number
                yield storage.Entry(f"{root}/{name}", name, size, f"{size}-17000000{number:011d}")

    storage.walk = walk  # type: ignore[assignment]


def job_handler(memory_bytes: int) -> Any:
    """Makes what answers the jobs of a decoder process, which finds the made-up files too."""
    from defi_platform.data.decode.worker_jobs import JobHandler

    videos, root = os.environ[MADE_UP].split(" ", 1)
    make_up_files(root, int(videos))
    return JobHandler(memory_bytes)


def measure(folder: str, videos: int, listing_process: bool) -> None:
    """Runs one ingest in this process.

    Args:
        folder: for corpus and manifest.
        videos: how many.
        listing_process: whether the corpus is listed in another one, as an ingest does.

    Prints: MB more than the imports take, seconds of CPU time.
    """
    from defi_platform.config import CorpusConfig, DataConfig

    try:
        from defi_platform.data.decode.messages import Probe
        from defi_platform.data.ingest import pipeline as ingest
        from defi_platform.data.ingest.probe_results import ProbeResult
        from defi_platform.data.sources import formats
    except ImportError:  # a checkout from before the folders
        from defi_platform.data.verdicts import Verdict as ProbeResult  # type: ignore[no-redef]

        from defi_platform.data import ingest  # type: ignore[no-redef]
        from defi_platform.data.decode import Probe  # type: ignore[no-redef]

    root = str(Path(folder) / "corpus")

    def probed(todo: Iterable[Any], *_: Any, **__: Any) -> Iterator[ProbeResult]:
        for one in todo:
            probe = Probe(300, 30.0, 640, 480, "h264", 1_000_000, "pyav", False)
            yield ProbeResult(one.uri, one.version, probe, one.attempts)

    ingest.probe_files = probed  # type: ignore[assignment]
    if listing_process:
        import listing

        from defi_platform.data.decode.pool import DecoderPool

        os.environ[MADE_UP] = f"{videos} {root}"
        # Of the module, by which that process finds it, not of this script.
        ingest.one_process = lambda limits: DecoderPool(limits, listing.job_handler)  # type: ignore
    else:
        make_up_files(root, videos)
        if hasattr(ingest, "listed"):
            ingest.listed = lambda pool, *corpus: formats.listing(*corpus)  # type: ignore[assignment]
    corpora = {"c": CorpusConfig(path=root, format="plain")}
    manifests = Path(folder) / ("manifest-process" if listing_process else "manifest")
    base, started = peak_mb(), time.process_time()
    manifest = ingest.ingest(DataConfig(corpora=corpora, manifest=str(manifests)))
    seconds = time.process_time() - started
    if listing_process:
        other = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds += other.ru_utime + other.ru_stime
    assert len(manifest) == videos
    print(f"measured {peak_mb() - base} {seconds:.1f}")


def measured(checkout: Path, folder: str, videos: int, listing_process: bool) -> tuple[int, float]:
    """Runs `measure` in its own process.

    Args:
        checkout: whose packages are measured.
        folder: for corpus and manifest.
        videos: how many.
        listing_process: see `measure`.

    Returns: (MB, seconds of CPU time).
    """
    paths = {"PYTHONPATH": f"{checkout / 'platform'}{os.pathsep}{checkout}"}
    command = [sys.executable, __file__, str(videos), MEASURE, folder]
    command += [LISTING_PROCESS] if listing_process else []
    done = subprocess.run(
        command, env=os.environ | paths, check=True, text=True, stdout=subprocess.PIPE
    ).stdout
    megabytes, seconds = done.rsplit("measured ", 1)[1].split()
    return int(megabytes), float(seconds)


def main() -> int:
    """Runs four ingests per checkout, each in its own process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("videos", nargs="?", type=int, default=200_000)
    parser.add_argument("--against", type=Path, metavar="CHECKOUT", help="another checkout of this project")
    parser.add_argument(
        "--first-only", action="store_true", help="leave out what comes after the first ingest"
    )
    parser.add_argument(MEASURE, metavar="FOLDER", help=argparse.SUPPRESS)
    parser.add_argument(LISTING_PROCESS, action="store_true", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.measure:
        measure(chosen.measure, chosen.videos, chosen.listing_process)
        return 0
    checkouts = {"here": Path(__file__).resolve().parents[1]}
    if chosen.against:
        checkouts["there"] = chosen.against.resolve()
    rows: dict[str, list[tuple[int, float]]] = {}
    for checkout in checkouts.values():
        with tempfile.TemporaryDirectory() as folder:
            corpus = Path(folder) / "corpus"
            corpus.mkdir()
            with (corpus / "texts.csv").open("w") as texts:
                print("video,text", file=texts)
                for number in range(chosen.videos + 1):
                    print(f"{name_of(number)},put the object into container {number}", file=texts)
            for what in INGESTS[:1] if chosen.first_only else INGESTS:
                videos, process = chosen.videos + (what == ONE_NEW), what == IN_PROCESS
                rows.setdefault(what, []).append(measured(checkout, folder, videos, process))
    names = "".join(f" {name}: MB | MB per million videos | CPU seconds |" for name in checkouts)
    print(f"| {chosen.videos:,} videos |{names} MB, there to here |")
    print("|---|" + "---|" * (3 * len(checkouts) + 1))
    for what, found in rows.items():
        cells = "".join(f" {mb} | {mb / chosen.videos * 1e6:,.0f} | {s:.1f} |" for mb, s in found)
        print(f"| {what} |{cells} {found[-1][0] / max(1, found[0][0]):.1f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
