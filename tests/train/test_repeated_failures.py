"""Failures that come every time end a run, also under max_failures -1; those of nodes and stores never do."""

from __future__ import annotations

import json
import pickle
import traceback
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray.train
import tiny
from in_process import prepare, work
from ray.exceptions import ActorDiedError, NodeDiedError
from ray.train.v2._internal.exceptions import UserExceptionWithTraceback, WorkerHealthCheckFailedError
from ray.train.v2._internal.execution.failure_handling import FailureDecision
from ray.train.v2.api.exceptions import PreemptionError, WorkerGroupError
from ray.train.v2.api.preemption import PreemptionInfo

from defi_platform.config import PretrainConfig, TrainConfig
from defi_platform.errors import MEND
from defi_platform.storage.remote import StorageError
from defi_platform.train.checkpoint import format as checkpoints
from defi_platform.train.driver import run as driver
from defi_platform.train.driver.ray_trainer import NoRepeats
from defi_platform.train.failures import CHECKPOINT, FailureLog, RepeatedFailure, mark_step

RETRY, RAISE = FailureDecision.RETRY, FailureDecision.RAISE


def at(step: int, error: Exception) -> Exception:
    """An error as the controller gets it from a worker."""
    mark_step(error, step)
    wrapped = UserExceptionWithTraceback(error, traceback.format_exc())
    found: Exception = pickle.loads(pickle.dumps(wrapped))._base_exc
    return found


def died(text: str = "The worker process was killed.") -> Exception:
    dead = ActorDiedError()
    dead.error_msg = text
    return WorkerHealthCheckFailedError("a worker is gone", dead)


def decisions(
    run: Path, *errors: Exception | dict[int, Exception], settings: str = "a", most: int = -1
) -> list[Any]:
    """What the controllers of one job after the other decide: each gets one failure."""
    config = ray.train.FailureConfig(max_failures=most)
    found = []
    for error in errors:
        policy = NoRepeats(config, FailureLog(str(run), "tiny", settings))
        if isinstance(error, PreemptionError):
            found.append(policy.make_decision(error))
        else:
            failures = error if isinstance(error, dict) else {0: error}
            found.append(policy.make_decision(WorkerGroupError("failed", failures)))
    return found


def test_the_same_error_at_the_same_step_three_times_ends_a_run(tmp_path: Path) -> None:
    assert decisions(tmp_path, *(at(12, KeyError("x")) for _ in range(3))) == [RETRY, RETRY, RAISE]
    reason = FailureLog(str(tmp_path), "tiny", "a").reason(None)
    assert reason is not None and "3 attempts in a row" in reason and "after step 12: KeyError: 'x'" in reason
    assert str(tmp_path / "failures.json") in reason


@pytest.mark.parametrize(
    "second",
    [at(13, KeyError("x")), at(12, ValueError("x")), at(12, StorageError("away")), died("its node has died")],
)
def test_another_step_or_another_error_begins_the_count_anew(tmp_path: Path, second: Exception) -> None:
    errors = [at(12, KeyError("x")) for _ in range(4)]
    assert decisions(tmp_path, *errors[:2], second, *errors[2:]) == [RETRY] * 5
    assert len(json.loads((tmp_path / "failures.json").read_text())) == 5


@pytest.mark.parametrize(
    "error",
    [
        at(12, StorageError("away")),
        at(12, OSError("disk")),
        at(12, NodeDiedError("gone")),
        died("The actor is dead because its node has died."),
        PreemptionError(PreemptionInfo(deadline_ms=None, preempted_node_to_ranks={"n": [0]})),
    ],
)
def test_what_a_node_or_a_store_does_is_tried_again_for_ever(tmp_path: Path, error: Any) -> None:
    assert decisions(tmp_path, *[error] * 6) == [RETRY] * 6


def test_a_worker_that_dies_three_times_after_one_checkpoint_ends_a_run(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / checkpoints.folder_name(5, "abcdef")).mkdir(parents=True)
    assert decisions(tmp_path, died(), died()) == [RETRY, RETRY]
    (tmp_path / "checkpoints" / checkpoints.folder_name(10, "abcdef")).mkdir()
    assert decisions(tmp_path, died(), died(), died()) == [RETRY, RETRY, RAISE]
    reason = FailureLog(str(tmp_path), "tiny", "a").reason(None)
    assert reason is not None and "the checkpoint of step 10" in reason and "train.micro_batch" in reason
    assert CHECKPOINT.fullmatch(checkpoints.folder_name(10, "abcdef"))


def test_ranks_that_lose_one_that_died_tell_its_step(tmp_path: Path) -> None:
    def lost(step: int) -> dict[int, Exception]:
        return {0: at(step, RuntimeError("Connection closed by peer")), 1: died()}

    assert decisions(tmp_path, lost(3), lost(4), lost(4), lost(4)) == [RETRY, RETRY, RETRY, RAISE]


def test_a_changed_configuration_begins_the_count_anew_and_max_failures_still_counts(tmp_path: Path) -> None:
    errors = [at(12, KeyError("x")) for _ in range(2)]
    assert decisions(tmp_path, *errors) == [RETRY, RETRY]
    assert decisions(tmp_path, *errors, settings="b") == [RETRY, RETRY]
    assert decisions(tmp_path, at(1, KeyError("x")), most=0) == [RAISE]
    assert FailureLog(str(tmp_path), "tiny", "b").reason(None) is None


def test_a_worker_notes_the_step_on_its_error(
    process_group: None, run_config: Callable[..., PretrainConfig], tmp_path: Path
) -> None:
    class Broken(tiny.TinyRecipe):
        def after_update(self, engine, step):
            if step == 3:
                raise ZeroDivisionError("a bug")
            return super().after_update(engine, step)

    recipe = Broken(run_config(tmp_path, micro_batch=8, validation_samples=8))
    prepare(recipe)
    with pytest.raises(ZeroDivisionError) as raised:
        work(recipe)
    assert decisions(tmp_path, raised.value) == [RETRY]
    assert json.loads((tmp_path / "failures.json").read_text())[0]["step"] == 3


def test_the_job_says_that_another_try_would_end_in_the_same_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The driver's part, with a Ray Train whose worker always fails."""

    class AlwaysFails:
        def __init__(
            self, kind: str, worker: Any, settings: Any, train: TrainConfig, resources: Any, failures: Any
        ):
            self.policy = NoRepeats(ray.train.FailureConfig(max_failures=train.max_failures), failures)

        def fit(self) -> Any:
            while True:
                error = WorkerGroupError("failed", {0: at(7, KeyError("x"))})
                if self.policy.make_decision(error) is RAISE:
                    raise error

    monkeypatch.setattr(driver, "RunTrainer", AlwaysFails)
    config = PretrainConfig(train=TrainConfig(output=str(tmp_path), max_failures=-1))
    lease = SimpleNamespace(successor="")
    with pytest.raises(RepeatedFailure, match="after step 7") as raised:
        driver._fit(tiny.TinyRecipe(config), lease)  # type: ignore[arg-type]
    assert raised.value.exit_code == MEND
    # The same command once more: one try shows that nothing has been mended.
    with pytest.raises(RepeatedFailure):
        driver._fit(tiny.TinyRecipe(config), lease)  # type: ignore[arg-type]
    assert len(json.loads((tmp_path / "failures.json").read_text())) == 4
