"""Batches: right frames and skips, and on a real Ray the same in exact order, without waiting for CPUs that trainers
hold."""

from __future__ import annotations

import contextlib
import json
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import ray
import torch
from corpora import FPS, manifest_of, numbers_of, write_lerobot, write_video
from hostile_jobs import HostileJobHandler

from defi_platform.config import CorpusConfig, DataConfig, DecodeConfig
from defi_platform.data.decode.pool import DecoderPool
from defi_platform.data.ingest.pipeline import ingest
from defi_platform.data.loader.sample_decoder import SampleDecoder
from defi_platform.data.loader.shared_actors import start_shared_actors
from defi_platform.data.loader.stream import local_batches, stream
from defi_platform.data.manifest.quarantine import skipped
from defi_platform.data.manifest.table import Manifest
from defi_platform.data.sampling.plan import Plan
from defi_platform.data.sampling.samplers import ChunkRule, ClipRule, PairRule
from defi_platform.data.sampling.sharding import Shard
from defi_platform.errors import CorpusError

LENGTHS = (20, 31, 25, 40, 22, 28)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> tuple[DataConfig, Manifest]:
    """Six episodes of two cameras, their frames numbered through the file."""
    folder = tmp_path_factory.mktemp("stream")
    root = write_lerobot(folder / "corpus", LENGTHS, cameras=("front", "top"))
    data = DataConfig(
        corpora={"robot": CorpusConfig(path=str(root))}, manifest=str(folder / "manifest"), holdout=0.0
    )
    return data, ingest(data)


def one_epoch(plan: Plan, data: DataConfig, stop: int, **options: Any) -> list[dict[str, Any]]:
    sizes = {"rank": 0, "world_size": 1, "global_batch": 4, "micro_batch": 4} | options
    return list(local_batches(plan, data, Shard(start=0, stop=stop, **sizes)))


def test_a_clip_is_the_frames_the_plan_names(corpus: tuple[DataConfig, Manifest]) -> None:
    data, manifest = corpus
    plan = Plan.of(manifest, data, ClipRule(frames=8), seed=0)
    batches = one_epoch(plan, data, stop=12)
    for batch in batches:
        assert batch["frames"].shape == (4, 8, 64, 64, 3)
        for k, frames, video_id, text in zip(
            batch["sample"].tolist(), batch["frames"].numpy(), batch["video_id"], batch["text"], strict=True
        ):
            sample = plan.resolve(k)
            video = manifest.row(sample.row)
            assert (video["video_id"], video["text"]) == (video_id, text)
            assert numbers_of(frames) == [video["first_frame"] + i for i in sample.indices]
    assert [k for batch in batches for k in batch["sample"].tolist()] == list(range(12))


def test_the_frames_of_a_pair_are_the_interval_apart(corpus: tuple[DataConfig, Manifest]) -> None:
    data, manifest = corpus
    plan = Plan.of(manifest, data, PairRule(interval_s=1.0), seed=0)
    for batch in one_epoch(plan, data, stop=8):
        for pair in batch["frames"].numpy():
            first, second = numbers_of(pair)
            assert second - first == FPS


def test_a_chunk_holds_every_camera_and_the_actions_from_its_frame_on(
    corpus: tuple[DataConfig, Manifest],
) -> None:
    data, manifest = corpus
    plan = Plan.of(manifest, data, ChunkRule(chunk=10), seed=0)
    assert plan.samples_per_epoch == {"robot": sum(LENGTHS)}
    for batch in one_epoch(plan, data, stop=40):
        assert batch["images"].shape == (4, 2, 64, 64, 3)
        for i in range(4):
            t, episode = batch["proprio"][i].tolist()
            assert numbers_of(batch["images"][i].numpy()) == [sum(LENGTHS[: int(episode)]) + int(t)] * 2
            steps = np.minimum(t + np.arange(10), LENGTHS[int(episode)] - 1)
            assert batch["actions"][i, :, 1].tolist() == steps.tolist()
            assert batch["action_mask"][i].tolist() == (t + np.arange(10) < LENGTHS[int(episode)]).tolist()


def test_ranks_share_every_step_without_overlap(corpus: tuple[DataConfig, Manifest]) -> None:
    data, manifest = corpus
    plan = Plan.of(manifest, data, ClipRule(frames=2), seed=0)
    by_rank = [one_epoch(plan, data, stop=16, rank=rank, world_size=2, global_batch=8) for rank in (0, 1)]
    numbers = [[batch["sample"].tolist() for batch in batches] for batches in by_rank]
    assert sorted(batches[0] for batches in numbers) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert sorted(batches[1] for batches in numbers) == [[8, 9, 10, 11], [12, 13, 14, 15]]


def test_a_video_that_goes_bad_after_ingest_is_replaced_counted_and_listed(tmp_path: Path) -> None:
    for number in range(4):
        write_video(tmp_path / "corpus" / f"{number}.mp4", range(number * 20, number * 20 + 20))
    data = DataConfig(
        corpora={"plain": CorpusConfig(path=str(tmp_path / "corpus"))},
        manifest=str(tmp_path / "m"),
        holdout=0.0,
    )
    manifest = ingest(data)
    (tmp_path / "corpus" / "2.mp4").write_bytes(b"x" * 1000)
    plan = Plan.of(manifest, data, ClipRule(frames=4), seed=0)
    batches = one_epoch(plan, data, stop=8)
    assert [k for batch in batches for k in batch["sample"].tolist()] == list(range(8))
    assert "2.mp4" not in [video_id for batch in batches for video_id in batch["video_id"]]
    reasons = [reason for batch in batches for reason in batch["skipped"] if reason]
    assert set(reasons) == {"unreadable"} and len(reasons) >= 2
    assert skipped(data.manifest) == {"unreadable": 1}


def test_with_strict_a_bad_video_stops_the_stream_and_is_named(tmp_path: Path, ray_cluster: None) -> None:
    write_video(tmp_path / "corpus" / "a.mp4", range(20))
    data = DataConfig(
        corpora={"plain": CorpusConfig(path=str(tmp_path / "corpus"))},
        manifest=str(tmp_path / "m"),
        holdout=0.0,
        strict=True,
    )
    manifest = ingest(data)
    shutil.rmtree(tmp_path / "corpus")
    plan = Plan.of(manifest, data, ClipRule(frames=4), seed=0)
    start_shared_actors()
    shared = ray.util.list_named_actors(all_namespaces=True)
    assert {"AutoscalingCoordinator", "ActorLocationTracker", "datasets_stats_actor"} <= {
        actor["name"] for actor in shared
    }
    with pytest.raises(ray.exceptions.RayError, match=r"a\.mp4.*missing"):
        list(stream(plan, data, Shard.single(0, 4, 4)))
    # An actor that outlives the job and was started on a worker's node would keep an autoscaler from releasing it.
    left = ray.util.list_named_actors(all_namespaces=True)
    assert [actor for actor in left if actor not in shared] == []


def test_two_decode_actors_give_the_batches_of_none_though_one_is_killed_in_mid_stream(
    corpus: tuple[DataConfig, Manifest], ray_cluster: None
) -> None:
    data, manifest = corpus
    several = DataConfig(**data.__dict__)
    several.decode = type(data.decode)(processes=2)
    plan = Plan.of(manifest, several, PairRule(interval_s=0.5), seed=0)
    reports: list[str] = []
    batches = iter(stream(plan, several, Shard.single(0, 240, 4), keep_stats=reports.append))
    seen = [next(batches) for _ in range(4)]
    victim = next(
        child
        for child in psutil.Process().children(recursive=True)
        if "MapWorker" in " ".join(child.cmdline())
    )
    victim.kill()
    seen += list(batches)
    assert [k for batch in seen for k in batch["sample"].tolist()] == list(range(240))
    for batch in seen:
        for k, frames in zip(batch["sample"].tolist(), batch["frames"].numpy(), strict=True):
            sample = plan.resolve(k)
            first = manifest.row(sample.row)["first_frame"]
            assert numbers_of(frames) == [first + i for i in sample.indices]
    for batch, local in zip(seen, one_epoch(plan, data, stop=240), strict=True):
        assert batch.keys() == local.keys()
        for name, column in batch.items():
            assert torch.equal(column, local[name]) if torch.is_tensor(column) else column == local[name]
    assert reports[-1].startswith("240 samples in") and "MapBatches(SampleDecoder)" in reports[-1]


def hostile(names: list[str], timeout_s: float, run: str | None = None) -> SampleDecoder:
    """A decoder of videos that behave by their names; see hostile_jobs.py."""
    rows = [
        {"corpus": "toy", "video_id": name, "uri": name, "version": "1", "split": "train"}
        | {"camera": "", "text": "", "num_frames": 9, "fps": 3.0, "width": 8, "height": 8}
        | {"first_frame": 0, "decoder": "pyav", "num_actions": 0}
        for name in names
    ]
    data = DataConfig(height=8, width=8, decode=DecodeConfig(storage_patience_s=timeout_s))
    decoder = SampleDecoder(Plan(manifest_of(rows), {"toy": 1.0}, ClipRule(frames=2), seed=0), data, run=run)
    decoder._pool.close()
    decoder._pool = DecoderPool(data.decode, HostileJobHandler)
    return decoder


def micro_batch(start: int, stop: int) -> dict[str, np.ndarray]:
    return {"start": np.array([start]), "stop": np.array([stop])}


def test_a_store_that_stays_away_stops_the_stream_instead_of_emptying_the_corpus() -> None:
    names = ["fine0", "storage1", "storage2", "storage3", "storage4", "storage5"]
    decoder = hostile([f"s3://b/{name}" for name in names], timeout_s=0.5)
    with (
        contextlib.closing(decoder),
        pytest.raises(
            CorpusError,
            match=r"does not give s3://b/storage.*503 Slow Down.*none of 3 videos in 0.5 s \(data\.",
        ),
    ):
        for k in range(6):
            decoder(micro_batch(k, k + 1))


def test_a_store_that_comes_back_costs_no_sample(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    decoder = hostile([str(tmp_path / f"away{number}") for number in range(6)], timeout_s=60.0)

    def come_back() -> None:
        while not (tmp_path / "asked").exists():
            time.sleep(0.05)
        time.sleep(1.0)
        (tmp_path / "back").touch()

    threading.Thread(target=come_back, daemon=True).start()
    with contextlib.closing(decoder):
        batch = decoder(micro_batch(0, 6))
    assert (tmp_path / "back").exists()
    assert batch["skipped"].tolist() == [""] * 6 and (batch["frames"] == 7).all()
    assert capfd.readouterr().out.count("It is tried again for 60 s") == 1


def test_one_video_that_the_store_does_not_give_is_left_out_while_it_gives_others(
    recorded_metrics: dict[tuple[str, ...], float],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("DEFI_LOG", "json")
    decoder = hostile(["fine0", "fine1", "fine2", "storage3", "fine4"], timeout_s=0.5, run="runs/a")
    with contextlib.closing(decoder):
        batch = decoder(micro_batch(0, 5))
    assert sorted(batch["skipped"].tolist()) == ["", "", "", "", "storage"]
    assert recorded_metrics.pop(("defi_data_batch_seconds", "runs/a")) > 0.5
    assert recorded_metrics.pop(("defi_data_store_wait_seconds_total", "runs/a")) >= 0.5
    assert recorded_metrics == {
        ("defi_data_samples_total", "runs/a", "toy"): 5,
        ("defi_data_skipped_videos_total", "runs/a", "toy", "storage"): 1,
    }
    bad = batch["skipped"].tolist().index("storage")
    (line,) = [line for line in map(json.loads, capsys.readouterr().out.splitlines()) if "sample" in line]
    logged = tuple(line[name] for name in ("run", "corpus", "sample", "video_id", "reason"))
    assert logged == ("runs/a", "toy", bad, "storage3", "storage")


@pytest.mark.slow
def test_two_trainers_stream_at_once_with_half_a_cpu_left_for_all_decoders(
    corpus: tuple[DataConfig, Manifest], ray_cluster: None
) -> None:
    data, manifest = corpus

    # Its code travels by value, so it uses the platform alone and nothing of this module. A cluster without
    # any room for decoders is refused before a training starts: see train/config_checks.py.
    @ray.remote(num_cpus=1.75)
    class Trainer:
        def train(self, plan: Plan) -> list[int]:
            batches = stream(plan, data, Shard.single(0, 32, 4))
            return [k for batch in batches for k in batch["sample"].tolist()]

    plans = [Plan.of(manifest, data, rule, seed=0) for rule in (ClipRule(frames=8), PairRule(interval_s=1.0))]
    trainers = [Trainer.remote() for _ in plans]  # type: ignore[attr-defined]
    results = ray.get([t.train.remote(plan) for t, plan in zip(trainers, plans, strict=True)], timeout=300)
    for trainer in trainers:
        ray.kill(trainer)
    assert results == [list(range(32))] * 2
