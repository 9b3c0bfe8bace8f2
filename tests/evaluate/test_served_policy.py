"""Evaluation of a served policy: the real model behind the real Serve deployment. test_demo evaluates one that the
evaluation serves itself."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from defi_client.recording.h264 import encode_h264
from defi_client.recording.lerobot import Camera, Episode, LeRobotWriter, Vector, frame_stats
from defi_models import presets
from defi_models.policy import DeFIPolicy
from defi_platform.config import EvaluateConfig, OfflineConfig, ServeConfig
from defi_platform.errors import CheckpointError, ConfigError, ServeError
from defi_platform.evaluate.offline.evaluate import evaluate_offline
from defi_platform.evaluate.rollouts import evaluate
from defi_platform.serve.deployment.server import PolicyServer, deploy


def save_policy(folder: Path, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    return DeFIPolicy(presets.policy("nano", cameras=["workspace"])).save_pretrained(folder)


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_policy(tmp_path_factory.mktemp("served") / "policy")


@pytest.fixture(scope="module")
def server(policy: Path, ray_cluster: None) -> Iterator[PolicyServer]:
    with deploy(ServeConfig(policy=str(policy), port=0, threads=1, max_batch_size=8)) as running:
        yield running


def small(policy: Path, output: Path, url: str | None = None) -> EvaluateConfig:
    return EvaluateConfig(
        serve=ServeConfig(policy=str(policy), port=0, threads=1, max_batch_size=8),
        url=url,
        tasks=["coffee-button-v3", "button-press-v3"],
        arms=["policy"],
        episodes_per_task=1,
        seed=500,
        max_steps=24,
        workers=2,
        output=str(output),
    )


@pytest.mark.slow
def test_the_same_policy_acts_the_same_in_a_second_evaluation(
    server: PolicyServer, policy: Path, tmp_path: Path
) -> None:
    first = evaluate(small(policy, tmp_path / "first", server.url))
    # One worker instead of two: other requests share the server's batches, and nothing may come of it.
    evaluate(replace(small(policy, tmp_path / "second", server.url), workers=1))
    videos = sorted(path.relative_to(tmp_path / "first") for path in tmp_path.glob("first/videos/*/*/*.mp4"))
    assert len(videos) == 2
    for video in videos:
        assert (tmp_path / "first" / video).read_bytes() == (tmp_path / "second" / video).read_bytes()
    assert first.details["policy"]["preset"] == "nano"
    assert first.details["latency_ms"]["count"] >= 2


@pytest.mark.slow
def test_a_policy_that_looks_through_another_camera_is_one_clear_error(
    server: PolicyServer, policy: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"preset nano.* looks through workspace"):
        evaluate(replace(small(policy, tmp_path / "run", server.url), cameras=["corner2"]))
    assert not (tmp_path / "run/summary.json").exists()


@pytest.mark.slow
def test_a_copy_of_the_policy_is_the_same_one_and_another_is_refused(
    server: PolicyServer, policy: Path, tmp_path: Path
) -> None:
    evaluate(small(policy, tmp_path / "run", server.url))
    copy = tmp_path / "copied" / "elsewhere"
    shutil.copytree(policy, copy)
    assert evaluate(small(copy, tmp_path / "run")).reused
    other = save_policy(tmp_path / "other", seed=1)
    with pytest.raises(ServeError, match="which an evaluation does not replace"):
        evaluate(small(other, tmp_path / "new"))
    assert not (tmp_path / "new/identity").exists(), "a failed first try binds nothing"
    with pytest.raises(ConfigError, match=r"another policy \(digest:"):
        evaluate(small(other, tmp_path / "run"))


@pytest.mark.slow
def test_offline_evaluation_serves_a_folder_as_its_server_would(
    server: PolicyServer, policy: Path, tmp_path: Path
) -> None:
    random = np.random.default_rng(0)
    names = ("x", "y", "z", "gripper")
    vectors = [Vector("action", names), Vector("observation.state", names)]
    writer = LeRobotWriter(tmp_path / "data", 10, [Camera("workspace", 64, 64)], vectors, "test")
    for length in (12, 15):
        frames = random.integers(0, 255, (length, 64, 64, 3), np.uint8)
        values = {vector.key: random.normal(size=(length, 4)).astype(np.float32) for vector in vectors}
        video = {"workspace": encode_h264(list(frames), 10)}
        writer.add(Episode("press", video, {"workspace": frame_stats(frames)}, length, values))
    writer.finish()
    served = small(policy, tmp_path / "unused").serve
    own = OfflineConfig(
        serve=served, dataset=str(tmp_path / "data"), episodes=[1], every=5, output=str(tmp_path / "own")
    )
    found = evaluate_offline(own).details
    by_url = evaluate_offline(replace(own, url=server.url, output=str(tmp_path / "url"))).details
    assert found["errors"] == by_url["errors"] and found["errors"]["policy"]["episodes"] == 1
    assert found["settings"]["policy"] == server.metadata["policy_digest"]
    absent = replace(own, serve=replace(served, policy=str(tmp_path / "absent")))
    with pytest.raises(CheckpointError, match="absent"):
        evaluate_offline(absent)


def test_a_policy_folder_that_is_not_there_is_one_clear_error(tmp_path: Path, ray_cluster: None) -> None:
    with pytest.raises(CheckpointError, match="absent"):
        evaluate(small(tmp_path / "absent", tmp_path / "run"))
