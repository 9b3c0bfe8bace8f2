"""The LeRobot v3.0 writer: frames land at their timestamps, tables and statistics say what was written."""

from __future__ import annotations

import io
import json
from pathlib import Path

import av
import decord
import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from defi_client.recording import lerobot as lerobot_writer
from defi_client.recording.h264 import Mp4Joiner, encode_h264
from defi_client.recording.lerobot import (
    QUANTILES,
    Camera,
    Episode,
    LeRobotWriter,
    Vector,
    frame_stats,
    pooled_stats,
    vector_stats,
)

FPS = 80
CAMERA = Camera("front", 64, 64)
ACTION = Vector("action", ("x", "y"))


def grey_frames(levels: list[int]) -> np.ndarray:
    """(n, 64, 64, 3) uint8: each frame one shade, which names it after decoding."""
    return np.stack([np.full((64, 64, 3), level, np.uint8) for level in levels])


def episode(levels: list[int], text: str = "push") -> Episode:
    frames = grey_frames(levels)
    actions = np.stack([np.array(levels), -np.array(levels)], axis=1).astype(np.float32)
    return Episode(
        text=text,
        videos={"front": encode_h264(list(frames), FPS)},
        video_stats={"front": frame_stats(frames)},
        length=len(levels),
        vectors={"action": actions},
    )


def write(folder: Path, episodes: list[Episode]) -> Path:
    writer = LeRobotWriter(folder, FPS, [CAMERA], [ACTION], "test robot")
    for one in episodes:
        writer.add(one)
    writer.finish()
    return folder


EPISODES = [[20, 40, 60, 80, 100], [200, 180, 160], [90, 110, 130, 150, 170, 190, 210]]


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    texts = ["push", "pull", "push"]
    return write(tmp_path / "set", [episode(e, t) for e, t in zip(EPISODES, texts, strict=True)])


def rows_of(dataset: Path) -> list[dict]:
    return pq.read_table(dataset / "meta/episodes/chunk-000/file-000.parquet").to_pylist()


def test_an_episodes_frames_are_those_from_its_timestamp_on(dataset: Path) -> None:
    video = decord.VideoReader(str(dataset / "videos/observation.images.front/chunk-000/file-000.mp4"))
    assert len(video) == sum(map(len, EPISODES))
    for row, levels in zip(rows_of(dataset), EPISODES, strict=True):
        start = row["videos/observation.images.front/from_timestamp"]
        for number, level in enumerate(levels):
            wanted = start + number / FPS
            index = round(wanted * FPS)
            assert video.get_frame_timestamp(index)[0] == pytest.approx(wanted, abs=1e-6)
            assert abs(video[index].asnumpy().mean() - level) < 4
        assert row["videos/observation.images.front/to_timestamp"] == pytest.approx(start + len(levels) / FPS)


def test_frames_can_be_sought_by_presentation_time_with_pyav(dataset: Path) -> None:
    start = rows_of(dataset)[2]["videos/observation.images.front/from_timestamp"]
    with av.open(str(dataset / "videos/observation.images.front/chunk-000/file-000.mp4")) as container:
        stream = container.streams.video[0]
        container.seek(int((start + 2 / FPS) / stream.time_base), stream=stream)
        frames = {round(float(f.time) * FPS): f.to_ndarray(format="rgb24") for f in container.decode(stream)}
    assert abs(frames[round(start * FPS) + 2].mean() - EPISODES[2][2]) < 4


def test_video_is_h264_yuv420p_with_a_key_frame_at_every_episode(dataset: Path) -> None:
    with av.open(str(dataset / "videos/observation.images.front/chunk-000/file-000.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        packets = [p for p in container.demux(stream) if p.size]
    starts = [0, 5, 8]
    assert all(packets[start].is_keyframe for start in starts)


def test_tables_describe_every_frame_and_episode(dataset: Path) -> None:
    rows = rows_of(dataset)
    assert [r["length"] for r in rows] == [5, 3, 7]
    assert [(r["dataset_from_index"], r["dataset_to_index"]) for r in rows] == [(0, 5), (5, 8), (8, 15)]
    assert [r["tasks"] for r in rows] == [["push"], ["pull"], ["push"]]
    data = pq.read_table(dataset / "data/chunk-000/file-000.parquet").to_pydict()
    assert data["index"] == list(range(15))
    assert data["episode_index"] == [0] * 5 + [1] * 3 + [2] * 7
    assert data["frame_index"] == [*range(5), *range(3), *range(7)]
    assert data["task_index"] == [0] * 5 + [1] * 3 + [0] * 7
    assert data["action"][5] == [200.0, -200.0]
    assert data["timestamp"][7] == pytest.approx(2 / FPS)
    tasks = pq.read_table(dataset / "meta/tasks.parquet").to_pydict()
    assert tasks == {"task_index": [0, 1], "task": ["push", "pull"]}


def test_info_counts_what_was_written_and_its_templates_name_the_files(dataset: Path) -> None:
    info = json.loads((dataset / "meta/info.json").read_text())
    assert info["codebase_version"] == "v3.0"
    assert (info["total_episodes"], info["total_frames"], info["total_tasks"]) == (3, 15, 2)
    assert (info["fps"], info["splits"]) == (80, {"train": "0:3"})
    video = info["video_path"].format(video_key=CAMERA.key, chunk_index=0, file_index=0)
    data = info["data_path"].format(chunk_index=0, file_index=0)
    assert (dataset / video).is_file() and (dataset / data).is_file()
    assert info["features"][CAMERA.key]["shape"] == [64, 64, 3]
    assert info["features"]["action"] == {"dtype": "float32", "shape": [2], "names": ["x", "y"]}


def test_statistics_are_those_of_all_frames(dataset: Path) -> None:
    stats = json.loads((dataset / "meta/stats.json").read_text())
    levels = np.concatenate(EPISODES).astype(np.float64)
    actions = np.stack([levels, -levels], axis=1)
    assert stats["action"]["count"] == [15]
    assert np.allclose(stats["action"]["mean"], actions.mean(0))
    assert np.allclose(stats["action"]["std"], actions.std(0))
    assert np.allclose(stats["action"]["q90"], np.quantile(actions, 0.9, axis=0))
    image = stats[CAMERA.key]
    assert np.shape(image["mean"]) == (3, 1, 1)
    assert np.allclose(np.ravel(image["mean"]), levels.mean() / 255)
    assert np.allclose(np.ravel(image["max"]), 210 / 255)
    one = rows_of(dataset)[1]
    assert one["stats/action/max"] == [200.0, -160.0]
    assert set(QUANTILES) <= {key.rsplit("/")[-1] for key in one if key.startswith("stats/action/")}


def test_a_file_that_is_full_is_followed_by_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lerobot_writer, "VIDEO_FILE_MB", 0)
    monkeypatch.setattr(lerobot_writer, "DATA_FILE_MB", 0)
    folder = write(tmp_path / "set", [episode(levels) for levels in EPISODES])
    rows = rows_of(folder)
    assert [r["videos/observation.images.front/file_index"] for r in rows] == [0, 1, 2]
    assert [r["videos/observation.images.front/from_timestamp"] for r in rows] == [0.0, 0.0, 0.0]
    assert [r["data/file_index"] for r in rows] == [0, 1, 2]
    last = decord.VideoReader(str(folder / "videos/observation.images.front/chunk-000/file-002.mp4"))
    assert len(last) == 7
    assert pq.read_table(folder / "data/chunk-000/file-002.parquet")["index"].to_pylist() == list(
        range(8, 15)
    )


def test_a_video_shorter_than_its_episode_is_refused(tmp_path: Path) -> None:
    whole = episode([1, 2, 3])
    short = Episode(whole.text, episode([1, 2]).videos, whole.video_stats, 3, whole.vectors)
    writer = LeRobotWriter(tmp_path, FPS, [CAMERA], [ACTION], "test robot")
    with pytest.raises(ValueError, match="2 frames, not 3"):
        writer.add(short)


def test_a_dataset_without_episodes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="without episodes"):
        LeRobotWriter(tmp_path, FPS, [CAMERA], [ACTION], "test robot").finish()


def test_joining_copies_the_encoded_pictures_bit_for_bit(tmp_path: Path) -> None:
    parts = [encode_h264(list(grey_frames(levels)), FPS) for levels in EPISODES]
    joiner = Mp4Joiner(tmp_path / "joined.mp4", FPS)
    for part in parts:
        joiner.add(part)
    joiner.close()
    apart = [f for part in parts for f in _pictures(io.BytesIO(part))]
    joined = _pictures(tmp_path / "joined.mp4")
    assert all(np.array_equal(a, b) for a, b in zip(apart, joined, strict=True))


def _pictures(source: Path | io.BytesIO) -> list[np.ndarray]:
    with av.open(str(source) if isinstance(source, Path) else source) as container:
        return [f.to_ndarray(format="rgb24") for f in container.decode(video=0)]


@settings(deadline=None, max_examples=50)
@given(
    st.lists(
        st.lists(st.floats(-1e3, 1e3, allow_subnormal=False), min_size=1, max_size=6), min_size=1, max_size=5
    )
)
def test_pooled_moments_are_those_of_the_union(parts: list[list[float]]) -> None:
    pooled = pooled_stats([vector_stats(np.array(part)[:, None]) for part in parts])
    union = np.concatenate([np.array(part) for part in parts])
    assert pooled["count"][0] == len(union)
    assert np.allclose(pooled["mean"], union.mean(), atol=1e-9)
    assert np.allclose(pooled["std"], union.std(), atol=1e-5)
    assert (pooled["min"], pooled["max"]) == (union.min(), union.max())
