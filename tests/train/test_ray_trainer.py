from __future__ import annotations

import os
import pickle

import pytest

from defi_platform.config import TrainConfig
from defi_platform.train.driver.ray_trainer import ControllerEnvironment


def controller_environment(train: TrainConfig, preemptible: bool) -> dict[str, str]:
    """What a controller finds in its environment."""
    pickle.loads(pickle.dumps(ControllerEnvironment(train, preemptible)))
    return {name: value for name, value in os.environ.items() if name.startswith("RAY_TRAIN_")}


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("RAY_TRAIN_"):
            monkeypatch.delenv(name)
    # Undone at the end, with all that is set meanwhile.
    monkeypatch.setattr("os.environ", dict(os.environ))


def test_only_an_elastic_run_waits_no_more_than_ten_seconds_for_its_workers() -> None:
    assert "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S" not in controller_environment(
        TrainConfig(output=""), False
    )
    elastic = TrainConfig(output="", min_workers=1)
    assert controller_environment(elastic, True)["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] == "10"


def test_what_the_user_has_set_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "7")
    assert controller_environment(TrainConfig(output=""), False) == {
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "7",
        "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    }
