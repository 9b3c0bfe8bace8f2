"""Frame i of a video is the i-th picture that a sequential decode shows, for every kind of file, size and order.

The selection here has every pair of codec, container, groups of pictures, times and sizes; all of them, and the peers
beside, are in benchmarks/exact_frames.py.
"""

from __future__ import annotations

import os
import struct
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path

import boto3
import corpora
import numpy as np
import pytest
from barcode_specs import CONTAINERS, RATE, REORDERING, Spec, all_specs, covering, extra_specs, is_legal
from barcodes import Truth, number_of, write
from corpora import write_lerobot
from frame_checks import Report, check_files, check_specs, mistaken, write_all
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from s3_server import s3_server

from defi_platform import storage
from defi_platform.config import CorpusConfig, DataConfig, WindowConfig
from defi_platform.data.decode.pool import DecoderPool
from defi_platform.data.ingest.pipeline import ingest
from defi_platform.data.loader.sample_decoder import SampleDecoder, decode_job
from defi_platform.data.sampling.plan import Plan
from defi_platform.data.sampling.samplers import ChunkRule

EXAMPLES = int(os.environ.get("EXACT_FRAMES_EXAMPLES", "0"))
"""Random draws: a few fixed ones unless this says how many fresh ones."""

ON_S3 = [
    Spec(gop=2, b_frames=2),
    Spec(codec="hevc", gop=2, b_frames=2, refresh="open"),
    Spec(container="avi", b_frames=2),
    Spec(container="fmp4", b_frames=2, timing="jumps"),
    Spec(container="ts", b_frames=2, start="late", width=64),
    Spec(start="trim", b_frames=2, timing="held"),
    Spec(codec="mpeg2", container="mpg", b_frames=2, refresh="open"),
    Spec(codec="mpeg4", container="mkv", b_frames=2, start="late"),
    Spec(codec="vp9", container="webm", timing="halves"),
    Spec(codec="av1", container="flv", b_frames=2),
    Spec(codec="wmv2", container="wmv"),
]
ON_S3_LARGE = [
    Spec(codec="hevc", gop=12, b_frames=2, refresh="open"),
    Spec(refresh="intra", start="trim"),
    Spec(codec="mpeg4", gop=250, frames=60),
]
PADDING = 17 << 20
"""Bytes: larger files than these are read by range."""


def wrong(reports: Iterable[Report]) -> list[str]:
    """What was not right, a line per file."""
    reports = list(reports)
    assert all(report.checked or report.refused for report in reports)
    return [str(report) for report in reports if not report.right]


def test_every_kind_of_file_gives_the_frames_that_are_asked_for(tmp_path: Path) -> None:
    assert wrong(check_specs(covering(all_specs()), tmp_path)) == []


def test_turned_mirrored_cut_and_deep_pictures_come_out_right_and_a_cover_is_no_video(tmp_path: Path) -> None:
    assert wrong(check_specs(extra_specs(), tmp_path)) == []


@st.composite
def specs(draw: st.DrawFn) -> Spec:
    """A legal kind of file, also with values that the matrix has not."""
    container = draw(st.sampled_from(sorted(CONTAINERS)))
    codec = draw(st.sampled_from(sorted(CONTAINERS[container])))
    gop = 1 if codec == "mjpeg" else draw(st.integers(1, 40))
    b_frames = draw(st.integers(0, 4)) if codec in REORDERING and gop > 1 else 0
    made = Spec(
        codec=codec,
        container=container,
        gop=gop,
        b_frames=b_frames,
        refresh=draw(st.sampled_from(["closed", "open", "intra"])),
        timing=draw(st.sampled_from(["constant", "mild", "jumps", "halves", "held"])),
        start=draw(st.sampled_from(["zero", "late", "trim"])),
        width=8 * draw(st.integers(8, 40)),
        frames=draw(st.integers(30, 70)),
    )
    # What this file cannot have is left out, so that nothing that is drawn is thrown away.
    for plain in ({}, {"start": "zero"}, {"timing": "constant"}, {"refresh": "closed"}):
        made = Spec(**{**made.__dict__, **plain}) if not is_legal(made) else made
    assert is_legal(made)
    return made


@settings(
    max_examples=EXAMPLES or 6,
    derandomize=not EXAMPLES,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
@given(drawn=st.lists(specs(), min_size=2, max_size=4, unique=True), seed=st.integers(0, 1 << 16))
def test_files_drawn_at_random_give_the_frames_that_are_asked_for(
    tmp_path_factory: pytest.TempPathFactory, drawn: list[Spec], seed: int
) -> None:
    found = wrong(check_specs(drawn, tmp_path_factory.mktemp("drawn"), seed=seed))
    assert found == [], (
        "fresh draws: EXACT_FRAMES_EXAMPLES=500 pytest tests/data/test_exact_frames.py -k random"
    )


CUT_IN_WINDOWS = [
    Spec(codec="hevc", b_frames=2, refresh="open", width=64),
    Spec(codec="mpeg4", container="avi", b_frames=2, width=64),
    Spec(container="ts", refresh="intra", timing="jumps", width=64),
    Spec(b_frames=2, start="trim", timing="halves", width=64),
    Spec(codec="av1", container="webm", b_frames=2, width=64),
]


def test_windows_have_the_frames_and_times_of_their_part_of_the_file(tmp_path: Path) -> None:
    files = {file.path.name: file for file in write_all(CUT_IN_WINDOWS, tmp_path / "files")}
    windows = WindowConfig(mode="stride", length_s=0.5, stride_s=0.3, shortest_s=0.1)
    corpus = CorpusConfig(path=str(tmp_path / "files"), windows=windows)
    data = DataConfig(corpora={"c": corpus}, manifest=str(tmp_path / "m"), holdout=0.0, height=48, width=64)
    manifest = ingest(data)
    rows = manifest.table.to_pylist()
    assert len(rows) > 3 * len(files)
    jobs = [decode_job(manifest, data, i, range(row["num_frames"])[::-1]) for i, row in enumerate(rows)]
    with DecoderPool(data.decode) as pool:
        for row, frames in zip(rows, pool.run(jobs), strict=True):
            truth = files[Path(row["uri"]).name].truth
            part = slice(row["first_frame"], row["first_frame"] + row["num_frames"])
            assert isinstance(frames, np.ndarray), row["video_id"]
            assert [number_of(frame) for frame in frames[::-1]] == truth.numbers[part]
            times = [time - truth.times[part][0] for time in truth.times[part]]
            assert mistaken(row, Truth(truth.numbers[part], times, truth.shape)) == []


# --------------------------------------------------------------------------- S3


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """An empty bucket as s3://name; the environment points at its server."""
    keys = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "AWS_DEFAULT_REGION": "us-east-1"}
    with s3_server() as endpoint, pytest.MonkeyPatch.context() as patch:
        for name, value in (keys | {"AWS_ENDPOINT_URL": endpoint}).items():
            patch.setenv(name, value)
        storage.forget_connections()
        name = f"b-{uuid.uuid4().hex[:8]}"
        boto3.client("s3", endpoint_url=endpoint).create_bucket(Bucket=name)
        yield f"s3://{name}"
        storage.forget_connections()


def test_files_on_s3_give_the_same_frames(tmp_path: Path, bucket: str) -> None:
    assert all(map(is_legal, ON_S3))
    assert wrong(check_specs(ON_S3, tmp_path, f"{bucket}/small")) == []


def test_files_on_s3_that_are_read_by_range_give_the_same_frames(tmp_path: Path, bucket: str) -> None:
    files = write_all(ON_S3_LARGE, tmp_path / "files")
    for file in files:
        # A box of an mp4 that every reader skips.
        padded = file.path.read_bytes() + struct.pack(">I4s", PADDING, b"free") + bytes(PADDING - 8)
        storage.write_bytes(f"{bucket}/large/{file.path.name}", padded)
    assert wrong(check_files(files, f"{bucket}/large", tmp_path / "manifest")) == []


# --------------------------------------------------------------------------- with actions


@pytest.mark.parametrize(
    "spec",
    [
        Spec(codec="hevc", gop=2, b_frames=2, refresh="open", frames=60),
        Spec(codec="av1", gop=2, b_frames=2, frames=60),
        Spec(gop=250, b_frames=2, frames=60),
    ],
    ids=str,
)
def test_a_frame_of_a_robot_is_the_one_of_its_action(
    spec: Spec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths = [23, 17, 20]
    monkeypatch.setattr(corpora, "FPS", RATE)
    root = write_lerobot(tmp_path / "robot", lengths)
    write(spec, root / "videos" / "observation.images.front" / "chunk-000" / "file-000.mp4")
    data = DataConfig(
        corpora={"robot": CorpusConfig(path=str(root))},
        manifest=str(tmp_path / "m"),
        holdout=0.0,
        height=spec.height,
        width=spec.width,
    )
    decoder = SampleDecoder(Plan.of(ingest(data), data, ChunkRule(chunk=4), seed=0), data)
    try:
        batch = decoder({"start": np.array([0]), "stop": np.array([sum(lengths)])})
    finally:
        decoder.close()
    starts = np.cumsum([0, *lengths])
    for images, (t, episode) in zip(batch["images"], batch["proprio"].astype(int), strict=True):
        assert number_of(images[0]) == starts[episode] + t
