"""Whole runs: what is left of them, and that nothing is lost when workers die on a real Ray."""

from __future__ import annotations

import functools
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
from in_process import die_there, prepare, train_here, work_in_turn
from ranks import Ranks

from defi_platform.config import PretrainConfig, RayConfig
from defi_platform.errors import CheckpointError, ConfigError
from defi_platform.train.checkpoint import format as checkpoints
from defi_platform.train.driver.run import TrainingFailed, train

Make = Callable[..., PretrainConfig]
pytestmark = pytest.mark.slow


HEALTHY = {"num_workers": 2, "zero_stage": 2}
"""Settings of the run to which nothing happens."""


@pytest.fixture(scope="module")
def together(ray_cluster: None, run_config: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three runs side by side on Ray. killed: a worker dies after step 8 and no failure is allowed. again: the same, but
    one failure is. diverging: its weights are ruined after step 7."""
    folder = tmp_path_factory.mktemp("runs")
    recipes = [
        tiny.TinyRecipe(run_config(folder / "killed", max_failures=0), "killed", kill_at=8),
        tiny.TinyRecipe(run_config(folder / "again"), "again", kill_at=8),
        tiny.TinyRecipe(run_config(folder / "diverging"), "diverging", diverge_at=7),
    ]
    with pytest.raises(TrainingFailed) as failed:
        train(RayConfig(), recipes)
    message = str(failed.value)
    assert "killed failed" in message and "diverging failed" in message and "Complete: again." in message
    assert "samples 56 to 79" in message and "learning_rate (0.01)" in message
    assert not [name for name in os.environ if name.startswith("RAY_TRAIN_")], "of one run, seen by all"
    return folder


@pytest.fixture(scope="module")
def uninterrupted(two_ranks: Ranks, run_config: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two workers, twelve steps, nothing happens."""
    folder = tmp_path_factory.mktemp("healthy") / "run"
    recipe = tiny.TinyRecipe(run_config(folder, **HEALTHY), "healthy")
    prepare(recipe)
    two_ranks.run(functools.partial(work_in_turn, [recipe]))
    return folder


def test_a_run_leaves_all_that_its_folder_promises(uninterrupted: Path) -> None:
    names = {path.name for path in uninterrupted.iterdir()}
    assert {"config.yaml", "metrics.jsonl", "curves.png", "checkpoints", "model", "summary.json"} <= names
    summary = json.loads((uninterrupted / "summary.json").read_text())
    assert summary["samples"] == 96 and summary["resumed_from"] is None
    assert set(tiny.losses(uninterrupted, "validation")) == {0, 6, 12}
    assert len(checkpoints.committed(str(uninterrupted))) == 2
    assert summary["validation"]["last"]["loss"] < summary["validation"]["first"]["loss"]


def test_a_complete_run_started_again_does_nothing(uninterrupted: Path, run_config: Make) -> None:
    before = (uninterrupted / "metrics.jsonl").stat().st_mtime_ns
    (summary,) = train(RayConfig(), [tiny.TinyRecipe(run_config(uninterrupted, **HEALTHY), "healthy")])
    assert summary.reused
    assert (uninterrupted / "metrics.jsonl").stat().st_mtime_ns == before


def test_a_killed_worker_costs_nothing_but_time(
    together: Path, process_group: None, run_config: Make, tmp_path: Path
) -> None:
    whole, run = tmp_path / "whole", together / "again"
    train_here(tiny.TinyRecipe(run_config(whole), "healthy"))
    check_killed(run, whole)


def test_a_rank_of_two_that_is_killed_costs_nothing_but_time(
    uninterrupted: Path, two_ranks: Ranks, run_config: Make, tmp_path: Path
) -> None:
    recipe = tiny.TinyRecipe(run_config(tmp_path, **HEALTHY), "again", kill_at=8)
    die_there(recipe, two_ranks)
    prepare(recipe)
    two_ranks.run(functools.partial(work_in_turn, [recipe]))
    # Buffers that each rank counts for itself were summed into the checkpoint and not counted twice.
    check_killed(tmp_path, uninterrupted)


def check_killed(run: Path, whole: Path) -> None:
    """Compares a run that was killed after step 8 with one that was not."""
    assert (run / "killed_8").exists()
    assert json.loads((run / "summary.json").read_text())["resumed_from"] == 5
    assert tiny.losses(run) == tiny.losses(whole)
    assert tiny.losses(run, "validation") == tiny.losses(whole, "validation")
    assert tiny.final_count(run) == tiny.final_count(whole) == 96


def test_one_of_two_trainings_failing_leaves_the_other_alone(together: Path) -> None:
    assert (together / "again" / "summary.json").exists()
    assert not (together / "killed" / "summary.json").exists()


def test_losses_that_are_no_number_stop_a_run_with_the_checkpoint_before_them_whole(
    together: Path,
) -> None:
    run = together / "diverging"
    assert max(tiny.losses(run)) == 7
    assert [row["samples"] for row in tiny.rows(run, "skipped")] == [[56, 63], [64, 71]]
    assert [row["samples"] for row in tiny.rows(run, "diverged")] == [[56, 79]]
    assert [found.step for found in checkpoints.committed(str(run))] == [5]


def test_a_run_goes_on_with_two_workers_and_zero_3_from_the_checkpoint_before_a_damaged_one(
    together: Path, uninterrupted: Path, two_ranks: Ranks, run_config: Make
) -> None:
    run = together / "killed"
    newest = checkpoints.committed(str(run))[0]
    assert newest.step == 5
    copy = run / "checkpoints" / checkpoints.folder_name(6, "abcdef")
    copy.mkdir()
    for file in Path(newest.uri).iterdir():
        # Only who reads that part finds it.
        flip = -1 if file.suffix == ".safetensors" else None
        (copy / file.name).write_bytes(file.read_bytes()[:flip] + (b"?" if flip else b""))

    recipe = tiny.TinyRecipe(run_config(run, num_workers=2, zero_stage=3), "killed", kill_at=8)
    prepare(recipe)
    two_ranks.run(functools.partial(work_in_turn, [recipe]))
    assert json.loads((run / "summary.json").read_text())["resumed_from"] == 5
    attempts = [(row["step"], row["workers"], row["zero_stage"]) for row in tiny.rows(run, "attempt")]
    assert attempts == [(0, 1, 1), (5, 2, 3)]
    assert not copy.exists()
    reference = tiny.losses(uninterrupted)
    assert tiny.losses(run) == pytest.approx(reference, rel=1e-5)
    assert tiny.losses(run) != reference, "the sums were made in another order, so this cannot be luck"


def test_a_run_folder_of_another_model_is_refused(uninterrupted: Path, run_config: Make) -> None:
    config = run_config(uninterrupted, **HEALTHY, steps=20)
    with pytest.raises(CheckpointError, match="kind 'healthy' there, 'other' in the config"):
        train(RayConfig(), [tiny.TinyRecipe(config, "other")])


def test_settings_that_would_change_the_data_order_are_refused(uninterrupted: Path, run_config: Make) -> None:
    config = run_config(uninterrupted, **HEALTHY, steps=20, global_batch=16)
    with pytest.raises(ConfigError, match=r"train\.global_batch=8, now it is 16"):
        train(RayConfig(), [tiny.TinyRecipe(config, "healthy")])


def test_a_complete_run_can_be_extended_and_moved(
    uninterrupted: Path,
    process_group: None,
    run_config: Make,
    tmp_path: Path,
    recorded_metrics: dict[tuple[str, ...], float],
) -> None:
    folder = tmp_path / "moved"
    shutil.copytree(uninterrupted, folder)
    summary = train_here(tiny.TinyRecipe(run_config(folder, zero_stage=2, steps=14), "healthy"))
    assert summary.values["resumed_from"] == 12
    assert sorted(tiny.losses(folder)) == list(range(1, 15))
    counted = {name: value for (name, *labels), value in recorded_metrics.items() if len(labels) == 2}
    assert counted["defi_train_samples_total"] == 2 * 8, "of this attempt alone"
    assert (counted["defi_train_step"], counted["defi_train_progress_ratio"]) == (14, 1.0)
    assert recorded_metrics["defi_train_events_total", str(folder), "healthy", "attempt"] == 1
    assert recorded_metrics["defi_train_phase_seconds_total", str(folder), "healthy", "forward"] > 0


def test_two_trainings_cannot_share_a_folder(tmp_path: Path, run_config: Make) -> None:
    with pytest.raises(ConfigError, match=r"share train\.output"):
        train(RayConfig(), [tiny.TinyRecipe(run_config(tmp_path), name) for name in ("x", "y")])
