"""Is frame i the i-th picture? Every kind of video file, in ours and in other readers. Prints two tables.

    python benchmarks/exact_frames.py [--count 111 | --all] [--seed 0] [--lerobot PYTHON] [--without-s3]

The files are those of tests/data/barcode_specs.py, each of whose pictures carries its number, and the truth is what
FFmpeg decodes from the first packet to the last. Ours: ingest, plan and decoder processes, from disk and from S3 (moto
in a process of its own), as tests/data/frame_checks.py asks. decord and LeRobot: single frames in shuffled order, pairs
and clips, then every frame in one call. `ray.data.read_videos` has no access by number, so every frame it yields.

`--lerobot` is the Python of an environment with `lerobot` and `torchcodec`, which this project does not install; where
it finds no FFmpeg libraries, LD_LIBRARY_PATH has to name them. Exit code 1 where a frame of ours is wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import logging
import os
import platform
import random
import re
import selectors
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests" / "data"))
from barcode_specs import EDITS, UPRIGHT, Spec, all_specs, covering, extra_specs
from barcodes import number_of
from frame_checks import FILES_PER_INGEST, Written, check_files, write_all
from s3_server import s3_server

from defi_platform import storage

OURS, ON_S3, DECORD, RAY, LEROBOT = "ours", "ours from S3", "decord", "read_videos", "LeRobot"
READERS = (OURS, ON_S3, DECORD, RAY, LEROBOT)
PEER = Path(__file__).parent / "videos" / "frame_peers.py"
PATIENCE_S = 60
"""After which a peer that does not answer for a file counts as hanging."""


@dataclass
class Tally:
    """What one reader gave for some files."""

    asked: int = 0
    """Frames."""
    wrong: int = 0
    missing: int = 0
    """Frames that it gave an error for, or not at all."""
    files: int = 0
    refused: int = 0
    """Files with a missing frame."""
    examples: list[str] = field(default_factory=list)

    def __add__(self, other: Tally) -> Tally:
        """Both together."""
        both = zip(self.__dict__.values(), other.__dict__.values(), strict=True)
        return Tally(*(mine + theirs for mine, theirs in both))

    def cell(self) -> str:
        """For the table."""
        if not self.files:
            return "not run"
        missing = f", {self.missing:,} not given" if self.missing else ""
        return f"{self.wrong:,} of {self.asked:,}{missing}"


Tallies = dict[str, Tally]
"""Reader -> tally."""


# --------------------------------------------------------------------------- readers


class Peer:
    """A reader in a process of its own, started again after a crash.

    Args:
        python: that has it.
        reader: its name in frame_peers.py.
    """

    def __init__(self, python: str, reader: str) -> None:
        self._command = [python, str(PEER), reader]
        self._process: subprocess.Popen[str] | None = None

    def ask(self, file: Written, jobs: Sequence[Sequence[int]]) -> list[Any]:
        """One answer per job: numbers, or an error as a text."""
        if self._process is None:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
        process = self._process
        assert process.stdin and process.stdout
        line = json.dumps({"path": str(file.path), "jobs": jobs, "times": file.truth.times})
        with selectors.DefaultSelector() as selector, contextlib.suppress(BrokenPipeError, ValueError):
            selector.register(process.stdout, selectors.EVENT_READ)
            print(line, file=process.stdin, flush=True)
            if selector.select(PATIENCE_S):
                return list(json.loads(process.stdout.readline()))
        self.close()
        return ["crashed or hung"] * len(jobs)

    def close(self) -> None:
        """Ends the process."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def version(self, package: str) -> str:
        """Of a package there; empty where it or the reader cannot be imported."""
        module = {"lerobot": "torchcodec.decoders"}.get(package, package)
        code = f"import importlib.metadata, {module}; print(importlib.metadata.version({package!r}))"
        found = subprocess.run([self._command[0], "-c", code], capture_output=True, text=True, check=False)
        return found.stdout.strip() if found.returncode == 0 else ""


def jobs_for(file: Written, seed: int) -> list[list[int]]:
    """Frame numbers that a peer is asked for: single ones shuffled, pairs, a clip, and all of them."""
    draw, count = random.Random(seed), len(file.truth.numbers)
    singles = [[index] for index in draw.sample(range(count), min(12, count))]
    pairs = [sorted(draw.sample(range(count), 2)) for _ in range(4)]
    clip = sorted(draw.sample(range(count), min(6, count)))
    return [*singles, *pairs, clip, list(range(count))]


def tally_of(file: Written, jobs: Sequence[Sequence[int]], answers: Sequence[Any]) -> Tally:
    """Compares a reader's answers with the truth."""
    tally = Tally(files=1)
    for job, answer in zip(jobs, answers, strict=True):
        given = answer if isinstance(answer, list) else []
        tally.asked += len(job)
        tally.missing += len(job) - len(given)
        for index, number in zip(job, given, strict=False):
            right = file.truth.numbers[index]
            if right >= 0 and number != right:
                tally.wrong += 1
                tally.examples.append(f"{file.spec}: asked {right}, got {number}")
        if isinstance(answer, str):
            tally.examples.append(f"{file.spec}: {answer}")
    tally.refused = int(tally.missing > 0)
    return tally


def ours(files: Sequence[Written], corpus: str, manifest: Path, seed: int) -> list[Tally]:
    """This engine, by `check_files`."""
    found = []
    with contextlib.redirect_stdout(sys.stderr):
        reports = check_files(files, corpus, manifest, seed)
    for report in reports:
        tally = Tally(report.checked, report.wrong_frames, report.missing, files=1)
        tally.refused = int(bool(report.refused))
        if not report.right:
            tally.examples.append(str(report))
        found.append(tally)
    return found


def ray_read_videos(files: Sequence[Written]) -> list[Tally]:
    """`ray.data.read_videos`: every frame in turn. A file that it cannot read is left out, as Ray can be asked to."""
    import ray.data

    names: dict[str, dict[int, int]] = {file.path.name: {} for file in files}
    dataset = ray.data.read_videos(
        [str(file.path) for file in files], include_paths=True, override_num_blocks=len(files)
    )
    for row in dataset.iter_rows():
        names[Path(row["path"]).name][row["frame_index"]] = number_of(row["frame"])
    found = []
    for file in files:
        numbers = names[file.path.name]
        every = list(range(len(file.truth.numbers)))
        got = [[numbers[index]] if index in numbers else "not given" for index in every]
        found.append(tally_of(file, [[index] for index in every], got))
    return found


def started() -> None:
    """A small quiet Ray on this machine that leaves out what it cannot read."""
    import ray

    ray.init(
        address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR
    )
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.max_errored_blocks = -1
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)


# --------------------------------------------------------------------------- the run


def chosen(count: int | None, every: bool, seed: int) -> list[Spec]:
    """The kinds of file: a covering selection and what is beside the matrix, then others at random."""
    matrix = all_specs()
    first = covering(matrix) + extra_specs()
    taken = set(first)
    rest = [spec for spec in matrix if spec not in taken]
    random.Random(seed).shuffle(rest)
    number = len(matrix) + len(first) if every else count or len(first)
    return [*first, *rest][:number]


def run(
    specs: Sequence[Spec], readers: dict[str, Callable[[Sequence[Written], Path], list[Tally]]]
) -> Iterator[tuple[Spec, Tallies]]:
    """Asks every reader for the frames of every file.

    Args:
        specs: kinds of file.
        readers: name -> function of files and an empty folder, one tally per file.
    """
    for start in range(0, len(specs), FILES_PER_INGEST):
        with tempfile.TemporaryDirectory() as folder:
            files = write_all(specs[start : start + FILES_PER_INGEST], Path(folder) / "files")
            found = {name: read(files, Path(folder) / name) for name, read in readers.items()}
        print(f"{start + len(files)} of {len(specs)} files", file=sys.stderr, flush=True)
        for number, file in enumerate(files):
            yield file.spec, {name: tallies[number] for name, tallies in found.items()}


@contextlib.contextmanager
def bucket() -> Iterator[str]:
    """A bucket of a moto server, as s3://name."""
    secrets = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "AWS_DEFAULT_REGION": "us-east-1"}
    with s3_server() as endpoint:
        os.environ.update(secrets, AWS_ENDPOINT_URL=endpoint)
        import s3fs

        s3fs.S3FileSystem(endpoint_url=endpoint).mkdir("bench")
        yield "s3://bench"


TIMINGS = {
    "constant": "",
    "mild": "times a tenth of a frame off",
    "jumps": "pauses of 3 s",
    "halves": "half at 25, half at 17.5 fps",
    "held": "last picture held for 4 s",
    "twins": "every two pictures of one time",
    "fast": "240 or 1/20 fps",
    "slow": "240 or 1/20 fps",
}
STARTS = {
    "zero": "",
    "late": "begins at 5 s",
    "trim": "edit list hides the first 13",
    "cut": "begins between key frames",
    "wrap": "MPEG's clock runs over",
    "again": "the whole file twice in one",
    **dict.fromkeys(EDITS, "edit list of other parts"),
}
REFRESHES = {"closed": "", "open": "open groups of pictures", "intra": "intra refresh"}


def kinds(spec: Spec) -> list[str]:
    """Rows of the second table that a file counts in."""
    found = [
        f"width {spec.width}",
        f"key frame every {spec.gop}" if spec.gop > 1 else "key frames only",
        "B-frames" if spec.b_frames else "",
        REFRESHES[spec.refresh],
        TIMINGS[spec.timing],
        STARTS[spec.start],
        "turned or mirrored" if spec.matrix != UPRIGHT else "",
        "other pixel formats" if spec.pixels != "yuv420p" else "",
        "interlaced" if spec.interlaced else "",
        "many pictures alike" if spec.still > 1 else "",
        "sound or a cover beside" if spec.sound or spec.cover else "",
    ]
    return [name for name in found if name]


def summed(results: Iterable[tuple[Iterable[str], Tallies]]) -> dict[str, Tallies]:
    """Row -> reader -> tally."""
    rows: dict[str, Tallies] = {}
    for names, tallies in results:
        for name in names:
            row = rows.setdefault(name, {})
            for reader, tally in tallies.items():
                row[reader] = row.get(reader, Tally()) + tally
    return rows


def print_table(title: str, rows: dict[str, Tallies], readers: Sequence[str], absent: dict[str, str]) -> None:
    """Wrong frames of each reader, a row per kind.

    Args:
        title: of the first column.
        rows: from `summed`.
        readers: columns.
        absent: reader -> why it has none.
    """
    print(f"\n| {title} | files | {' | '.join(readers)} |")
    print("|" + "---|" * (len(readers) + 2))
    for name, tallies in sorted(rows.items(), key=lambda row: (row[0] == "all", _numbers_apart(row[0]))):
        cells = [tallies[r].cell() if r in tallies else absent.get(r, "not run") for r in readers]
        print(f"| {name} | {tallies[OURS].files} | {' | '.join(cells)} |")


def _numbers_apart(name: str) -> str:
    """A name to sort by, in which 64 comes before 160."""
    return re.sub("[0-9]+", lambda digits: digits[0].zfill(4), name)


def main() -> int:
    """Runs it. Returns: exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, help="files; without it the covering selection and the extras")
    parser.add_argument("--all", action="store_true", help="the whole matrix: thousands of files, hours")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lerobot", default="", help="Python of an environment with lerobot and torchcodec")
    parser.add_argument("--without-s3", action="store_true")
    arguments = parser.parse_args()
    specs, seed = chosen(arguments.count, arguments.all, arguments.seed), arguments.seed
    rows = {spec: kinds(spec) for spec in specs}
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("av", "decord", "ray")]
    absent: dict[str, str] = {}
    readers: dict[str, Callable[[Sequence[Written], Path], list[Tally]]] = {
        OURS: lambda files, folder: ours(files, str(files[0].path.parent), folder, seed)
    }
    with contextlib.ExitStack() as stack:
        if not arguments.without_s3:
            store = stack.enter_context(bucket())

            def from_s3(files: Sequence[Written], folder: Path) -> list[Tally]:
                corpus = f"{store}/{folder.parent.name}"
                for file in files:
                    storage.write_bytes(f"{corpus}/{file.path.name}", file.path.read_bytes())
                return ours(files, corpus, folder, seed)

            readers[ON_S3] = from_s3
        for name, python, package in (
            (DECORD, sys.executable, "decord"),
            (LEROBOT, arguments.lerobot, "lerobot"),
        ):
            peer = Peer(python, package)
            if not python or not (version := peer.version(package)):
                absent[name] = "not installed"
                continue
            if name == LEROBOT:
                versions += [f"lerobot {version}", f"torchcodec {peer.version('torchcodec')}"]
            stack.callback(peer.close)
            readers[name] = by_peer(peer, seed, takes_seconds=name == LEROBOT)
        started()
        readers[RAY] = lambda files, folder: ray_read_videos(files)
        results: list[tuple[Spec, Tallies]] = []
        # Ctrl-C ends a long run with the tables of what has been read.
        with contextlib.suppress(KeyboardInterrupt):
            results.extend(run(specs, readers))
    print(f"Python {platform.python_version()}, {', '.join(versions)}; {len(results)} files, seed {seed}.")
    print("A cell is the number of wrong frames of those asked for, and how many were refused with an error.")
    by_file = [((f"{s.codec} in {s.container}", "all"), tallies) for s, tallies in results]
    print_table("codec and container", summed(by_file), READERS, absent)
    print_table("files with", summed((rows[s], tallies) for s, tallies in results), READERS, absent)
    failed = [
        line for _, tallies in results for r in (OURS, ON_S3) if r in tallies for line in tallies[r].examples
    ]
    for line in failed:
        print(line, file=sys.stderr)
    return 1 if failed else 0


def by_peer(peer: Peer, seed: int, takes_seconds: bool) -> Callable[[Sequence[Written], Path], list[Tally]]:
    """The reader that asks a peer, file by file."""

    def read(files: Sequence[Written], folder: Path) -> list[Tally]:
        found = []
        for file in files:
            jobs = jobs_for(file, seed)
            # A file cut off at its start may have no times, and then those who take seconds cannot be asked.
            asked = file.truth.times or not takes_seconds
            found.append(tally_of(file, jobs, peer.ask(file, jobs)) if asked else Tally())
        return found

    return read


if __name__ == "__main__":
    sys.exit(main())
