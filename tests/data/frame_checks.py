"""Does the engine give the frames that were asked for? Its ingest and decoder processes on files of `barcodes`.

Every file is asked for in jobs of many kinds, shuffled among those of the other files: one frame after the other, all
at once, single frames as action chunks take them, pairs and clips out of a plan, and frames asked for twice; smaller
than the file's pictures, as large, and larger.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from barcode_specs import Spec
from barcodes import Truth, number_of, truth, write

from defi_platform import storage
from defi_platform.config import CorpusConfig, DataConfig, DecodeConfig, SamplingConfig
from defi_platform.data.decode.messages import DecodeJob
from defi_platform.data.decode.pool import DecoderPool
from defi_platform.data.ingest.pipeline import ingest
from defi_platform.data.loader.sample_decoder import decode_job
from defi_platform.data.manifest.quarantine import read_quarantine
from defi_platform.data.manifest.table import Manifest
from defi_platform.data.sampling.plan import Plan
from defi_platform.data.sampling.samplers import ClipRule, PairRule
from defi_platform.errors import CorpusError

FILES_PER_INGEST = 16
"""So few are opened without Ray."""
SMALL = (32, 32)
CLIP = 6
PAIR_S = 0.4


@dataclass
class Report:
    """What came of one file."""

    spec: Spec
    checked: int = 0
    """Frames asked for."""
    wrong: list[str] = field(default_factory=list)
    """What was asked for and given instead, for each frame or job that was not right."""
    wrong_frames: int = 0
    missing: int = 0
    """Frames that were refused."""
    refused: str = ""
    """Why the ingest or a decoder refused the file; empty where none did."""
    mistaken: list[str] = field(default_factory=list)
    """What the manifest says of the file and is not so."""

    @property
    def right(self) -> bool:
        """Every frame was the one asked for, and what the manifest says is so."""
        return not (self.wrong or self.refused or self.mistaken)

    def __str__(self) -> str:
        """One line for people."""
        found = (
            [f"{self.wrong_frames} of {self.checked} frames wrong: {', '.join(self.wrong[:4])}"]
            if self.wrong
            else []
        )
        found += [f"refused: {self.refused}"] if self.refused else []
        return f"{self.spec}: {'; '.join(found + self.mistaken) or 'right'}"


@dataclass
class Written:
    """A file of a kind, and the truth about it."""

    spec: Spec
    path: Path
    truth: Truth


def write_all(specs: Sequence[Spec], folder: Path) -> list[Written]:
    """Writes a file per spec into a folder, and finds out the truth about each."""
    files = []
    for spec in specs:
        path = folder / f"{spec}{spec.suffix}"
        write(spec, path)
        found = truth(spec, path)
        if spec.start in ("zero", "late", "trim", "wrap"):
            # After an intra refresh FFmpeg shows nothing before a whole round of it.
            late = (spec.refresh, spec.start) == ("intra", "trim")
            first = spec.frames - len(found.numbers) if late else spec.hidden
            expected = [spec.number(k) for k in range(first, spec.frames)]
            assert found.numbers == expected, f"{spec} was not written as it should be"
        files.append(Written(spec, path, found))
    return files


def check_specs(specs: Sequence[Spec], scratch: Path, bucket: str = "", seed: int = 0) -> Iterator[Report]:
    """Writes files, ingests them and compares every frame that is decoded with the truth.

    Args:
        specs: the kinds of file.
        scratch: an empty folder for files and manifests.
        bucket: `s3://` folder to read the files from; empty: from the disk.
        seed: of the order of the jobs and of what is drawn.
    """
    for start in range(0, len(specs), FILES_PER_INGEST):
        folder = scratch / f"files{start}"
        files = write_all(specs[start : start + FILES_PER_INGEST], folder)
        corpus = str(folder)
        if bucket:
            corpus = f"{bucket}/files{start}"
            for file in files:
                storage.write_bytes(f"{corpus}/{file.path.name}", file.path.read_bytes())
        yield from check_files(files, corpus, scratch / f"manifest{start}", seed)


def check_files(files: Sequence[Written], corpus: str, manifest_folder: Path, seed: int = 0) -> list[Report]:
    """Ingests a folder of files and compares every frame that is decoded with the truth.

    Args:
        files: all that the folder holds, at most `FILES_PER_INGEST`.
        corpus: the folder, on disk or S3.
        manifest_folder: empty.
        seed: of the order of the jobs and of what is drawn.
    """
    reports = {file.path.name: Report(file.spec) for file in files}
    truths = {file.path.name: file.truth for file in files}
    data = DataConfig(
        corpora={"c": CorpusConfig(path=corpus, sampling=SamplingConfig(unit="videos"))},
        manifest=str(manifest_folder),
        holdout=0.0,
        height=SMALL[0],
        width=SMALL[1],
        pair_interval_s=PAIR_S,
        clip_frames=CLIP,
        decode=DecodeConfig(processes=1),
    )
    try:
        manifest = ingest(data)
    except CorpusError as error:
        # Every file of it was refused.
        manifest = None
        for report in reports.values():
            report.refused = str(error)
    for row in read_quarantine(data.manifest).to_pylist():
        reports[row["video_id"]].refused = f"{row['reason']}: {row['message']}"
    for name, report in reports.items():
        if report.refused:
            report.checked = report.missing = len(truths[name].numbers)
    if manifest is None:
        return list(reports.values())
    rows = manifest.table.to_pylist()
    for row in rows:
        reports[row["video_id"]].mistaken += mistaken(row, truths[row["video_id"]])
    jobs = _jobs(manifest, data, rows, truths, random.Random(seed))
    with DecoderPool(data.decode) as pool:
        for (name, asked, job), answer in zip(jobs, pool.run([job for *_, job in jobs]), strict=True):
            _compare(reports[name], truths[name], asked, job, answer)
    return list(reports.values())


def mistaken(row: dict[str, Any], of: Truth) -> list[str]:
    """What a manifest row says of its file and is not so."""
    found = []
    if row["num_frames"] != len(of.numbers):
        found.append(f"{row['num_frames']} frames in the manifest, {len(of.numbers)} decode")
    if (row["height"], row["width"]) != of.shape:
        found.append(
            f"{row['height']}x{row['width']} in the manifest, pictures are {of.shape[0]}x{of.shape[1]}"
        )
    if not of.times:
        return found
    # Whoever takes a frame by its time must get the nearest one: half a frame is the most that may be wrong.
    count = min(row["num_frames"], len(of.times))
    said = np.asarray(row["times"] if row["variable_rate"] else np.arange(count) / row["fps"])[:count]
    error = float(np.abs(said - np.asarray(of.times)[:count]).max())
    if error > 0.5 * float(np.median(np.diff(of.times))) + 1e-3:
        kind = "variable" if row["variable_rate"] else "steady"
        found.append(f"times ({kind}, {row['fps']:.2f} fps) are off by up to {error:.3f} s")
    return found


def _jobs(
    manifest: Manifest,
    data: DataConfig,
    rows: Sequence[dict[str, Any]],
    truths: dict[str, Truth],
    draw: random.Random,
) -> list[tuple[str, tuple[int, ...], DecodeJob]]:
    """(file, frame numbers, job) of everything that is asked for, shuffled."""
    wanted: list[tuple[int, Sequence[int], tuple[int, int]]] = []
    for index, row in enumerate(rows):
        count = min(row["num_frames"], len(truths[row["video_id"]].numbers))
        height, width = truths[row["video_id"]].shape
        larger = (height * 5 // 4, width * 5 // 4)
        every = range(count)
        wanted.append((index, every, SMALL))
        wanted += [(index, [i], (height, width)) for i in draw.sample(every, min(6, count))]
        twice = draw.choices(every, k=3)
        wanted.append((index, [*twice, twice[0], count - 1, twice[1], 0], (height, width)))
        wanted.append((index, sorted(draw.sample(every, min(CLIP, count))), larger))
        # Neighbours, in turn forwards and backwards: around every key frame of short groups.
        first = draw.randrange(max(1, count - 8))
        wanted.append((index, list(range(first, min(count, first + 8)))[::-1], SMALL))
    for rule, size in ((ClipRule(CLIP), None), (PairRule(PAIR_S), SMALL), (PairRule(PAIR_S), SMALL)):
        plan = Plan.of(manifest, data, rule, seed=draw.randrange(1 << 16))
        for sample in plan.resolve_many(np.arange(plan.num_videos)):
            shape = truths[rows[sample.row]["video_id"]].shape
            wanted.append((sample.row, sample.indices, size or shape))
    draw.shuffle(wanted)
    # In order and one at a time, through a decoder that stays open.
    for index, row in enumerate(rows):
        count = min(row["num_frames"], len(truths[row["video_id"]].numbers), 24)
        wanted += [(index, [i], SMALL) for i in range(count)]
    found = []
    for index, asked, (height, width) in wanted:
        sized = dataclasses.replace(data, height=height, width=width)
        found.append((rows[index]["video_id"], tuple(asked), decode_job(manifest, sized, index, asked)))
    return found


def _compare(report: Report, of: Truth, asked: Sequence[int], job: DecodeJob, answer: Any) -> None:
    report.checked += len(asked)
    if not isinstance(answer, np.ndarray):
        report.missing += len(asked)
        report.refused = report.refused or f"{list(asked)[:8]} at {job.height}x{job.width}: {answer}"
        return
    for index, frame in zip(asked, answer, strict=True):
        number = number_of(frame)
        # A picture without number was cut off from its references.
        if number != of.numbers[index] and of.numbers[index] >= 0:
            report.wrong_frames += 1
            report.wrong.append(f"asked {of.numbers[index]}, got {number} ({job.height}x{job.width})")
