"""What every test may use: one real Ray per session, and the real data beside the checkout."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

# Before torch or Ray are imported, so that their worker processes inherit it.
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MUJOCO_GL", "egl")
# Threads that spin while they wait for one that has no core make a busy machine a hundred times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest

# Where the suite itself runs in the background of a shell, Ctrl-C is ignored by it and by every job it starts.
signal.signal(signal.SIGINT, signal.default_int_handler)

REPOSITORY = Path(__file__).resolve().parents[1]
SHARED = REPOSITORY.parent / "shared"


@pytest.fixture(scope="session")
def repository() -> Path:
    return REPOSITORY


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real videos and robot data; see ../shared/data/README.md."""
    folder = SHARED / "data"
    if not folder.is_dir():
        pytest.skip("needs the real data in ../shared/data, which is not beside this checkout")
    return folder


@pytest.fixture(scope="session")
def shared_parity() -> Path:
    """Recorded tensors of the reference implementation; see ../shared/parity/README.md."""
    folder = SHARED / "parity"
    if not folder.is_dir():
        pytest.skip("needs the recorded tensors in ../shared/parity, which are not beside this checkout")
    return folder


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A real Ray of four logical CPUs, started once for the whole session."""
    import ray

    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()
