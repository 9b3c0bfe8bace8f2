"""Encoding on a real Ray, and that training from the cache is training from the pictures."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from corpora import write_lerobot, write_video

from defi_platform.config import CorpusConfig, DataConfig, EncodeConfig, PretrainConfig, TrainConfig
from defi_platform.data.ingest.pipeline import ingest
from defi_platform.data.latents.cache import CacheError
from defi_platform.data.loader.stream import local_batches
from defi_platform.data.manifest.quarantine import skipped
from defi_platform.data.sampling.sharding import Shard
from defi_platform.encode_latents import encode_latents
from defi_platform.errors import ConfigError
from defi_platform.train.engine.seeds import sample_generators
from defi_platform.train.recipes.registry import RECIPES
from defi_platform.train.recipes.video_base import VideoRecipe

SIZE = 2


def data(folder: Path, kind: str, *corpora: str) -> DataConfig:
    return DataConfig(
        corpora={name: CorpusConfig(path=str(folder / name)) for name in corpora},
        manifest=str(folder / "manifest"),
        cache=str(folder / "cache" / kind),
        pair_interval_s=0.3,
        holdout=0.0,
    )


def recipe(kind: str, settings: DataConfig) -> VideoRecipe:
    return RECIPES[kind](
        PretrainConfig(data=settings, train=TrainConfig(output=str(Path(settings.manifest).parent / "run")))
    )


@pytest.fixture(scope="module")
def folder(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One encoded corpus, and one that is not."""
    folder = tmp_path_factory.mktemp("latents")
    write_lerobot(folder / "robot", [12, 10, 14])
    write_video(folder / "plain" / "a.mp4", range(15))
    for kind in ("gfdm", "gidm"):
        summary = encode_latents(EncodeConfig(kind=kind, data=data(folder, kind, "robot"), batch_frames=5))
        assert (summary.videos, summary.encoded, summary.frames, summary.skipped) == (3, 3, 36, {})
    return folder


@pytest.mark.parametrize(("kind", "column"), [("gfdm", "latents"), ("gidm", "features")])
def test_losses_from_the_cache_are_those_from_the_pictures(folder: Path, kind: str, column: str) -> None:
    one = recipe(kind, data(folder, kind, "robot"))
    model = one.build().eval()
    plan = one.plan("train")
    cached = list(one.stream(plan, Shard.single(0, 4, SIZE)))
    assert all(column in batch and "frames" not in batch for batch in cached)
    assert one.summary({})["cache"]["samples_read"] == 4
    assert "per second" in (folder / "run" / "data_stats.txt").read_text()
    plain = recipe(kind, data(folder, kind, "robot"))
    plain.config.data.cache = None
    from_pictures = local_batches(plan, plain.config.data, Shard.single(0, 4, SIZE))
    for read, decoded in zip(cached, from_pictures, strict=True):
        samples = decoded["sample"].tolist()
        assert read["sample"].tolist() == samples and read["text"] == decoded["text"]
        with torch.no_grad():
            losses = [
                model(batch, sample_generators(0, "noise", samples))["loss"] for batch in (read, decoded)
            ]
        assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-5)


def test_a_partial_cache_is_used_where_it_can_and_completed_by_the_job(folder: Path) -> None:
    settings = data(folder, "gfdm", "robot", "plain")
    partial = recipe("gfdm", settings)
    ingest(settings)
    partial.build()
    batches = list(partial.stream(partial.plan("train"), Shard.single(0, 8, SIZE)))
    for batch in batches:
        assert ("frames" in batch) == ("plain" in batch["corpus"])
    cache_use = partial.summary({})["cache"]
    assert (
        cache_use["videos"],
        cache_use["of"],
        cache_use["samples_read"] + cache_use["samples_decoded"],
    ) == (3, 4, 8)
    config = EncodeConfig(kind="gfdm", data=settings)
    summary = encode_latents(config)
    assert (summary.videos, summary.encoded) == (4, 1)
    assert encode_latents(config).encoded == 0


def test_the_cache_of_other_frames_is_refused_before_training(folder: Path) -> None:
    settings = data(folder, "gidm", "robot")
    settings.height = settings.width = 32
    with pytest.raises(CacheError, match=r"64x64 as float32.*32x32 as float32"):
        encode_latents(EncodeConfig(kind="gidm", data=settings))


def test_a_model_that_augments_its_frames_has_no_cache(folder: Path) -> None:
    config = EncodeConfig(kind="gidm", data=data(folder, "gidm", "robot"))
    config.model.overrides = {"augmentation": {}}
    with pytest.raises(ConfigError, match=r"model\.overrides\.augmentation=null"):
        encode_latents(config)


def test_a_video_that_went_bad_after_ingest_is_left_out_counted_and_listed(folder: Path) -> None:
    settings = data(folder, "late", "late")
    settings.manifest = str(folder / "late-manifest")
    for name in ("good", "bad"):
        write_video(folder / "late" / f"{name}.mp4", range(9))
    ingest(settings)
    bad = folder / "late" / "bad.mp4"
    before = bad.stat()
    bad.write_bytes(bytes(before.st_size))
    os.utime(bad, ns=(before.st_atime_ns, before.st_mtime_ns))
    summary = encode_latents(EncodeConfig(kind="gfdm", data=settings))
    assert (summary.encoded, summary.videos, sum(summary.skipped.values())) == (1, 1, 1)
    assert skipped(settings.manifest) == summary.skipped
