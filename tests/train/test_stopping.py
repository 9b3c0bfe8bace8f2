from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
from in_process import prepare, work
from ray import cloudpickle

from defi_platform.config import PretrainConfig, RayConfig
from defi_platform.errors import ConfigError
from defi_platform.storage.leases import FolderInUse, FolderLease
from defi_platform.train.checkpoint import format as checkpoints
from defi_platform.train.driver import run as driver
from defi_platform.train.driver.run import train
from defi_platform.train.stop_request import StopRequest, request_stop
from defi_platform.train.worker.entry import train_worker


@pytest.mark.parametrize("remote", [False, True])
def test_a_request_to_stop_reaches_a_run_wherever_its_folder_lies(tmp_path: Path, remote: bool) -> None:
    run = "memory://runs/stopped" if remote else str(tmp_path)
    request = StopRequest(run, interval_s=0.05)
    assert not request.made()
    request_stop(run)
    deadline = time.monotonic() + 60
    while not request.made():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    request.close()


def test_workers_whose_folder_another_job_has_taken_over_write_nothing_more(
    process_group: None, run_config: Callable[..., PretrainConfig], tmp_path: Path
) -> None:
    run, successor = tmp_path / "run", tmp_path / "successor"

    class TakenOver(tiny.TinyRecipe):
        def after_update(self, engine, step):
            if step == 2:
                successor.touch()
                (run / "status.json").unlink(missing_ok=True)
            return super().after_update(engine, step)

    recipe = TakenOver(run_config(run, micro_batch=8, validation_samples=8, checkpoint_every=3))
    prepare(recipe)
    settings = {
        "recipe": recipe, "started": time.time(), "preemptible": False, "successor": str(successor)
    }  # fmt: skip
    outcome = train_worker({"pickled": cloudpickle.dumps(settings)})
    assert outcome["error"][0] == "FolderInUse" and "another job" in outcome["error"][1]
    assert max(tiny.losses(run)) == 2 and not list((run / "checkpoints").glob("*"))


def test_a_second_start_of_a_run_that_lives_is_refused_before_anything_starts(
    run_config: Callable[..., PretrainConfig], tmp_path: Path
) -> None:
    with FolderLease(str(tmp_path), "tiny"), pytest.raises(FolderInUse, match="Wait for its end or stop it"):
        train(RayConfig(), [tiny.TinyRecipe(run_config(tmp_path))])
    assert [path.name for path in tmp_path.iterdir()] == ["in_use"]


def test_a_folder_in_which_another_job_went_on_meanwhile_is_looked_at_again(
    process_group: None,
    run_config: Callable[..., PretrainConfig],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def recipe(**changes: Any) -> tiny.TinyRecipe:
        return tiny.TinyRecipe(run_config(tmp_path, micro_batch=8, validation_samples=8, **changes))

    class WaitsForTheOther(FolderLease):
        def __enter__(self) -> FolderLease:
            prepare(recipe())
            work(recipe())
            return super().__enter__()

    monkeypatch.setattr(driver, "FolderLease", WaitsForTheOther)
    with pytest.raises(ConfigError, match="learning_rate"):
        train(RayConfig(), [recipe(learning_rate=1.0)])
    (tmp_path / "summary.json").unlink()
    assert train(RayConfig(), [recipe()])[0].reused, "nothing is left to do, so no Ray starts"


def test_a_start_removes_models_whose_export_was_killed(
    run_config: Callable[..., PretrainConfig], tmp_path: Path
) -> None:
    for name in (".model.writing-1", ".model.old-2", ".other.writing-3"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").touch()
    prepare(tiny.TinyRecipe(run_config(tmp_path)))
    assert sorted(path.name for path in tmp_path.iterdir()) == [".other.writing-3", "config.yaml"]


def test_a_rank_that_ends_by_an_error_finishes_its_share_of_a_checkpoint(
    process_group: None,
    run_config: Callable[..., PretrainConfig],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As those do that lose a node after its announced end, for which the checkpoint was made."""
    run, failed = tmp_path / "run", tmp_path / "failed"
    commit = checkpoints.commit_shard

    def slowly(*arguments: Any) -> None:
        tiny.wait_for(failed)
        time.sleep(0.3)
        commit(*arguments)

    class LosesANode(tiny.TinyRecipe):
        def after_update(self, engine, step):
            if step == 4:
                failed.touch()
                raise RuntimeError("Connection closed by peer")
            return super().after_update(engine, step)

    monkeypatch.setattr(checkpoints, "commit_shard", slowly)
    recipe = LosesANode(run_config(run, micro_batch=8, validation_samples=8, checkpoint_every=3))
    prepare(recipe)
    with pytest.raises(RuntimeError, match="peer"):
        work(recipe)
    assert [found.step for found in checkpoints.committed(str(run))] == [3]
