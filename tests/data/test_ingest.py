"""Ingest of real files: what is good is usable, what is damaged is listed with the right reason."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from corpora import write_lerobot, write_video

from defi_platform.config import CorpusConfig, DataConfig, FilterConfig
from defi_platform.data.decode.video_readers import content_hash
from defi_platform.data.ingest.pipeline import ingest
from defi_platform.data.manifest.quarantine import read_quarantine, skipped
from defi_platform.data.manifest.split import joined
from defi_platform.data.manifest.table import Manifest
from defi_platform.errors import CorpusError

EXPECTED = {
    "audio_only.mp4": "no_video_stream",
    "flip500_mdat.mp4": "corrupt",
    "html_404.mp4": "not_video",
    "huge_real_16000x16000.mp4": "memory",
    "lfs_pointer.mp4": "lfs_pointer",
    "no_moov.mp4": "unreadable",
    "one_frame.mp4": "too_short",
    "text_named.mp4": "not_video",
    "trunc60_moov_first.mp4": "short",
    "trunc60_vp9.webm": "short",
    "zero_byte.mp4": "empty",
}
"""What is damaged in shared/data/corrupt; the other files there are odd, but good."""


def configured(folder: Path, manifest: Path, **options: object) -> DataConfig:
    return DataConfig(corpora={"c": CorpusConfig(path=str(folder))}, manifest=str(manifest), **options)  # type: ignore[arg-type]


def test_every_damaged_file_is_listed_with_its_reason_and_the_odd_ones_are_good(
    shared_data: Path, tmp_path: Path, recorded_metrics: dict[tuple[str, ...], float]
) -> None:
    manifest = ingest(configured(shared_data / "corrupt", tmp_path))
    rejected = {row["video_id"]: row["reason"] for row in read_quarantine(str(tmp_path)).to_pylist()}
    assert rejected == EXPECTED
    good = {row["video_id"]: row for row in manifest.table.to_pylist()}
    assert set(good) == {"odd_341x255_yuv444.mp4", "rotated90.mp4", "vfr.mp4"}
    assert (good["rotated90.mp4"]["width"], good["rotated90.mp4"]["height"]) == (256, 340)
    assert good["vfr.mp4"]["variable_rate"]
    results = Counter([*EXPECTED.values(), "usable", "usable", "usable"])
    assert recorded_metrics == {
        ("defi_ingest_listed_videos_total", "c"): 14,
        ("defi_ingest_opened_files_total", "c"): 14,
        **{("defi_ingest_videos_total", "c", result): number for result, number in results.items()},
    }
    recorded_metrics.clear()
    ingest(configured(shared_data / "corrupt", tmp_path))
    assert recorded_metrics == {("defi_ingest_listed_videos_total", "c"): 14}, "nothing was opened"


def test_every_codec_is_good(shared_data: Path, tmp_path: Path) -> None:
    rows = ingest(configured(shared_data / "codecs", tmp_path)).table.to_pylist()
    assert {row["codec"] for row in rows} == {"av1", "h264", "hevc", "mjpeg", "mpeg4", "vp9"}
    assert {row["num_frames"] for row in rows} == {60}


@pytest.mark.parametrize(("corpus", "videos"), [("bridge", 1), ("rt1", 1), ("xhand", 4)])
def test_annotated_folders_give_the_cameras_their_annotations_name(
    shared_data: Path, tmp_path: Path, corpus: str, videos: int
) -> None:
    manifest = ingest(configured(shared_data / "videos" / corpus, tmp_path))
    rows = manifest.table.to_pylist()
    assert len(rows) == videos and not skipped(str(tmp_path))
    assert all(row["text"] and row["source"] == "annotated" for row in rows)
    assert {row["camera"] for row in rows} == ({"0", "1"} if corpus == "xhand" else {"0"})


def test_a_file_shorter_than_its_annotation_is_short(shared_data: Path, tmp_path: Path) -> None:
    shutil.copytree(shared_data / "videos" / "xhand", tmp_path / "x")
    place = tmp_path / "x" / "annotation" / "val" / "100.json"
    place.write_text(json.dumps(json.loads(place.read_text()) | {"video_length": 90}))
    ingest(configured(tmp_path / "x", tmp_path / "m"))
    assert skipped(str(tmp_path / "m")) == {"short": 2}


def test_lerobot_episodes_that_meta_names_but_nobody_wrote_are_missing(tmp_path: Path) -> None:
    root = write_lerobot(tmp_path / "c", [20, 20, 20], cameras=("front", "top"))
    next((root / "videos" / "observation.images.top").rglob("*.mp4")).unlink()
    manifest = ingest(configured(root, tmp_path / "m"))
    assert len(manifest) == 3
    assert skipped(str(tmp_path / "m")) == {"missing": 3}


def test_a_lerobot_file_that_lacks_its_last_episode_is_short(tmp_path: Path) -> None:
    root = write_lerobot(tmp_path / "c", [20, 20, 20])
    write_video(next((root / "videos").rglob("*.mp4")), range(45))
    ingest(configured(root, tmp_path / "m"))
    rows = read_quarantine(str(tmp_path / "m")).to_pylist()
    assert [(row["video_id"], row["reason"]) for row in rows] == [
        ("episode_000002/observation.images.front", "short")
    ]
    assert "frames 40 to 59 into a file of 45" in rows[0]["message"]


def test_a_second_ingest_reuses_what_has_not_changed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in "ab":
        write_video(tmp_path / "c" / f"{name}.mp4", range(20))
    config = configured(tmp_path / "c", tmp_path / "m")
    first = ingest(config)
    second = ingest(config)
    assert (first.reused, second.reused) == ((), ("c",))
    assert first.table == second.table
    assert "unchanged, manifest reused" in capsys.readouterr().out


def test_only_new_and_changed_files_are_opened_again(tmp_path: Path) -> None:
    for name in "ab":
        write_video(tmp_path / "c" / f"{name}.mp4", range(20))
    config = configured(tmp_path / "c", tmp_path / "m")
    ingest(config)
    # a.mp4 keeps its size and time but loses its content: whoever opened it again would notice.
    place = tmp_path / "c" / "a.mp4"
    status = place.stat()
    place.write_bytes(b"\0" * status.st_size)
    os.utime(place, ns=(status.st_atime_ns, status.st_mtime_ns))
    write_video(tmp_path / "c" / "b.mp4", range(30))
    write_video(tmp_path / "c" / "d.mp4", range(25))
    frames = {row["video_id"]: row["num_frames"] for row in ingest(config).table.to_pylist()}
    assert frames == {"a.mp4": 20, "b.mp4": 30, "d.mp4": 25}


def test_scores_that_some_files_have_from_an_earlier_filter_do_no_harm(tmp_path: Path) -> None:
    write_video(tmp_path / "c" / "a.mp4", range(20))
    corpus = CorpusConfig(path=str(tmp_path / "c"), filters=FilterConfig(duplicate_bits=3))
    ingest(DataConfig(corpora={"c": corpus}, manifest=str(tmp_path / "m")))
    write_video(tmp_path / "c" / "b.mp4", range(20))
    assert len(ingest(configured(tmp_path / "c", tmp_path / "m"))) == 2


def test_train_and_validation_share_no_episode_and_are_the_same_every_time(tmp_path: Path) -> None:
    root = write_lerobot(tmp_path / "c", [4] * 30, cameras=("front", "top"))
    rows = ingest(configured(root, tmp_path / "m1", holdout=0.2)).table.to_pylist()
    held = {row["episode_id"] for row in rows if row["split"] == "validation"}
    assert 0 < len(held) < 15
    assert not held & {row["episode_id"] for row in rows if row["split"] == "train"}
    again = ingest(configured(root, tmp_path / "m2", holdout=0.2)).table
    assert again.column("split").to_pylist() == [row["split"] for row in rows]


def test_another_holdout_is_another_split_of_the_same_results(tmp_path: Path) -> None:
    root = write_lerobot(tmp_path / "c", [4] * 10)
    ingest(configured(root, tmp_path / "m", holdout=0.1))
    rows = ingest(configured(root, tmp_path / "m", holdout=0.0)).table.to_pylist()
    assert {row["split"] for row in rows} == {"train"}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda c: None, "does not exist"),
        (lambda c: c.mkdir(), "is empty"),
        (lambda c: (c.mkdir(), (c / "notes.txt").write_text("x")), "Looked for: .*LeRobot"),
        (lambda c: (c / "annotation").mkdir(parents=True), "lists no video"),
    ],
)
def test_a_corpus_that_is_not_there_is_one_clear_error(tmp_path: Path, make: object, message: str) -> None:
    make(tmp_path / "c")  # type: ignore[operator]
    with pytest.raises(CorpusError, match=message) as caught:
        ingest(configured(tmp_path / "c", tmp_path / "m"))
    assert str(tmp_path / "c") in str(caught.value)
    with pytest.raises(CorpusError):
        Manifest.open(str(tmp_path / "m"))


def test_an_unknown_format_names_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "c").mkdir()
    config = configured(tmp_path / "c", tmp_path / "m")
    config.corpora["c"].format = "lerobot_v4"
    with pytest.raises(CorpusError, match="Did you mean 'lerobot_v3'"):
        ingest(config)


def test_a_corpus_of_damage_alone_says_what_was_wrong(shared_data: Path, tmp_path: Path) -> None:
    (tmp_path / "c").mkdir()
    for name in ("no_moov.mp4", "zero_byte.mp4"):
        shutil.copy(shared_data / "corrupt" / name, tmp_path / "c")
    with pytest.raises(CorpusError, match="no usable video: 1 unreadable, 1 empty"):
        ingest(configured(tmp_path / "c", tmp_path / "m"))


def test_with_strict_the_first_bad_video_stops_the_ingest(shared_data: Path, tmp_path: Path) -> None:
    (tmp_path / "c").mkdir()
    for name in ("one_frame.mp4", "vfr.mp4"):
        shutil.copy(shared_data / "corrupt" / name, tmp_path / "c")
    with pytest.raises(CorpusError, match=r"one_frame\.mp4.*too_short"):
        ingest(configured(tmp_path / "c", tmp_path / "m", strict=True))


def test_a_commit_leaves_the_rows_of_the_one_before_and_none_of_its_other_tables(tmp_path: Path) -> None:
    write_video(tmp_path / "c" / "a.mp4", range(20))
    config = configured(tmp_path / "c", tmp_path / "m")
    first = ingest(config)
    write_video(tmp_path / "c" / "b.mp4", range(30))
    ingest(config)
    folder = tmp_path / "m" / "corpora" / "c"
    names = sorted(place.name.split("-")[0] for place in folder.iterdir())
    assert names == ["committed.json", "noted", "opened", "rejected", *["videos"] * 4]
    assert (folder / first.tables["c"]).exists()


def test_a_damaged_marker_is_one_clear_error(tmp_path: Path) -> None:
    write_video(tmp_path / "c" / "a.mp4", range(20))
    config = configured(tmp_path / "c", tmp_path / "m")
    ingest(config)
    (tmp_path / "m" / "corpora" / "c" / "committed.json").write_text("{")
    with pytest.raises(CorpusError, match=r"committed\.json is damaged.*delete it and run the ingest again"):
        ingest(config)


def test_copies_of_a_video_are_on_one_side_of_the_split(tmp_path: Path) -> None:
    root = tmp_path / "c"
    for number in range(12):
        write_video(root / f"{number}.mp4", range(number, number + 5))
        shutil.copy(root / f"{number}.mp4", root / f"copy of {number}.mp4")
    assert content_hash([7] * 5) == 0  # cameras that are off are not copies
    config = DataConfig(
        corpora={"c": CorpusConfig(path=str(root))}, manifest=str(tmp_path / "m"), holdout=0.4
    )
    manifest = ingest(config)
    side = {row["video_id"]: row["split"] for row in map(manifest.row, range(len(manifest)))}
    for number in range(12):
        assert side[f"{number}.mp4"] == side[f"copy of {number}.mp4"]
    assert set(side.values()) == {"train", "validation"}


def test_groups_hang_together_through_their_copies() -> None:
    positions = np.array([9, 5, 5, 7, 3, 1, 1, 8], np.uint64)
    contents = np.array([1, 1, 2, 2, 0, 3, 4, 0], np.uint64)
    found = joined(positions, contents).tolist()
    assert len(set(found[:4])) == 1 and found[4:] == [3, 1, 1, 8]
    assert found[0] not in positions.tolist()
    assert joined(positions, np.zeros(8, np.uint64)).tolist() == positions.tolist()
