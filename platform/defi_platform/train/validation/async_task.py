"""Validation beside training: a task of its own looks closely at a checkpoint while the workers go on.

A Ray task that rank 0 starts, and not Ray Train's `ValidationConfig`: that validates checkpoints which Ray Train keeps
in its own storage, which every node would have to share, and ours reach the run folder behind the training steps.
"""

from __future__ import annotations

import time

import ray
from ray import cloudpickle

from defi_platform.train.checkpoint import format as checkpoints
from defi_platform.train.checkpoint.export import load_model
from defi_platform.train.ray_errors import format_error, unwrap
from defi_platform.train.recipe import EvalReport, Recipe
from defi_platform.train.validation.loss import held_out_batches

WAIT_AT_THE_END_S = 600.0
"""For the validation that is still under way when training ends."""
LOOK_EVERY_S = 0.5


class AsyncValidation:
    """Rank 0's side: at most one validation is under way, and what it will look at is not deleted meanwhile.

    A validation that fails is told and counted; it never stops training.
    """

    def __init__(self, recipe: Recipe):
        self._recipe, self._train = recipe, recipe.config.train
        self._task: ray.ObjectRef[bytes] | None = None
        self.step: int | None = None
        """Of the checkpoint that is being validated."""
        self.counts = {"done": 0, "failed": 0, "left_out": 0}

    def consider(self, step: int) -> None:
        """Starts on the checkpoint of this step when one is due; leaves it out while the last one is under way."""
        if not self._due(step):
            return
        if self.step is not None:
            self.leave_out(step)
            return
        resources = dict(self._train.async_validation_resources)
        task = ray.remote(validate_checkpoint).options(
            num_cpus=resources.pop("CPU", 0.0),
            num_gpus=resources.pop("GPU", 0.0),
            resources=resources,
            # Not in the placement group of the workers, which has no room.
            scheduling_strategy="DEFAULT",
            max_retries=0,
        )
        self.step, self._task = step, task.remote(cloudpickle.dumps(self._recipe), step)

    def leave_out(self, step: int) -> None:
        """Counts the one of this step, when it is due, as left out."""
        self.counts["left_out"] += self._due(step)

    def _due(self, step: int) -> bool:
        every = self._train.async_validation_every
        return bool(every) and step % every == 0

    def finished(self, wait_s: float = 0.0) -> tuple[int, EvalReport] | None:
        """The step and what was found, once, of a validation that has ended well.

        Args:
            wait_s: how long to wait for one that is under way; after it that one is given up.
        """
        if self._task is None:
            return None
        done, _ = ray.wait([self._task], timeout=wait_s)
        if not done and not wait_s:
            return None
        step, task, self.step, self._task = self.step, self._task, None, None
        try:
            if not done:
                ray.cancel(task, force=True)
                raise TimeoutError(f"not ready {wait_s:.0f} s after the end of training")
            found = cloudpickle.loads(ray.get(task))
        except Exception as error:  # noqa: BLE001 - whatever ends it, training goes on
            self.counts["failed"] += 1
            print(
                f"{self._recipe.kind}: validation beside training, step {step}: {format_error(unwrap(error))}",
                flush=True,
            )
            return None
        assert step is not None
        self.counts["done"] += 1
        return step, found


def validate_checkpoint(pickled: bytes, step: int) -> bytes:
    """What the recipe finds out about the model of one checkpoint, on the GPU where the task was given one.

    Args:
        pickled: the recipe; the checkpoint may take its `storage_patience_s` to reach the run folder.
    Returns: the EvalReport, pickled. Raises: TimeoutError when the checkpoint does not come.
    """
    recipe: Recipe = cloudpickle.loads(pickled)
    train = recipe.config.train
    found = _committed(train.output, step, train.storage_patience_s)
    model = load_model(recipe, found).to("cuda" if ray.get_gpu_ids() else "cpu")
    batch = held_out_batches(recipe, 0, 1)[0]
    return cloudpickle.dumps(recipe.evaluate(model, batch, train.output, step))


def _committed(run: str, step: int, patience_s: float) -> checkpoints.Found:
    deadline = time.monotonic() + patience_s
    while True:
        for found in checkpoints.committed(run):
            if found.step == step:
                return found
        if time.monotonic() > deadline:
            raise TimeoutError(f"no checkpoint of step {step} in {run} after {patience_s:.0f} s")
        time.sleep(LOOK_EVERY_S)
