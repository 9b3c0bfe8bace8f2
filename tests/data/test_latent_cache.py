"""The latent cache as a store: what is read is what was written, and nothing stale is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from corpora import manifest_of

from defi_platform.data.latents.cache import (
    CacheError,
    CacheLocation,
    EncoderInfo,
    LatentCache,
    create_cache,
    missing_rows,
    remove_leftovers,
    write_shard,
)

INFO = EncoderInfo("gfdm", "latents", "aaaa", "TestCodec at 8x8 as float32", (2, 3), "float32")
LENGTHS = {"a": 4, "b": 7, "c": 2}


def video(name: str, version: str = "1", first_frame: int = 0) -> dict[str, object]:
    return {
        "corpus": "toy",
        "video_id": name,
        "version": version,
        "uri": f"/{name}.mp4",
        "first_frame": first_frame,
        "num_frames": LENGTHS.get(name, 1),
    }


def frames_of(name: str) -> np.ndarray:
    length = LENGTHS[name]
    return np.arange(length * 6, dtype=np.float32).reshape(length, 2, 3) + 100 * ord(name)


def add(folder: str, *names: str) -> None:
    videos = [{k: v for k, v in video(n).items() if k != "uri"} for n in names]
    write_shard(folder, np.concatenate([frames_of(name) for name in names]), videos)


@pytest.fixture
def folder(tmp_path: Path) -> str:
    """A cache of three videos in two shards."""
    create_cache(str(tmp_path), INFO)
    add(str(tmp_path), "a", "b")
    add(str(tmp_path), "c")
    return str(tmp_path)


def test_any_frame_of_any_video_is_read_as_it_was_written(folder: str) -> None:
    manifest = manifest_of([video("c"), video("x"), video("b"), video("a")])
    cache = LatentCache(CacheLocation(folder, INFO), manifest)
    assert cache.holds(np.arange(4)).tolist() == [True, False, True, True]
    for row, name in ((0, "c"), (2, "b"), (3, "a")):
        indices = [LENGTHS[name] - 1, 0, 1, 0]
        assert (cache.read(row, indices) == frames_of(name)[indices]).all()


def test_frames_are_read_by_range_from_another_store() -> None:
    folder = "memory://cache-by-range"
    create_cache(folder, INFO)
    add(folder, "a", "b")
    cache = LatentCache(CacheLocation(folder, INFO), manifest_of([video("b")]))
    assert (cache.read(0, [6, 2]) == frames_of("b")[[6, 2]]).all()


def test_a_shard_that_was_not_finished_does_not_count_and_is_removed(folder: str) -> None:
    for index in (Path(folder) / "shards").glob("*.parquet"):
        if len(np.load(index.with_suffix(".npy"))) == LENGTHS["c"]:
            index.unlink()
    manifest = manifest_of([video("a"), video("c")])
    assert missing_rows(folder, manifest, np.arange(2)).tolist() == [1]
    assert remove_leftovers(folder) == 1
    assert len(list((Path(folder) / "shards").iterdir())) == 2


def test_the_cache_of_another_encoder_is_refused_with_both_fingerprints(folder: str) -> None:
    other = replace(INFO, fingerprint="bbbb", describes="TestCodec at 16x16 as float32")
    for use in (
        lambda: LatentCache(CacheLocation(folder, other), manifest_of([video("a")])),
        lambda: create_cache(folder, other),
    ):
        with pytest.raises(CacheError, match=r"fingerprint aaaa \(.*8x8.*bbbb \(.*16x16"):
            use()


def test_a_video_that_changed_since_is_refused_until_it_is_encoded_again(folder: str) -> None:
    manifest = manifest_of([video("a", "2"), video("b")])
    with pytest.raises(CacheError, match=r"/a\.mp4 \(version 1, 4 frames .* there, version 2, 4 frames"):
        LatentCache(CacheLocation(folder, INFO), manifest)
    assert missing_rows(folder, manifest, np.arange(2)).tolist() == [0]
    fresh = {name: value for name, value in video("a", "2").items() if name != "uri"}
    write_shard(folder, np.full((4, 2, 3), 5, np.float32), [fresh])
    assert (LatentCache(CacheLocation(folder, INFO), manifest).read(0, [0]) == 5).all()


def test_another_window_of_the_same_name_is_not_the_one_that_was_encoded(folder: str) -> None:
    manifest = manifest_of([video("a", first_frame=3), video("b")])
    with pytest.raises(
        CacheError, match=r"4 frames from frame 0 on there, version 1, 4 frames from frame 3 on now"
    ):
        LatentCache(CacheLocation(folder, INFO), manifest)
    assert missing_rows(folder, manifest, np.arange(2)).tolist() == [0]


def test_a_folder_without_a_cache_says_which_job_makes_one(tmp_path: Path) -> None:
    with pytest.raises(CacheError, match=r"encode_latents\.py"):
        LatentCache(CacheLocation(str(tmp_path), INFO), manifest_of([video("a")]))
