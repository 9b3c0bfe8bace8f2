"""Asynchronous validation: a Ray task evaluates a checkpoint while the workers train.

Rank 0 starts it, and not Ray Train's `ValidationConfig`: that validates checkpoints in Ray Train's own storage, which
every node would have to share, and ours reach the run folder after their step.
"""

from __future__ import annotations

import ray
from ray import cloudpickle

from defi_platform import roles
from defi_platform.retry import RetryPolicy, retry
from defi_platform.train.checkpoint import format as checkpoints
from defi_platform.train.checkpoint.export import load_model
from defi_platform.train.ray_errors import format_error, unwrap
from defi_platform.train.recipe import EvalReport, Recipe
from defi_platform.train.validation.loss import evaluation_batch

FINAL_TIMEOUT_S = 600.0
"""For the validation that is under way when training ends."""
POLL_INTERVAL_S = 0.5


class AsyncValidation:
    """Rank 0's side: at most one validation is under way.

    A validation that fails is reported and counted; it never stops training.
    """

    def __init__(self, recipe: Recipe):
        self._recipe, self._train = recipe, recipe.config.train
        self._task: ray.ObjectRef[bytes] | None = None
        self.step: int | None = None
        """Of the checkpoint that is being validated, which must not be deleted meanwhile."""
        self.counts = {"done": 0, "failed": 0, "left_out": 0}

    def start_if_due(self, step: int) -> None:
        """Starts on the checkpoint of this step when one is due; skips it while the last one is under way."""
        if not self._due(step):
            return
        if self.step is not None:
            self.skip(step)
            return
        resources = dict(self._train.async_validation_resources)
        task = ray.remote(validate_checkpoint).options(
            num_cpus=resources.pop("CPU", 0.0),
            num_gpus=resources.pop("GPU", 0.0),
            resources=resources,
            # Not in the placement group of the workers, which has no room.
            scheduling_strategy="DEFAULT",
            max_retries=0,
            **roles.options(roles.TRAIN),
        )
        pickled = cloudpickle.dumps(self._recipe)
        self.step, self._task = step, task.remote(pickled, step)

    def skip(self, step: int) -> None:
        """Counts the validation of this step, when one is due, as skipped."""
        self.counts["left_out"] += self._due(step)

    def _due(self, step: int) -> bool:
        every = self._train.async_validation_every
        return bool(every) and step % every == 0

    def poll(self, wait_s: float = 0.0) -> tuple[int, EvalReport] | None:
        """Takes the result of a validation that has succeeded.

        Args:
            wait_s: longest wait for one that is under way, after which it is cancelled; 0 does not wait or cancel.

        Returns: its step and report, once; None when there is nothing new.
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
            report: EvalReport = cloudpickle.loads(ray.get(task))
        except Exception as error:  # noqa: BLE001 - whatever ends it, training must not end
            self.counts["failed"] += 1
            cause = format_error(unwrap(error))
            print(f"{self._recipe.kind}: async validation of step {step} failed: {cause}", flush=True)
            return None
        assert step is not None
        self.counts["done"] += 1
        return step, report


def validate_checkpoint(pickled: bytes, step: int) -> bytes:
    """Evaluates the model of one checkpoint, on the GPU where the task was given one.

    Args:
        pickled: the recipe; the checkpoint may take its `storage_patience_s` to reach the run folder.
        step: of the checkpoint.

    Returns: the EvalReport, pickled.
    Raises: TimeoutError when the checkpoint does not come.
    """
    recipe: Recipe = cloudpickle.loads(pickled)
    train = recipe.config.train
    checkpoint = _wait_for_checkpoint(train.output, step, train.storage_patience_s)
    model = load_model(recipe, checkpoint).to("cuda" if ray.get_gpu_ids() else "cpu")
    recipe.read_texts(model)
    report = recipe.evaluate(model, evaluation_batch(recipe), train.output, step)
    pickled_report: bytes = cloudpickle.dumps(report)
    return pickled_report


def _wait_for_checkpoint(run: str, step: int, timeout_s: float) -> checkpoints.Checkpoint:
    def find() -> checkpoints.Checkpoint:
        for checkpoint in checkpoints.committed(run):
            if checkpoint.step == step:
                return checkpoint
        raise TimeoutError(f"no checkpoint of step {step} in {run} after {timeout_s:.0f} s")

    policy = RetryPolicy(timeout_s=timeout_s, first_pause_s=POLL_INTERVAL_S, max_pause_s=POLL_INTERVAL_S)
    return retry(find, policy, is_transient=lambda error: isinstance(error, TimeoutError))
