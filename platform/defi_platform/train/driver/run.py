"""The driver's side of training: checks, start, monitoring, and the summary of a complete run."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from defi_models.pretrained.replace_folder import remove_leftovers
from defi_platform import errors, logs, storage
from defi_platform.cluster import ray_session
from defi_platform.cluster.requirements import announce
from defi_platform.cluster.run_registry import register_run
from defi_platform.config import RayConfig
from defi_platform.config.data_checks import check_data, check_probe
from defi_platform.config.loader import to_yaml
from defi_platform.data.loader.shared_actors import start_shared_actors
from defi_platform.errors import MEND, TRY_AGAIN, CheckpointError, ConfigError, UserError
from defi_platform.storage.leases import FolderLease, in_use
from defi_platform.storage.writable import check_writable
from defi_platform.train.checkpoint.format import committed
from defi_platform.train.config_checks import (
    check_train_config,
    training_demands,
    worker_resources,
)
from defi_platform.train.driver.dry_run import DryRun, dry_run
from defi_platform.train.driver.ray_trainer import RunTrainer
from defi_platform.train.driver.resume import (
    CONFIG,
    Begun,
    begun,
    check_same_run,
    keep_begun,
    segments_now,
    set_aside,
)
from defi_platform.train.failures import FailureLog, RepeatedFailure
from defi_platform.train.observability.run_card import JSON, MARKDOWN
from defi_platform.train.observability.status import FILE as STATUS
from defi_platform.train.observability.status import StatusView
from defi_platform.train.ray_errors import format_error, root_cause, unwrap
from defi_platform.train.recipe import Recipe
from defi_platform.train.run_folder import retry_run_folder
from defi_platform.train.stop_request import STOP, request_stop
from defi_platform.train.worker.entry import train_worker
from defi_platform.train.worker.run_results import CURVES, MODEL, SUMMARY


class TrainingFailed(UserError):
    """A run that did not complete: its workers failed more often than allowed."""

    exit_code = TRY_AGAIN


@dataclass(frozen=True)
class RunSummary:
    """The summary of a complete run, and its folder."""

    folder: str
    values: dict[str, Any]
    reused: bool = False
    """The run was already complete; nothing was done."""

    @property
    def model(self) -> str:
        """The exported model folder."""
        return storage.join(self.folder, MODEL)

    def text(self) -> str:
        """The summary as lines for the console."""
        first, last = self.values["validation"]["first"], self.values["validation"]["last"]
        done = "was complete before" if self.reused else f"{self.values['wall_s']:.0f} s"
        return (
            f"{self.values['kind']}: {self.values['steps']} steps, {self.values['samples']} samples ({done}); "
            f"validation loss {first['loss']:.4f} -> {last['loss']:.4f}\n  model: {self.model}"
        )


def train(ray_config: RayConfig, recipes: Sequence[Recipe]) -> list[RunSummary]:
    """Runs trainings in parallel on one cluster; complete ones are left as they are.

    Returns: a summary per recipe, in their order.
    Raises: UserError for what is wrong before anything starts; TrainingFailed, after all others have ended,
        when one fails; FolderInUse when another job writes to a run's folder.
    """
    _check(recipes)
    summaries: dict[str, RunSummary] = {}
    pending = _to_do(recipes, summaries)
    with contextlib.ExitStack() as held:
        leases = {
            recipe.kind: held.enter_context(FolderLease(recipe.config.train.output, recipe.kind))
            for recipe in pending
        }
        # Once more: until this job had the folders, another one may have gone on in them, or to the end.
        pending = _to_do(list(pending), summaries)
        if not pending:
            return [summaries[recipe.kind] for recipe in recipes]
        with ray_session(ray_config):
            settings = {recipe.kind: recipe.config for recipe in pending}
            announce(
                training_demands(
                    {kind: config.train for kind, config in settings.items()},
                    {kind: config.data.decode.processes for kind, config in settings.items()},
                )
            )
            for recipe, before in pending.items():
                take_up(recipe, before)
                recipe.prepare()
            start_shared_actors()
            _run_all(list(pending), leases)
        for recipe in pending:
            run = recipe.config.train
            read = functools.partial(_summary, run.output)
            summaries[recipe.kind] = retry_run_folder(recipe.kind, run, read)
    return [summaries[recipe.kind] for recipe in recipes]


def _to_do(recipes: Sequence[Recipe], summaries: dict[str, RunSummary]) -> dict[Recipe, Begun | None]:
    """The recipes whose runs can go on, and what their folders hold; takes in the summaries of those that are complete."""
    pending = {}
    for recipe in recipes:
        folder = recipe.config.train.output
        if summary := complete_run(recipe):
            logs.say(f"{recipe.kind}: {folder} is complete, nothing to do", run=folder, kind=recipe.kind)
            summaries[recipe.kind] = summary
        else:
            check_writable(folder, "train.output")
            pending[recipe] = check_resumable(recipe)
    return pending


def dry_run_all(recipes: Sequence[Recipe]) -> list[DryRun]:
    """Dry runs of trainings, with all checks of `train`; nothing is started, no cluster is asked.

    Raises: UserError, as `train` would.
    """
    _check(recipes)
    for recipe in recipes:
        complete_run(recipe)
        check_resumable(recipe)
    return dry_run(recipes)


def _check(recipes: Sequence[Recipe]) -> None:
    for recipe in recipes:
        part = "" if len(recipes) == 1 else f"{recipe.kind}."
        check_train_config(recipe.config.train, f"{part}train")
        check_data(recipe.config.data, f"{part}data")
        if recipe.config.train.probe:
            check_probe(recipe.config.train.probe, f"{part}train.probe")
    folders = [recipe.config.train.output for recipe in recipes]
    if len(set(folders)) < len(folders):
        raise ConfigError(f"two trainings share train.output={folders[0]}. Give each a folder of its own.")
    for recipe in recipes:
        recipe.check()


def complete_run(recipe: Recipe) -> RunSummary | None:
    """The summary of a run that is complete; None for others.

    Raises: CheckpointError, ConfigError for one of another model, other inputs or other settings.
    """
    folder = recipe.config.train.output
    if not storage.exists(storage.join(folder, SUMMARY)):
        return None
    summary = _summary(folder, reused=True)
    before = begun(recipe, summary.values)
    assert before is not None
    check_same_run(recipe, before, complete=True)
    if segments_now(recipe, before) == before.segments:
        return summary
    if not committed(folder):
        steps = summary.values["steps"]
        raise CheckpointError(
            f"{folder} is complete at step {steps} and has no checkpoint any more to go on from. Set train.steps={steps}, or "
            "choose another train.output (model.init_from starts from the exported model)."
        )
    return None


def check_resumable(recipe: Recipe) -> Begun | None:
    """Checks that a run folder holds no run with other settings, and sets the recipe's segments.

    Returns: the run that it holds.
    Raises: CheckpointError for another model or other inputs; ConfigError for settings that the run cannot go on with.
    """
    recipe.begun_with = recipe.identity()["built_from"]
    if before := begun(recipe):
        check_same_run(recipe, before)
        recipe.segments = segments_now(recipe, before)
    return before


def take_up(recipe: Recipe, before: Begun | None) -> None:
    """Makes a run folder ready to go on: sets aside what came after the checkpoint of `train.restart_from`.

    Args:
        recipe: of the run.
        before: what the folder holds.
    """
    if before is None:
        return
    if aside := set_aside(before, (SUMMARY, MODEL, CURVES, JSON, MARKDOWN)):
        print(
            f"{recipe.kind}: goes on from step {before.step}; what came after is kept in {aside}, a run folder itself",
            flush=True,
        )
    keep_begun(before)


def _run_all(recipes: Sequence[Recipe], leases: Mapping[str, FolderLease]) -> None:
    outcomes: dict[str, BaseException | None] = {}
    for recipe in recipes:
        if leases[recipe.kind].is_lost():  # while data were prepared, by a job that saw no sign of life
            raise in_use(recipe.config.train.output, recipe.kind)
        prepare_folder(recipe)
        register_run(recipe.config.train.output)

    def run(recipe: Recipe) -> None:
        try:
            _fit(recipe, leases[recipe.kind])
            outcomes[recipe.kind] = None
        except BaseException as error:  # noqa: BLE001 - handed to the main thread, which raises it
            outcomes[recipe.kind] = error

    # In threads, because Ray Train's Ctrl-C handler ends the process with success.
    threads = [threading.Thread(target=run, args=(recipe,), daemon=True) for recipe in recipes]
    view = StatusView({recipe.kind: recipe.config.train.output for recipe in recipes})
    for thread in threads:
        thread.start()
    with _stop_on_interrupt(recipes, threads, view):
        _watch(threads, view, recipes, leases)
    failed = {kind: error for kind, error in outcomes.items() if error}
    if failed:
        raise _failure(failed, [recipe.kind for recipe in recipes if recipe.kind not in failed])


def _watch(
    threads: Sequence[threading.Thread],
    view: StatusView,
    recipes: Sequence[Recipe] = (),
    leases: Mapping[str, FolderLease] | None = None,
) -> None:
    """Shows the progress until all threads have ended.

    Raises: FolderInUse when another job has taken one of the run folders over.
    """
    while any(thread.is_alive() for thread in threads):
        time.sleep(0.2)
        view.refresh()
        for recipe in recipes:
            if leases and leases[recipe.kind].is_lost():
                raise in_use(recipe.config.train.output, recipe.kind)


@contextlib.contextmanager
def _stop_on_interrupt(
    recipes: Sequence[Recipe], threads: Sequence[threading.Thread], view: StatusView
) -> Iterator[None]:
    """Stops the runs at a checkpoint after Ctrl-C, and at once after a second one."""
    try:
        yield
    except KeyboardInterrupt:
        print("\nstopping at a checkpoint; Ctrl-C again to stop at once", flush=True)
        for recipe in recipes:
            request_stop(recipe.config.train.output)
        _watch(threads, view)
        raise


def prepare_folder(recipe: Recipe) -> None:
    """Writes the run's config and deletes the stop request, status and summary of an earlier attempt, and half models."""
    folder = recipe.config.train.output
    storage.write_text(storage.join(folder, CONFIG), to_yaml(recipe.config))
    for name in (STOP, STATUS, SUMMARY):
        storage.delete(storage.join(folder, name))
    if not storage.is_remote(folder):
        remove_leftovers(storage.local_path(storage.join(folder, MODEL)))


def _fit(recipe: Recipe, lease: FolderLease) -> None:
    settings = recipe.config.train
    digest = hashlib.sha256(to_yaml(recipe.config).encode()).hexdigest()[:16]
    failures = FailureLog(settings.output, recipe.kind, digest)
    before = failures.newest()
    trainer = RunTrainer(
        recipe.kind,
        train_worker,
        {"recipe": recipe, "started": time.time(), "successor": lease.successor},
        settings,
        worker_resources(settings),
        failures,
    )
    try:
        outcome = trainer.fit().return_value or {}  # type: ignore[attr-defined]  # Ray Train v2
    except Exception as error:
        if reason := failures.reason(before):
            raise RepeatedFailure(reason) from error
        raise
    if "error" in outcome:
        kind, message = outcome["error"]
        family = {cls.__name__: cls for cls in _families(errors.UserError)}
        raise family.get(kind, TrainingFailed)(message)
    if "stopped" in outcome:
        raise KeyboardInterrupt


def _families(base: type[UserError]) -> list[type[UserError]]:
    return [base] + [cls for sub in base.__subclasses__() for cls in _families(sub)]


def _failure(failed: dict[str, BaseException], fine: Sequence[str]) -> BaseException:
    """One error for all runs that failed; a single run's own error where it is the user's to fix."""
    first = next(iter(failed.values()))
    if isinstance(first, KeyboardInterrupt):
        return first
    if len(failed) == 1 and not fine and isinstance(first, UserError):
        return first
    reasons = "; ".join(f"{kind} failed: {_cause(error)}" for kind, error in failed.items())
    rest = f" Complete: {', '.join(fine)}." if fine else ""
    failure = TrainingFailed(f"{reasons}.{rest} The same command goes on from the last checkpoint.")
    failure.__cause__ = first
    if all(isinstance(error, UserError) and error.exit_code == MEND for error in failed.values()):
        failure.exit_code = MEND
    return failure


def _cause(error: BaseException) -> str:
    failures = getattr(error, "worker_failures", None)
    return format_error(root_cause(failures)[1] if failures else unwrap(error))


def _summary(folder: str, reused: bool = False) -> RunSummary:
    path = storage.join(folder, SUMMARY)
    try:
        return RunSummary(folder, json.loads(storage.read_text(path)), reused)
    except ValueError as error:
        raise CheckpointError(
            f"{path} is damaged. Delete it: the same command makes it again from the last checkpoint."
        ) from error
