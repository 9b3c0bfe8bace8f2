"""Frames by their number where files are damaged, put together or not what their index says; times; limits."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import pytest
from corpora import numbers_of, picture, write_video
from hypothesis import given, settings
from hypothesis import strategies as st

from defi_platform.config import CorpusConfig, DataConfig, DecodeConfig
from defi_platform.data.decode.frame_times import frame_times, is_variable, mean_rate
from defi_platform.data.decode.messages import Probe
from defi_platform.data.decode.probe import probe
from defi_platform.data.decode.seek_index import NO_PTS, UNINDEXED, SeekIndex, SeekPoint, table_of
from defi_platform.data.decode.video_readers import (
    BYTES_PER_PIXEL,
    VideoReader,
    decoded,
    open_container,
    orientation,
)
from defi_platform.data.ingest.pipeline import ingest
from defi_platform.data.ingest.probe_results import limit_of
from defi_platform.data.manifest.quarantine import read_quarantine
from defi_platform.data.rejection import BadVideo


def probed(path: Path) -> Probe:
    return probe(str(path), 1 << 31, score_frames=False, report=lambda _: None)


def sequential(path: Path) -> list[np.ndarray]:
    """All pictures as FFmpeg gives them from the first to the last."""
    container, stream = open_container(str(path))
    with container:
        return [frame.to_ndarray(format="rgb24", threads=1) for frame in decoded(container, stream)]


def encode(
    path: Path, numbers: Sequence[int], codec: str = "libx264", size: int = 64, **options: str
) -> None:
    path.parent.mkdir(exist_ok=True)
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(codec, rate=25)
        stream.width = stream.height = size
        stream.pix_fmt, stream.options = "yuv420p", options
        for number in numbers:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture(number, size), format="rgb24")))
        container.mux(stream.encode())


def assert_frames_are_those_of_sequential_decoding(path: Path) -> SeekIndex:
    """Asks for frames in a random order, again and again, with the index of the probe."""
    truth, found = sequential(path), probed(path)
    index = SeekIndex.from_bytes(found.seek_index)
    assert found.num_frames == len(truth)
    reader = VideoReader(str(path), index)
    order = random.Random(0).choices(range(len(truth)), k=60)
    wrong = [n for n in [*order, len(truth) - 1, 0] if not np.array_equal(reader.picture(n), truth[n])]
    assert not wrong, (wrong, index.points.tolist())
    reader.close()
    return index


# --------------------------------------------------------------------------- the index

POINTS = st.lists(
    st.builds(
        SeekPoint,
        st.integers(0, 1 << 40),
        st.integers(-(1 << 62), 1 << 62),
        st.one_of(st.just(NO_PTS), st.integers(-(1 << 61), 1 << 61)),
        st.integers(0, 20),
        st.integers(0, 1 << 40),
        st.integers(0, (1 << 32) - 1),
    ),
    max_size=20,
)


@settings(max_examples=30, deadline=None)
@given(POINTS, st.sampled_from(["dts", "pts", "pos"]), st.integers(0, 7))
def test_a_seek_index_is_packed_without_loss(points: list[SeekPoint], by: str, turn: int) -> None:
    index = SeekIndex("matroska", (480, 640), turn, by, table_of(points))
    unpacked = SeekIndex.from_bytes(index.to_bytes())
    assert np.array_equal(unpacked.points, index.points)
    for field in ("container", "shape", "orientation", "by"):
        assert getattr(unpacked, field) == getattr(index, field)


def test_a_row_keeps_the_points_that_its_own_frames_need(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", range(100))
    index = SeekIndex.from_bytes(probed(tmp_path / "a.mp4").seek_index)
    part = index.part(30, 11)
    assert index.points[:, 0].tolist() == list(range(0, 100, 4))
    assert part.points[:, 0].tolist() == [24, 28, 32, 36, 40]
    reader = VideoReader(str(tmp_path / "a.mp4"), SeekIndex.from_bytes(part.to_bytes()))
    assert numbers_of(np.stack([reader.picture(n) for n in (40, 30, 35, 31, 2)])) == [40, 30, 35, 31, 2]


def test_an_index_that_does_not_fit_the_file_is_not_trusted(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", range(60))
    write_video(tmp_path / "b.mp4", range(100, 160))
    index = SeekIndex.from_bytes(probed(tmp_path / "a.mp4").seek_index)
    shifted = index.points.copy()
    shifted[:, 1] += 4 * (index.points[1, 1] - index.points[0, 1])
    for name, wrong, first in (("b", index, 100), ("a", replace(index, points=shifted), 0)):
        reader = VideoReader(str(tmp_path / f"{name}.mp4"), wrong)
        assert numbers_of(np.stack([reader.picture(n) for n in (50, 10, 59, 0)])) == [
            first + n for n in (50, 10, 59, 0)
        ]


def test_a_file_that_was_replaced_by_one_of_another_size_keeps_its_own_aspect(tmp_path: Path) -> None:
    encode(tmp_path / "a.mp4", range(30), g="10")
    index = SeekIndex.from_bytes(probed(tmp_path / "a.mp4").seek_index)
    encode(tmp_path / "a.mp4", range(100, 130), size=96, g="10")
    picture = VideoReader(str(tmp_path / "a.mp4"), index).picture(25)
    assert np.array_equal(picture, sequential(tmp_path / "a.mp4")[25])


def test_without_an_index_a_file_is_decoded_from_its_start(tmp_path: Path) -> None:
    encode(tmp_path / "a.ts", range(40), g="10", bf="2")
    reader = VideoReader(str(tmp_path / "a.ts"), UNINDEXED)
    assert numbers_of(np.stack([reader.picture(n) for n in (39, 3, 3, 20)])) == [39, 3, 3, 20]
    with pytest.raises(BadVideo, match="frame 40 asked, 40 there"):
        reader.picture(40)


# --------------------------------------------------------------------------- odd files


@pytest.mark.parametrize("end", ["mpg", "ts"])
def test_recordings_one_behind_the_other_are_one_video(tmp_path: Path, end: str) -> None:
    # The second has the times, and here the pictures, of the first.
    codec = "mpeg2video" if end == "mpg" else "libx264"
    encode(tmp_path / f"one.{end}", [*[7] * 15, *range(30)], codec, g="12", bf="2")
    both = tmp_path / f"both.{end}"
    both.write_bytes((tmp_path / f"one.{end}").read_bytes() * 2)
    assert_frames_are_those_of_sequential_decoding(both)
    assert probed(both).num_frames == 90 and probed(both).fps == pytest.approx(25, rel=0.01)


@pytest.mark.parametrize(("name", "codec"), [("a.ts", "libx265"), ("a.flv", "libx264"), ("a.webm", "libvpx")])
def test_parts_that_come_twice_in_a_file_are_told_apart(tmp_path: Path, name: str, codec: str) -> None:
    params = {"x265-params": "keyint=12:log-level=none"} if codec == "libx265" else {"g": "12"}
    encode(tmp_path / name, range(80), codec, **params)
    content = (tmp_path / name).read_bytes()
    for number, (stop, start) in enumerate([(0.7, 0.3), (0.8, 0.1), (0.5, 0.45)]):
        stop, start = (round(share * len(content) / 188) * 188 for share in (stop, start))
        odd = tmp_path / f"{number}{name}"
        odd.write_bytes(content[:stop] + content[start:])
        with contextlib.suppress(BadVideo):  # which not every demuxer finds its way through
            assert_frames_are_those_of_sequential_decoding(odd)


def test_damage_that_a_decoder_covers_up_gives_what_sequential_decoding_gives(tmp_path: Path) -> None:
    # What is made up depends on the pictures before, so it is another after a seek.
    rng = random.Random(1)
    covered = 0
    for name in ("a.ts", "a.mp4", "a.avi", "a.flv"):
        encode(tmp_path / name, [n * 3 % 256 for n in range(60)], size=128, g="12", bf="2", crf="5")
        whole = (tmp_path / name).read_bytes()
        for _ in range(3):
            content = bytearray(whole)
            for _ in range(3):
                content[rng.randrange(len(whole) // 3, len(whole))] = rng.randrange(256)
            (tmp_path / name).write_bytes(content)
            try:
                index = assert_frames_are_those_of_sequential_decoding(tmp_path / name)
            except (av.FFmpegError, BadVideo):
                continue  # refused, for what nobody can decode
            covered += bool((index.points[:, 4] > 0).all())
    assert covered >= 3


def test_pictures_of_another_size_are_scaled_to_the_first(tmp_path: Path) -> None:
    encode(tmp_path / "a.ts", range(20), size=64)
    encode(tmp_path / "b.ts", range(20, 40), size=128)
    both = tmp_path / "both.ts"
    both.write_bytes((tmp_path / "a.ts").read_bytes() + (tmp_path / "b.ts").read_bytes())
    reader = VideoReader(str(both), SeekIndex.from_bytes(probed(both).seek_index))
    pictures = [reader.picture(n) for n in (5, 35, 0, 39)]
    assert {p.shape for p in pictures} == {(64, 64, 3)} and numbers_of(np.stack(pictures)) == [5, 35, 0, 39]


def test_a_playlist_under_a_videos_name_opens_no_other_file(tmp_path: Path) -> None:
    encode(tmp_path / "secret.ts", range(10))
    playlist = f"#EXTM3U\n#é\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{tmp_path}/secret.ts\n#EXT-X-ENDLIST\n"
    (tmp_path / "a.mp4").write_text(playlist)
    with pytest.raises(BadVideo) as raised:
        probed(tmp_path / "a.mp4")
    assert raised.value.reason == "unreadable"


@pytest.mark.parametrize(
    ("matrix", "turn"),
    [
        ((1, 0, 0, 1), 0),
        ((-1, 0, 0, 1), 1),
        ((1, 0, 0, -1), 2),
        ((-1, 0, 0, -1), 3),
        ((0, 1, 1, 0), 4),
        ((0, 1, -1, 0), 5),
        ((0, -1, 1, 0), 6),
        ((0, -1, -1, 0), 7),
    ],
)
def test_a_display_matrix_turns_and_mirrors(matrix: tuple[int, int, int, int], turn: int) -> None:
    a, b, c, d = (value << 16 for value in matrix)

    content = np.array([a, b, 0, c, d, 0, 0, 0, 1 << 30], "<i4").tobytes()
    assert orientation(SimpleNamespace(side_data={"DISPLAYMATRIX": content})) == turn


# --------------------------------------------------------------------------- lengths


def test_what_is_cut_short_is_short(tmp_path: Path) -> None:
    for name in ("a.mp4", "a.mkv", "a.avi"):
        encode(tmp_path / name, range(100), size=128)
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content[: len(content) // 2])
        with pytest.raises(BadVideo) as raised:
            probed(tmp_path / name)
        assert raised.value.reason in ("short", "unreadable"), name


@pytest.mark.parametrize(
    ("name", "codec"),
    [("a.mkv", "libx264"), ("a.webm", "libvpx"), ("a.avi", "mpeg4"), ("a.flv", "libx264"), ("a.wmv", "wmv2")],
)
def test_a_file_that_lacks_less_than_a_second_is_short_and_a_whole_one_is_not(
    tmp_path: Path, name: str, codec: str
) -> None:
    encode(tmp_path / name, range(30), codec)
    assert probed(tmp_path / name).num_frames == 30
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: len(content) * 4 // 5])
    with pytest.raises(BadVideo, match="short"):
        probed(tmp_path / name)


@pytest.mark.parametrize("copies", [1, 2, 3])
def test_a_program_stream_of_few_times_is_whole_and_steady(tmp_path: Path, copies: int) -> None:
    path = tmp_path / "a.mpg"
    encode(path, [3] * 120, g="250", bf="2")
    path.write_bytes(path.read_bytes() * copies)
    found = probed(path)
    assert (found.num_frames, found.variable_rate) == (120 * copies, False)
    assert found.fps == pytest.approx(25, rel=0.01)


# --------------------------------------------------------------------------- times

MS = Fraction(1, 1000)


@pytest.mark.parametrize(
    ("ticks", "variable", "fps"),
    [
        ([round(n * 1000 / 240) for n in range(500)], False, 240),  # rounded to milliseconds
        ([round(n * 1000 / 30) for n in range(300)], False, 30),
        ([n * 60_000 for n in range(30)], False, 1 / 60),
        ([5000 + n * 40 for n in range(50)], False, 25),
        (
            [round(n * 1000 / 30) if n < 90 else 3000 + round((n - 90) * 1000 / 21) for n in range(180)],
            True,
            24.7,
        ),
        ([n * 40 + 2000 * (n > 25) for n in range(50)], True, 12.4),  # a pause
        ([n * 40 + 40 * (n > 25) for n in range(50)], True, 24.5),  # one picture missing
        ([n // 2 * 80 for n in range(50)], True, 25.5),  # two pictures at a time
        ([40 * (n ^ 1) for n in range(50)], False, 25),  # neighbours exchanged
        ([n % 50 * 40 for n in range(100)], False, 25),  # the clock begins anew
    ],
)
def test_an_uneven_rate_is_found_by_the_distance_from_an_even_grid(
    ticks: list[int], variable: bool, fps: float
) -> None:
    seconds = frame_times(ticks, ticks, MS, None)
    assert seconds[0] == 0 and (np.diff(seconds) >= 0).all()
    assert is_variable(seconds) == variable
    assert mean_rate(seconds) == pytest.approx(fps, rel=0.01)


def test_times_that_a_container_does_not_give_are_spread_between_those_it_gives() -> None:
    shown = [None, None, 200, None, None, None, 600, None]
    seconds = frame_times(shown, [200, 600], MS, Fraction(10))
    assert seconds == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7])
    # The clock begins anew; and the time of a block of pictures is that of the last before it as well.
    again = [0, *[None] * 49, 2000, *[None] * 24] * 2
    assert frame_times(again, [], MS, Fraction(25)) == pytest.approx(np.arange(150) / 25)
    twice = [0, None, None, 160, 160, None, 240]
    assert frame_times(twice, [], MS, Fraction(25)) == pytest.approx(np.arange(7) / 25)
    assert frame_times([None] * 3, [40, 0, 80], MS, Fraction(1)) == pytest.approx([0, 0.04, 0.08])
    assert frame_times([None] * 3, [0], MS, Fraction(10)) == pytest.approx([0, 0.1, 0.2])


# --------------------------------------------------------------------------- limits


def test_a_raised_limit_opens_again_what_it_refused_and_nothing_else(tmp_path: Path) -> None:
    encode(tmp_path / "v" / "large.mp4", range(2), "mpeg4", size=4096)
    encode(tmp_path / "v" / "small.mp4", range(10))

    def ingested(memory_mb: int) -> tuple[set[str], dict[str, str]]:
        limits = DecodeConfig(memory_mb=memory_mb)
        data = DataConfig(
            corpora={"c": CorpusConfig(path=str(tmp_path / "v"))}, manifest=str(tmp_path / "m"), decode=limits
        )
        rows = ingest(data).table.to_pylist()
        rejected = read_quarantine(data.manifest).to_pylist()
        return {row["video_id"] for row in rows}, {row["video_id"]: row["reason"] for row in rejected}

    few = 4096 * 4096 * BYTES_PER_PIXEL // (1 << 20) - 1
    # The larger one cannot be decoded in so little; it is not tried again in as little or less.
    assert ingested(few) == ({"small.mp4"}, {"large.mp4": "memory"})
    assert ingested(few - 1)[1] == {"large.mp4": "memory"}
    assert ingested(2048) == ({"large.mp4", "small.mp4"}, {})
    assert limit_of("timeout", DecodeConfig(timeout_s=7)) == 7 and limit_of("corrupt", DecodeConfig()) is None
