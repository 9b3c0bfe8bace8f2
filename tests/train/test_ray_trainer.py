from __future__ import annotations

import asyncio
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.exceptions import BroadcastCollectiveTimeoutError
from ray.train.v2._internal.execution.checkpoint.sync_actor import SynchronizationActor

from defi_platform.cluster import session
from defi_platform.config import RayConfig, TrainConfig
from defi_platform.train.driver.ray_trainer import ControllerEnvironment, NoRepeats, RunTrainer
from defi_platform.train.failures import FailureLog


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


def trainer_of(folder: Path) -> tuple[RunTrainer, dict[str, Any]]:
    """The trainer of a run, and what its workers are given."""
    settings: dict[str, Any] = {}
    train = TrainConfig(output=str(folder), preemption_grace_s=7)
    trainer = RunTrainer("tiny", print, settings, train, {"CPU": 1.0}, FailureLog(str(folder), "tiny", ""))
    return trainer, settings


def test_notices_are_watched_on_any_cluster_but_one_that_the_job_has_started_for_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cluster that has its head only may get nodes later, and lose them."""
    monkeypatch.setattr(session.ray, "init", lambda **_: type("Context", (), {"dashboard_url": None}))
    monkeypatch.setattr(session.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(session.ray, "shutdown", lambda: None)
    monkeypatch.setattr(session, "check_address", lambda _: True)
    found = {}
    for address in (None, "10.0.0.1:6379"):
        with session.ray_session(RayConfig(address=address)):
            found[address] = trainer_of(tmp_path)[1]["preemptible"]
    assert found == {None: False, "10.0.0.1:6379": True}
    assert trainer_of(tmp_path)[1]["preemptible"], "whoever has connected this process"


def test_the_others_may_finish_a_checkpoint_after_the_end_of_a_node(tmp_path: Path) -> None:
    failures = trainer_of(tmp_path)[0].run_config.failure_config
    assert failures.preemption_grace_s == 7 and failures.max_preemption_failures == -1
    assert not failures.relax_collectives_on_preemption


def test_rays_controller_gets_the_policy_that_ends_repeated_failures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setattr(TorchTrainer, "_initialize_and_run_controller", lambda _, **more: given.update(more))
    trainer_of(tmp_path)[0]._initialize_and_run_controller(scaling_policy=None, failure_policy=None)
    assert isinstance(pickle.loads(pickle.dumps(given["failure_policy"])), NoRepeats)


def test_relaxed_collectives_would_leave_a_worker_behind_that_polls_after_the_others() -> None:
    """Why they are not used: on Ray that releases it too, they might be."""

    async def polls() -> Any:
        barrier = SynchronizationActor.__ray_metadata__.modified_class(timeout_s=0.2, warn_interval_s=9)
        await barrier.set_required_ranks([0])

        def poll(rank: int) -> Any:
            return barrier.broadcast_from_rank_zero(
                rank, 2, "notice", "poll", collective_seq=1, relaxable=True
            )

        assert await poll(0) == "notice"
        return await poll(1)

    with pytest.raises(BroadcastCollectiveTimeoutError):
        asyncio.run(polls())
