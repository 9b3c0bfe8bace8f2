"""Windows of long videos, filters by score, near-duplicates, and videos of variable rate."""

from __future__ import annotations

import shutil
import time
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
import pytest
from corpora import numbers_of, spoil, write_lerobot, write_video
from hypothesis import given
from hypothesis import strategies as st
from test_ingest import configured

from defi_platform.config import CorpusConfig, DataConfig, FilterConfig, WindowConfig
from defi_platform.data.decode.messages import Probe
from defi_platform.data.ingest import near_duplicates as near
from defi_platform.data.ingest.manifest_rows import rows_of
from defi_platform.data.ingest.near_duplicates import near_duplicates
from defi_platform.data.ingest.pipeline import ingest
from defi_platform.data.ingest.probe_results import ProbeResult
from defi_platform.data.ingest.segmentation import cuts, spans
from defi_platform.data.ingest.store import VideoStore
from defi_platform.data.loader.robot_signals import statistics
from defi_platform.data.loader.stream import local_batches
from defi_platform.data.manifest.quarantine import read_quarantine, skipped
from defi_platform.data.manifest.table import SCHEMA
from defi_platform.data.sampling.plan import Plan
from defi_platform.data.sampling.samplers import ChunkRule, ClipRule, PairRule
from defi_platform.data.sampling.sharding import Shard
from defi_platform.data.sources.records import VideoRecord
from defi_platform.errors import UserError


def write_scenes(path: Path, scenes: list[np.ndarray], frames: int, size: int = 96, rate: int = 10) -> None:
    """`frames` frames of each scene, a texture that moves by a pixel per frame."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=rate)
        stream.width = stream.height = size
        stream.pix_fmt = "yuv420p"
        for scene in scenes:
            for number in range(frames):
                grey = np.roll(scene, number, axis=1)
                rgb = np.repeat(grey[:, :, None], 3, axis=2)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(rgb, format="rgb24")))
        container.mux(stream.encode())


def texture(seed: int, low: int = 0, high: int = 255, size: int = 96, block: int = 8) -> np.ndarray:
    """A sharp picture of random blocks."""
    draw = np.random.default_rng(seed).integers(low, high, (size // block, size // block), dtype=np.uint8)
    return np.repeat(np.repeat(draw, block, axis=0), block, axis=1)


def windowed(
    folder: Path, manifest: Path, filters: FilterConfig | None = None, **windows: object
) -> DataConfig:
    config = configured(folder, manifest, holdout=0.0)
    config.corpora["c"].windows = WindowConfig(**windows)  # type: ignore[arg-type]
    config.corpora["c"].filters = filters or FilterConfig()
    return config


def test_a_window_of_the_shortest_length_is_accepted_wherever_it_starts() -> None:
    probe = Probe(1000, 10.0, 64, 64, "h264", 9, "pyav", variable_rate=False)
    corpus = CorpusConfig(path="/c", windows=WindowConfig(mode="stride", length_s=1.0, shortest_s=1.0))
    rows = rows_of("c", corpus, "plain", VideoRecord("v", "/v", ""), ProbeResult("/v", "1", probe, 1))
    assert [row["first_frame"] for row, _ in rows if "reason" not in row] == list(range(0, 1000, 10))


# --------------------------------------------------------------------------- windows


def test_strides_lie_end_to_end_and_the_rest_is_a_window_of_its_own() -> None:
    times = np.arange(105) / 10
    assert spans(WindowConfig("stride", length_s=4.0), times, b"") == [(0, 40), (40, 80), (80, 105)]
    overlapping = spans(WindowConfig("stride", length_s=4.0, stride_s=2.0), times, b"")
    assert overlapping == [(0, 40), (20, 60), (40, 80), (60, 100), (80, 105)]


def test_windows_of_a_steady_odd_rate_are_equally_long() -> None:
    times = np.arange(3000) / 29.97
    lengths = {stop - start for start, stop in spans(WindowConfig("stride", length_s=2.0), times, b"")[:-1]}
    assert lengths == {60}


def test_a_cut_stands_out_and_fast_motion_does_not() -> None:
    levels = np.full(60, 5.0)
    levels[0] = 0
    levels[20] = 40  # a cut
    levels[40:50] = 40  # a pan
    assert cuts(bytes((levels / 0.25).astype(np.uint8)), threshold=20.0) == [20]


def test_long_shots_are_split_evenly() -> None:
    parts = spans(WindowConfig("shots", length_s=4.0), np.arange(100) / 10, bytes(100))
    assert parts == [(0, 33), (33, 67), (67, 100)]


def test_a_pause_however_long_ends_a_window_and_makes_no_empty_ones() -> None:
    times = np.arange(60) / 10 + 1e7 * (np.arange(60) >= 31)
    assert spans(WindowConfig("shots", length_s=4.0), times, bytes(60)) == [(0, 31), (31, 60)]


def test_shots_become_rows_of_one_split_that_share_the_file(tmp_path: Path) -> None:
    write_scenes(tmp_path / "c" / "a.mp4", [texture(1), texture(2), texture(3)], frames=25)
    manifest = ingest(windowed(tmp_path / "c", tmp_path / "m", mode="shots", shortest_s=1.0))
    rows = manifest.table.to_pylist()
    assert [(row["video_id"], row["first_frame"], row["num_frames"]) for row in rows] == [
        ("a.mp4#w0000", 0, 25), ("a.mp4#w0001", 25, 25), ("a.mp4#w0002", 50, 25),
    ]  # fmt: skip
    assert {row["episode_id"] for row in rows} == {"a.mp4"} and len({row["split"] for row in rows}) == 1
    assert all(row["luma"] > 0 and row["motion"] > 0 and row["sharpness"] > 0 for row in rows)


def test_a_window_too_short_to_use_is_counted_and_another_length_opens_no_file(tmp_path: Path) -> None:
    write_video(tmp_path / "c" / "a.mp4", range(43))
    config = windowed(tmp_path / "c", tmp_path / "m", mode="stride", length_s=2.0)
    assert [row["num_frames"] for row in ingest(config).table.to_pylist()] == [20, 20]
    rejected = read_quarantine(config.manifest).to_pylist()
    assert [(row["video_id"], row["reason"]) for row in rejected] == [("a.mp4#w0002", "too_short")]
    spoil(tmp_path / "c" / "a.mp4")
    config.corpora["c"].windows.length_s = 4.3
    assert [row["num_frames"] for row in ingest(config).table.to_pylist()] == [43]


def test_windows_of_episodes_have_the_actions_of_their_own_frames(tmp_path: Path) -> None:
    root = write_lerobot(tmp_path / "c", [40, 33], cameras=("front", "side"))
    config = windowed(root, tmp_path / "m", mode="stride", length_s=2.0, stride_s=1.0)
    manifest = ingest(config)
    rows = manifest.table.to_pylist()
    spans_of = {
        (row["episode_id"], row["first_action"], row["num_frames"], row["num_actions"]) for row in rows
    }
    assert {span[1:] for span in spans_of} == {(0, 20, 20), (10, 20, 20), (20, 20, 20), (20, 13, 13)}
    assert len(rows) == 2 * len(spans_of)
    plan = Plan.of(manifest, config, ChunkRule(chunk=6), 0)
    (size,) = plan.samples_per_epoch.values()
    assert plan.num_videos == len(spans_of) and size == sum(span[3] for span in spans_of)
    for batch in local_batches(plan, config, Shard.single(0, size, 16)):
        episodes, steps = batch["actions"][:, 0, 0].int(), batch["actions"][:, 0, 1].int()
        for view in range(2):
            shown = numbers_of(batch["images"][:, view].numpy())
            assert shown == (steps + 40 * episodes).tolist()
        assert batch["proprio"][:, 0].int().tolist() == steps.tolist()
        last = [plan.manifest.row(plan.resolve(k).row) for k in batch["sample"].tolist()]
        left = [
            row["first_action"] + row["num_actions"] - step
            for row, step in zip(last, steps.tolist(), strict=True)
        ]
        assert batch["action_mask"].sum(dim=1).tolist() == [min(6, count) for count in left]
    assert statistics(plan)["action"].count == size


def test_a_source_with_a_validation_split_of_its_own_loses_nothing_to_the_holdout() -> None:
    store = VideoStore("c")
    row = dict.fromkeys(SCHEMA.names) | {"corpus": "c", "uri": "u", "version": "1", "split": ""}
    for number in range(50):
        store.accept(row | {"video_id": f"t{number:02d}", "split": "train" if number % 2 else ""})
    splits = store.accepted(0.5).read_all()["split"].to_pylist()
    assert 10 < splits.count("validation") < 40, "a source that names no validation is split by the hash"
    store.accept(row | {"video_id": "v", "split": "validation"})
    assert store.accepted(0.5).read_all()["split"].to_pylist() == ["train"] * 50 + ["validation"]
    store.close()


def test_an_unknown_mode_is_one_clear_error(tmp_path: Path) -> None:
    write_video(tmp_path / "c" / "a.mp4", range(5))
    with pytest.raises(UserError, match=r"c\.windows\.mode is 'shot'; it is one of none, shots, stride"):
        ingest(windowed(tmp_path / "c", tmp_path / "m", mode="shot"))


# --------------------------------------------------------------------------- filters


@pytest.fixture
def looks(tmp_path: Path) -> Path:
    """One good video, and one of each kind that a filter is for."""
    folder = tmp_path / "c"
    write_scenes(folder / "good.mp4", [texture(1)], frames=30)
    write_scenes(folder / "dark.mp4", [texture(2, 0, 6)], frames=30)
    write_scenes(folder / "soft.mp4", [np.linspace(60, 200, 96).astype(np.uint8)[:, None].repeat(96, 1)], 30)
    write_scenes(folder / "still.mp4", [np.full((96, 96), 90, np.uint8)], frames=30)
    write_scenes(folder / "brief.mp4", [texture(4)], frames=8)
    return folder


def test_filters_are_off_by_default_and_scores_only_taken_when_asked(looks: Path, tmp_path: Path) -> None:
    config = windowed(looks, tmp_path / "m")
    rows = ingest(config).table.to_pylist()
    assert len(rows) == 5 and all(row["luma"] is None for row in rows)
    config.corpora["c"].filters = FilterConfig(scores=True)
    rows = ingest(config).table.to_pylist()
    assert len(rows) == 5 and all(row["luma"] is not None for row in rows)


def test_every_filter_drops_its_kind_with_score_and_reason(looks: Path, tmp_path: Path) -> None:
    filters = FilterConfig(black=16.0, static=0.5, blurred=20.0, too_short_s=1.0)
    config = windowed(looks, tmp_path / "m", filters)
    manifest = ingest(config)
    assert [row["video_id"] for row in manifest.table.to_pylist()] == ["good.mp4"]
    rejected = {row["video_id"]: row for row in read_quarantine(config.manifest).to_pylist()}
    assert {name: row["reason"] for name, row in rejected.items()} == {
        "dark.mp4": "black", "still.mp4": "static", "soft.mp4": "static", "brief.mp4": "too_short",
    }  # fmt: skip
    assert "filters.black=16" in rejected["dark.mp4"]["message"]
    config.corpora["c"].filters.static = None
    ingest(config)
    assert skipped(config.manifest) == {"black": 1, "blurred": 2, "too_short": 1}


def test_a_copy_in_another_size_and_quality_is_a_duplicate(tmp_path: Path) -> None:
    write_scenes(tmp_path / "c" / "a.mp4", [texture(1)], frames=20)
    write_scenes(tmp_path / "c" / "b.mp4", [texture(7)], frames=20)
    with (
        av.open(str(tmp_path / "c" / "a.mp4")) as source,
        av.open(str(tmp_path / "c" / "z.mp4"), "w") as copy,
    ):
        stream = copy.add_stream("mpeg4", rate=10)
        stream.width = stream.height = 160
        stream.pix_fmt = "yuv420p"
        for frame in source.decode(video=0):
            copy.mux(stream.encode(frame.reformat(160, 160)))
        copy.mux(stream.encode())
    config = windowed(tmp_path / "c", tmp_path / "m", FilterConfig(duplicate_bits=6))
    assert [row["video_id"] for row in ingest(config).table.to_pylist()] == ["a.mp4", "b.mp4"]
    (row,) = read_quarantine(config.manifest).to_pylist()
    assert (row["video_id"], row["reason"]) == ("z.mp4", "duplicate")
    assert "bits from a.mp4" in row["message"].replace(" of 192", "")


def test_near_duplicates_are_those_a_comparison_of_all_finds() -> None:
    draw = np.random.default_rng(0)
    base = draw.integers(0, 1 << 63, (150, 3), dtype=np.uint64)
    near = base[draw.integers(0, 150, 150)].copy()
    for row in near:
        for bit in draw.integers(0, 192, draw.integers(0, 12)):
            row[bit // 64] ^= np.uint64(1) << np.uint64(bit % 64)
    rows = draw.permutation(np.concatenate([base, near, base[:5]]))
    expected: dict[int, int] = {}
    kept: list[int] = []
    for number, row in enumerate(rows):
        distances = [int(np.bitwise_count(row ^ rows[other]).sum()) for other in kept]
        if distances and min(distances) <= 6:
            expected[number] = min(distances)
        else:
            kept.append(number)
    found = near_duplicates(rows, 6)
    assert {number: bits for number, (_, bits) in found.items()} == expected
    assert all(early < late and early not in found for late, (early, _) in found.items())


def test_near_duplicates_of_many_videos_are_found_in_seconds() -> None:
    rows = np.random.default_rng(0).integers(0, 1 << 63, (50_000, 3), dtype=np.uint64)
    rows[-1000:] = rows[:1000]
    assert len(near_duplicates(rows, 6)) == 1000


# --------------------------------------------------------------------------- variable rate

HELD = np.concatenate([np.arange(20) / 10, 2.0 + np.arange(20) / 30, 5.0 + np.arange(20) / 10])
"""Ten per second, thirty per second, two seconds of nothing, ten per second."""


@pytest.mark.parametrize("draw", np.linspace(0, 0.999, 25).tolist())
def test_pairs_of_a_variable_rate_are_the_interval_apart_in_time(draw: float) -> None:
    first, second = PairRule(interval_s=1.0).at_times(HELD, draw)
    assert 0 <= first < second < len(HELD)
    assert abs(HELD[second] - HELD[first] - 1.0) <= 0.05 + 1e-3


@given(
    steps=st.lists(st.floats(0.0, 3.0), min_size=1, max_size=40),
    draw=st.floats(0, 1, exclude_max=True),
    interval=st.floats(0.05, 4.0),
)
def test_whatever_the_times_every_rule_names_frames_that_are_there(
    steps: list[float], draw: float, interval: float
) -> None:
    times = np.concatenate([[0.0], np.cumsum(steps)])
    first, second = PairRule(interval_s=interval).at_times(times, draw)
    assert 0 <= first < second < len(times)
    for rule in (ClipRule(frames=5), ClipRule(frames=5, span_s=interval)):
        clip = rule.at_times(times, draw)
        assert len(clip) == 5 and clip.min() >= 0 and clip.max() < len(times)
        assert all(a <= b for a, b in pairwise(clip))


def test_where_nothing_is_the_interval_apart_the_closest_pair_is_taken() -> None:
    pairs = {tuple(PairRule(interval_s=1.0).at_times(np.array([0.0, 3.0, 6.1]), draw)) for draw in (0.0, 0.9)}
    assert pairs == {(0, 1)}


def test_clips_of_a_variable_rate_are_spread_evenly_in_time() -> None:
    clip = ClipRule(frames=5, span_s=1.0).at_times(HELD, 0.0)
    assert np.allclose(np.diff(HELD[clip]), 0.25, atol=0.051)
    whole = ClipRule(frames=8).at_times(HELD, 0.5)
    assert (whole[0], whole[-1]) == (0, len(HELD) - 1) and all(a <= b for a, b in pairwise(whole))
    assert ChunkRule(chunk=4).at_times(HELD, 0.5).tolist() == [30]


def test_the_real_file_of_variable_rate_gives_pairs_by_its_times(shared_data: Path, tmp_path: Path) -> None:
    (tmp_path / "c").mkdir()
    shutil.copy(shared_data / "corrupt" / "vfr.mp4", tmp_path / "c")
    write_video(tmp_path / "c" / "steady.mp4", range(30))
    manifest = ingest(configured(tmp_path / "c", tmp_path / "m", holdout=0.0))
    plan = Plan(manifest, {"c": 1.0}, PairRule(interval_s=0.5), seed=0)
    rows = manifest.table.to_pylist()
    assert [row["times"] is None for row in rows] == [True, False]
    times = np.array(rows[1]["times"])
    assert len(times) == rows[1]["num_frames"] and times[0] == 0
    for sample in plan.resolve_many(range(60)):
        first, second = sample.indices
        if sample.row == 1:
            assert abs(times[second] - times[first] - 0.5) <= np.median(np.diff(times)) / 2 + 2e-3
        else:
            assert second - first == 5


def test_many_videos_that_are_nearly_near_end_in_bounded_time_and_are_said_to_be_compared_in_part(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Each differs from all others by somewhat more than is allowed, so that all are kept and share most bands.
    monkeypatch.setattr(near, "MOST_SEEN", 100_000)
    monkeypatch.setattr(near, "MOST_ENTRIES", 50_000)
    random = np.random.default_rng(0)
    rows = np.repeat(random.integers(0, 1 << 63, (1, 3)).astype(np.uint64), 3_000, axis=0)
    for bit in random.integers(0, 192, (12, len(rows))):
        rows[np.arange(len(rows)), bit // 64] ^= np.uint64(1) << (bit % 64).astype(np.uint64)
    rows[-1] = rows[-2]
    partly: list[int] = []
    started = time.process_time()
    found = near.near_duplicates(rows, 8, partly)
    assert time.process_time() - started < 30
    assert found[2_999] == found.get(2_998, (2_998, 0))
    assert 0 < len(partly) < len(rows)
