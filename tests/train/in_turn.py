"""Several trainings one after the other in the same workers, which take longer to start than the steps of small models."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from ray import cloudpickle

from defi_platform import storage
from defi_platform.train.config_checks import worker_resources
from defi_platform.train.driver.ray_trainer import RunTrainer
from defi_platform.train.driver.run import check_resumable, prepare_folder
from defi_platform.train.recipe import Recipe
from defi_platform.train.worker.entry import train_worker
from defi_platform.train.worker.run_results import SUMMARY


def train_in_turn(recipes: Sequence[Recipe]) -> None:
    """What `train` does for each, by one Ray Train run: numbers of workers and resources are the first recipe's.

    A worker that dies is started again and goes on with the recipe that it was at.
    """
    for recipe in recipes:
        check_resumable(recipe)
        recipe.prepare()
        prepare_folder(recipe)
    train = recipes[0].config.train
    settings = {"recipes": list(recipes), "started": time.time()}
    outcome = RunTrainer("in_turn", work, settings, train, worker_resources(train)).fit()
    assert outcome.return_value == {}, outcome.return_value  # type: ignore[attr-defined]  # Ray Train v2


def work(config: dict[str, bytes]) -> dict[str, Any]:
    """Entry point of a worker; what a run that did not end says ends them all."""
    settings = cloudpickle.loads(config["pickled"])
    for recipe in settings["recipes"]:
        if storage.exists(storage.join(recipe.config.train.output, SUMMARY)):
            continue  # complete before this worker was started again
        if outcome := train_worker({"pickled": cloudpickle.dumps({**settings, "recipe": recipe})}):
            return outcome
    return {}
