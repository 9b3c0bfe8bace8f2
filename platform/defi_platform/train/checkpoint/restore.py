"""Resume: the newest checkpoint that all ranks can use, of which each reads its own share alone."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple, TypeVar

from torch import nn

from defi_platform.errors import CheckpointError
from defi_platform.retry import RetryPolicy, retry
from defi_platform.storage import StorageError
from defi_platform.storage.remote import StorageUnavailable
from defi_platform.train.checkpoint import format as checkpoints
from defi_platform.train.checkpoint.format import Checkpoint, Position, Unusable
from defi_platform.train.checkpoint.pieces import DamagedCheckpoint, PieceIndex, read_index
from defi_platform.train.checkpoint.read import Reader, read_buffers
from defi_platform.train.engine.collectives import Communicator
from defi_platform.train.engine.deepspeed_engine import TrainingEngine
from defi_platform.train.engine.sharded_state import MOMENTS
from defi_platform.train.recipe import Recipe

DISK_ERRORS = RetryPolicy(max_attempts=3, first_pause_s=1.0)
"""Of a file that cannot be read, before the checkpoint counts as one that cannot; remote stores are asked longer."""

Answer = TypeVar("Answer")


class Problem(NamedTuple):
    """Reason for which a rank cannot use a checkpoint."""

    message: str
    away: bool
    """The store does not answer: no reason to take an older one."""


def restore_engine(
    recipe: Recipe, model: nn.Module, plan_fingerprint: str, communicator: Communicator
) -> tuple[TrainingEngine, Position | None]:
    """Makes the engine around a model, in the state of the newest whole checkpoint (collective).

    Each rank reads what it holds itself of the weights and moments. A checkpoint that some rank cannot use is passed
    over for the one before, by all of them; of the others none is, since a run must not begin anew by mistake.

    Args:
        recipe: of the run.
        model: on CPU, as the recipe builds it.
        plan_fingerprint: of the plan that training will read.
        communicator: of this rank.

    Returns: the engine and the progress of the run, None at its start.
    Raises: CheckpointError for a checkpoint of another model or of other data, or when there are some and none can be
        used; StorageUnavailable.
    """
    train = recipe.config.train
    engine = TrainingEngine(model, train, communicator.world_size)
    there = communicator.broadcast(checkpoints.listing(train.output) if communicator.is_rank_zero else None)
    assert there
    found, unusable = there.committed, there.unusable
    # Those that were passed over before have been spoken of.
    failed: list[tuple[Checkpoint | Unusable, str]] = [(one, one.reason) for one in unusable if one.reason]
    if communicator.is_rank_zero:
        for _, message in failed:
            print(f"{recipe.kind}: {message} It is passed over.", flush=True)
    position = None
    for checkpoint in found:
        check = functools.partial(_check_plan, recipe, checkpoint.position, plan_fingerprint)
        communicator.together(functools.partial(check, communicator.is_rank_zero))
        problem = _restore(recipe, engine, checkpoint, communicator)
        if problem is None:
            position = checkpoint.position
            break
        if problem.away:
            raise StorageUnavailable(problem.message)
        failed.append((checkpoint, problem.message))
        if communicator.is_rank_zero:
            print(f"{recipe.kind}: {problem.message} Falling back to the one before.", flush=True)
    if (found or unusable) and position is None:
        raise CheckpointError(
            checkpoints.none_usable(train.output, len(found), unusable, [message for _, message in failed])
        )
    if communicator.is_rank_zero:
        for broken, message in failed:
            checkpoints.pass_over(broken, message)
        checkpoints.prune(train.output, train.keep_checkpoints, unfinished=True, keep_best=train.keep_best)
        if position:
            print(f"{recipe.kind}: goes on from step {position.step}", flush=True)
    return engine, position


def _restore(
    recipe: Recipe, engine: TrainingEngine, checkpoint: Checkpoint, communicator: Communicator
) -> Problem | None:
    """Sets the state of a checkpoint (collective).

    Returns: why some rank could not, the same on all of them.
    Raises: CheckpointError, on all ranks, for a checkpoint of another model.
    """
    index: PieceIndex | None = None
    problem = None
    if communicator.is_rank_zero:
        index, problem = _attempt(checkpoint, lambda: read_index(checkpoint.uri, checkpoint.markers))
    index, problem = communicator.broadcast((index, problem))
    if index is None:
        return problem
    scalars = checkpoint.position.scalars

    def read_share(index: PieceIndex) -> None:
        _check_model(recipe, engine, index, scalars)
        reader = Reader(checkpoint, index, communicator.rank, communicator.world_size)
        engine.restore_share(scalars, reader.spans)
        read_buffers(reader, engine.module)

    _, problem = _attempt(checkpoint, lambda: read_share(index))
    problems = [one for one in communicator.gather(problem) if one]
    if problems:
        return max(problems, key=lambda one: one.away)
    engine.end_restore(scalars)
    if not communicator.is_rank_zero:
        for name, buffer in engine.module.named_buffers():
            if name in recipe.summed_buffers:
                # The sum over the ranks lives on in rank 0's count alone.
                buffer.zero_()
    return None


def _attempt(checkpoint: Checkpoint, request: Callable[[], Answer]) -> tuple[Answer | None, Problem | None]:
    """The request's answer, or why there is none that a rank must not keep to itself."""
    try:
        return retry(request, DISK_ERRORS, is_transient=lambda error: isinstance(error, OSError)), None
    except DamagedCheckpoint as error:
        return None, Problem(str(error), away=False)
    except (OSError, StorageError) as error:
        message = f"{checkpoint.uri} cannot be read: {error}".rstrip(".") + "."
        return None, Problem(message, away=isinstance(error, StorageUnavailable))


def _check_model(
    recipe: Recipe, engine: TrainingEngine, index: PieceIndex, scalars: dict[str, float]
) -> None:
    shapes = engine.trained_shapes()
    for kind in ("param", *(MOMENTS if scalars["adam_step"] else ())):
        index.check(kind, shapes)
    if engine.ema and "ema_updates" in scalars:
        index.check("ema", shapes)
    extra = sorted(set(index.names("param")) - set(shapes))
    if extra:
        raise CheckpointError(
            f"the checkpoint in {recipe.config.train.output} also holds '{extra[0]}', which this model has not. "
            "Choose another train.output, or the settings that it was written with."
        )


def _check_plan(recipe: Recipe, position: Position, fingerprint: str, announce: bool) -> None:
    if position.plan == fingerprint:
        return
    run = recipe.config.train.output
    if recipe.config.data.take_in_new and position.data != recipe.data_version():
        if announce:
            print(
                f"{recipe.kind}: data.take_in_new: the samples from step {position.step} on are of other videos in "
                "another order",
                flush=True,
            )
        return
    raise CheckpointError(
        f"the videos or how they are sampled have changed since {run} reached step "
        f"{position.step}: its sample numbers would mean other samples. Restore the corpora and "
        "data settings, or choose another train.output."
    )
