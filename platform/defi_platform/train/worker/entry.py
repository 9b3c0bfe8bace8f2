"""Entry point of the Ray Train workers."""

from __future__ import annotations

import logging
from typing import Any

import ray.train.v2._internal.execution.context
from ray import cloudpickle

from defi_platform import logs, storage
from defi_platform.errors import UserError
from defi_platform.storage.outage import is_outage
from defi_platform.storage.remote import StorageUnavailable
from defi_platform.train.config_checks import check_device
from defi_platform.train.engine.deepspeed_engine import prepare_process
from defi_platform.train.failures import mark_step
from defi_platform.train.recipe import Recipe
from defi_platform.train.run_folder import retry_run_folder
from defi_platform.train.worker.loop import Training


def train_worker(config: dict[str, bytes]) -> dict[str, Any]:
    """Trains on one worker.

    Args:
        config: "pickled": the recipe, the time when the driver started it, whether its nodes are preemptible, and the
            file that appears when another job takes the run folder over.

    Returns: {} after a complete run, {"stopped": step} after a stop request, {"error": [type, message]} for an error
        that a user has caused and no retry can cure.
    """
    settings = cloudpickle.loads(config["pickled"])
    recipe: Recipe = settings["recipe"]
    with logs.process_log(), logs.about(run=recipe.config.train.output, kind=recipe.kind):
        return _train(recipe, settings)


def _train(recipe: Recipe, settings: dict[str, Any]) -> dict[str, Any]:
    # Ray Train logs every report under a logger named after its own file.
    logging.getLogger(ray.train.v2._internal.execution.context.__file__).setLevel(logging.WARNING)
    train = recipe.config.train
    prepare_process(train.use_gpu, train.threads, train.matmul_precision)
    # After a death the store may be away: every rank waits for it, before any of them waits for another.
    retry_run_folder(recipe.kind, train, lambda: storage.is_folder(train.output))
    try:
        check_device(train)
        training = Training(recipe, settings["started"], settings["preemptible"], settings["successor"])
    except StorageUnavailable:
        raise  # it may come back: Ray Train tries again
    except UserError as error:
        # The same on every rank: raising it would only make Ray Train try again.
        return {"error": [type(error).__name__, str(error)]}
    try:
        return training.run()
    except Exception as error:
        mark_step(error, training.step)
        if not is_outage(error):
            # Its share of a checkpoint may be all that is missing, as after the end of a node that was announced to go.
            training.saver.finish_uploads(train.preemption_grace_s)
        raise
