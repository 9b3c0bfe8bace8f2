"""Training tests share runs: starting a trainer takes longer than the few steps that are looked at."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from ranks import Ranks

from defi_platform.config import PretrainConfig, TrainConfig

# Before Ray starts: its processes have to import the recipes that lie beside this file.
HERE = Path(__file__).parent
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")]))
# The small corpora that the data tests make.
sys.path.append(str(HERE.parent / "data"))


@pytest.fixture(autouse=True)
def same_numbers() -> None:
    """Random numbers of a test do not depend on how many others have drawn before it."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def run_config() -> Callable[..., PretrainConfig]:
    """Settings of a run of a few small steps; keyword arguments win."""

    def make(output: Path, **changes: object) -> PretrainConfig:
        small = {
            "steps": 12,
            "global_batch": 8,
            "micro_batch": 2,
            "log_every": 1,
            "validate_every": 6,
            "validation_samples": 6,
            "checkpoint_every": 5,
            "learning_rate": 1e-2,
            # Validation losses are the average's, so that a run that loses it is found out.
            "ema_decay": 0.9,
            "export_weights": "average",
            "threads": 1,
            # Five workers at once, and room for decoders, on the four logical CPUs of the tests' Ray.
            "resources_per_worker": {"CPU": 0.7},
        }
        config = PretrainConfig(train=TrainConfig(output=str(output), **{**small, **changes}))  # type: ignore[arg-type]
        config.tracking.wandb = False
        return config

    return make


@pytest.fixture(scope="session")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    """A process group of two processes."""
    ranks = Ranks(tmp_path_factory.mktemp("two_ranks"))
    yield ranks
    ranks.close()
