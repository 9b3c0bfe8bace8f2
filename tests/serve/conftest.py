"""A real nano policy with random weights, and one server of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from ports import free_port

from defi_models import presets
from defi_models.gfdm import GFDM
from defi_models.policy import DeFIPolicy
from defi_platform.config import ServeConfig, SessionConfig
from defi_platform.serve.deployment.server import PolicyServer, deploy


@pytest.fixture(scope="session")
def policy_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    policy = DeFIPolicy(presets.policy("nano", cameras=["front"]))
    return policy.save_pretrained(tmp_path_factory.mktemp("models") / "policy")


@pytest.fixture(scope="session")
def gfdm_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = GFDM(presets.gfdm("nano"))
    return model.save_pretrained(tmp_path_factory.mktemp("models") / "gfdm")


@pytest.fixture(scope="module")
def server(ray_cluster: None, policy_folder: Path) -> Iterator[PolicyServer]:
    port = free_port()
    config = ServeConfig(
        policy=str(policy_folder),
        port=port,
        threads=1,
        max_connections=64,
        max_batch_size=8,
        session=SessionConfig(seed=5),
    )
    with deploy(config) as running:
        assert running.url == f"ws://127.0.0.1:{port}"
        yield running
