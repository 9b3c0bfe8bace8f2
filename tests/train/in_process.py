"""Trainings without Ray: the real loop, engine, checkpoints and decoders, in this process or in two of its own."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import pytest
from ranks import Ranks
from ray import cloudpickle

from defi_platform.config import DataConfig
from defi_platform.data.latents.cache import CacheLocation
from defi_platform.data.loader.stream import local_batches
from defi_platform.data.sampling.plan import Plan
from defi_platform.data.sampling.sharding import Shard
from defi_platform.train.driver.run import RunSummary, check_resumable, complete_run, prepare_folder, take_up
from defi_platform.train.recipe import Recipe
from defi_platform.train.recipes import video_base
from defi_platform.train.worker.entry import train_worker

_one_run = threading.Lock()
"""A process group serves one run at a time."""


def prepare(recipe: Recipe) -> None:
    """Does the driver's part of a run before its workers start."""
    take_up(recipe, check_resumable(recipe))
    recipe.prepare()
    prepare_folder(recipe)


def work(recipe: Recipe) -> dict[str, Any]:
    """Runs a worker's part, as one rank of the process group that this process is in.

    Returns: {} after a complete run, else why it ended.
    """
    settings = {"recipe": recipe, "started": time.time(), "preemptible": False, "successor": None}
    with mock.patch.object(video_base, "stream", stream_here):
        return train_worker({"pickled": cloudpickle.dumps(settings)})


def train_here(recipe: Recipe) -> RunSummary:
    """Trains to the end, in a process group of this process alone."""
    prepare(recipe)
    assert work(recipe) == {}
    summary = complete_run(recipe)
    assert summary
    return summary


def fit_here(recipe: Recipe, lease: object = None) -> None:
    """What `train` has Ray Train's workers do for a run; of several that it starts at once, one after the other."""
    with _one_run:
        assert work(recipe) == {}


def work_in_turn(recipes: Sequence[Recipe]) -> None:
    """Runs a worker's part of each, prepared before, to its end; for `Ranks`."""
    for recipe in recipes:
        assert work(recipe) == {}


def die_there(recipe: Recipe, ranks: Ranks) -> None:
    """Trains in other processes until the recipe kills one of them."""
    prepare(recipe)
    with pytest.raises(AssertionError):
        ranks.run(functools.partial(work_in_turn, [recipe]))


def stream_here(
    plan: Plan,
    data: DataConfig,
    shard: Shard,
    cache: CacheLocation | None = None,
    keep_stats: object = None,
    run: str | None = None,
) -> Iterator[dict[str, Any]]:
    """The batches of `stream`, decoded in processes of this one's instead of Ray Data's actors."""
    return local_batches(plan, data, shard, cache=cache)
