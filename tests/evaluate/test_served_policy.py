"""Evaluation that serves the policy itself: the real model behind the real Serve deployment."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from defi_models import presets
from defi_models.policy import DeFIPolicy
from defi_platform.config import EvaluateConfig, ServeConfig
from defi_platform.errors import CheckpointError, ConfigError
from defi_platform.evaluate.rollouts import evaluate


def save_policy(folder: Path, camera: str) -> Path:
    torch.manual_seed(0)
    return DeFIPolicy(presets.policy("nano", cameras=[camera])).save_pretrained(folder)


def small(policy: Path, output: Path) -> EvaluateConfig:
    return EvaluateConfig(
        serve=ServeConfig(policy=str(policy), port=0, threads=1),
        tasks=["coffee-button-v3", "button-press-v3"],
        arms=["policy"],
        episodes_per_task=1,
        seed=500,
        max_steps=24,
        workers=2,
        output=str(output),
    )


@pytest.mark.slow
def test_the_same_policy_acts_the_same_in_a_second_evaluation(tmp_path: Path, ray_cluster: None) -> None:
    policy = save_policy(tmp_path / "policy", "workspace")
    first = evaluate(small(policy, tmp_path / "first"))
    # One worker instead of two: other requests share the server's batches, and nothing may come of it.
    evaluate(replace(small(policy, tmp_path / "second"), workers=1))
    videos = sorted(path.relative_to(tmp_path / "first") for path in tmp_path.glob("first/videos/*/*/*.mp4"))
    assert len(videos) == 2
    for video in videos:
        assert (tmp_path / "first" / video).read_bytes() == (tmp_path / "second" / video).read_bytes()
    assert first.details["policy"]["preset"] == "nano"
    assert first.details["latency_ms"]["count"] >= 2

    with pytest.raises(ConfigError, match=r"other settings \(policy:"):
        evaluate(small(save_policy(tmp_path / "other", "workspace"), tmp_path / "first"))


@pytest.mark.slow
def test_a_policy_that_looks_through_another_camera_is_one_clear_error(
    tmp_path: Path, ray_cluster: None
) -> None:
    policy = save_policy(tmp_path / "policy", "gripper")
    with pytest.raises(ConfigError, match=r"preset nano.* looks through gripper"):
        evaluate(small(policy, tmp_path / "run"))
    assert not (tmp_path / "run/summary.json").exists()


def test_a_policy_folder_that_is_not_there_is_one_clear_error(tmp_path: Path, ray_cluster: None) -> None:
    with pytest.raises(CheckpointError, match="absent"):
        evaluate(small(tmp_path / "absent", tmp_path / "run"))
