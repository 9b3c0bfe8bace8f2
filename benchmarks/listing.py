"""Memory and CPU time of the ingest's driver, and of another checkout's, over a made-up listing: no video is opened.

python benchmarks/listing.py [videos] [--against CHECKOUT] [--first-only]
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

TIMES = ("first ingest", "again, nothing changed", "again, one video new")
MEASURE = "--measure"


def peak_mb() -> int:
    """Most memory this process has had resident; mapped files count."""
    # Not getrusage: its peak is inherited from the process that started this one.
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) // 1024


def name_of(number: int) -> str:
    """Name of a made-up file, a thousand to a folder."""
    return f"videos/train/{number // 1000:05d}/{number:08d}.mp4"


def measure(folder: str, videos: int) -> None:
    """Runs one ingest in this process. Prints: MB more than the imports take, seconds of CPU time."""
    from defi_platform import storage
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

    walked, root = storage.walk, str(Path(folder) / "corpus")

    def walk(folder: str, *options: Any) -> Iterator[storage.Entry]:
        yield from walked(folder, *options)
        if folder == root:
            for number in range(videos):
                name = name_of(number)
                size = 1_000_000 + number
                yield storage.Entry(f"{root}/{name}", name, size, f"{size}-17000000{number:011d}")

    def probed(todo: Iterable[Any], *_: Any, **__: Any) -> Iterator[ProbeResult]:
        for one in todo:
            probe = Probe(300, 30.0, 640, 480, "h264", 1_000_000, "pyav", False)
            yield ProbeResult(one.uri, one.version, probe, one.attempts)

    storage.walk = walk  # type: ignore[assignment]
    ingest.probe_files = probed  # type: ignore[assignment]
    if hasattr(ingest, "listed"):  # in a process of its own, which would not know of the made-up files
        ingest.listed = lambda pool, *corpus: formats.listing(*corpus)  # type: ignore[assignment]
    corpora = {"c": CorpusConfig(path=root, format="plain")}
    base, started = peak_mb(), time.process_time()
    manifest = ingest.ingest(DataConfig(corpora=corpora, manifest=str(Path(folder) / "manifest")))
    seconds = time.process_time() - started
    assert len(manifest) == videos
    print(f"measured {peak_mb() - base} {seconds:.1f}")


def measured(checkout: Path, folder: str, videos: int) -> tuple[int, float]:
    """Runs `measure` in its own process.

    Args:
        checkout: whose packages are measured.
        folder: for corpus and manifest.
        videos: how many.

    Returns: (MB, seconds of CPU time).
    """
    paths = {"PYTHONPATH": f"{checkout / 'platform'}{os.pathsep}{checkout}"}
    command = [sys.executable, __file__, str(videos), MEASURE, folder]
    done = subprocess.run(
        command, env=os.environ | paths, check=True, text=True, stdout=subprocess.PIPE
    ).stdout
    megabytes, seconds = done.rsplit("measured ", 1)[1].split()
    return int(megabytes), float(seconds)


def main() -> int:
    """Runs three ingests per checkout, each in its own process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("videos", nargs="?", type=int, default=200_000)
    parser.add_argument("--against", type=Path, metavar="CHECKOUT", help="another checkout of this project")
    parser.add_argument("--first-only", action="store_true", help="leave out the second and third ingest")
    parser.add_argument(MEASURE, metavar="FOLDER", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.measure:
        measure(chosen.measure, chosen.videos)
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
            for number, what in enumerate(TIMES[:1] if chosen.first_only else TIMES):
                videos = chosen.videos + (number == 2)
                rows.setdefault(what, []).append(measured(checkout, folder, videos))
    names = "".join(f" {name}: MB | MB per million videos | CPU seconds |" for name in checkouts)
    print(f"| {chosen.videos:,} videos |{names} MB, there to here |")
    print("|---|" + "---|" * (3 * len(checkouts) + 1))
    for what, found in rows.items():
        cells = "".join(f" {mb} | {mb / chosen.videos * 1e6:,.0f} | {s:.1f} |" for mb, s in found)
        print(f"| {what} |{cells} {found[-1][0] / max(1, found[0][0]):.1f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
