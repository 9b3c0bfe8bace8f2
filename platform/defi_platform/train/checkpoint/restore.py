"""Resume: the newest whole checkpoint, restored into the model and the engine."""

from __future__ import annotations

from torch import nn

from defi_platform import storage
from defi_platform.errors import CheckpointError
from defi_platform.train.checkpoint import format as checkpoints
from defi_platform.train.checkpoint.format import Position
from defi_platform.train.engine.collectives import Communicator
from defi_platform.train.engine.deepspeed_engine import TrainingEngine
from defi_platform.train.recipe import Recipe


def restore_engine(
    recipe: Recipe, model: nn.Module, plan_fingerprint: str, communicator: Communicator
) -> tuple[TrainingEngine, Position | None]:
    """Makes the engine around a model, both in the state of the newest whole checkpoint (collective).

    Args:
        recipe: of the run.
        model: on CPU, as the recipe builds it; its weights and buffers are overwritten.
        plan_fingerprint: of the plan that training will read.
        communicator: of this rank.

    Returns: the engine and the progress of the run, None at its start.
    Raises: CheckpointError for a checkpoint of another model or of other data.
    """
    train = recipe.config.train
    reader = _open_newest(recipe, communicator)
    if reader is None:
        return TrainingEngine(model, train, communicator.world_size), None
    with reader:
        _check_plan(recipe, reader.position, plan_fingerprint, communicator.is_rank_zero)
        shapes = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                shapes[name] = parameter.shape
                parameter.data.copy_(reader.read("param", name, parameter.shape))
        for name, buffer in model.named_buffers():
            if name in reader.names("buffer"):
                buffer.copy_(reader.read("buffer", name, buffer.shape))
            if name in recipe.summed_buffers and not communicator.is_rank_zero:
                # The sum over the ranks lives on in rank 0's count alone.
                buffer.zero_()
        extra = sorted(set(reader.names("param")) - set(shapes))
        if extra:
            raise CheckpointError(
                f"the checkpoint in {train.output} also holds '{extra[0]}', which this model has not. "
                "Choose another train.output, or the settings that it was written with."
            )
        engine = TrainingEngine(model, train, communicator.world_size)
        engine.restore(reader.position.scalars, lambda name, kind: reader.read(kind, name, shapes[name]))
    if communicator.is_rank_zero:
        print(f"{recipe.kind}: goes on from step {reader.position.step}", flush=True)
    return engine, reader.position


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


def _open_newest(recipe: Recipe, communicator: Communicator) -> checkpoints.Reader | None:
    """Opens the newest checkpoint that is whole; rank 0 chooses, so that all take the same."""
    train = recipe.config.train
    choice: str | None = None
    if communicator.is_rank_zero:
        for candidate in checkpoints.committed(train.output):
            try:
                checkpoints.Reader(candidate).close()
            except checkpoints.DamagedCheckpoint as error:
                print(f"{recipe.kind}: {error} Falling back to the one before.", flush=True)
                storage.delete(candidate.uri)
                continue
            choice = candidate.uri
            break
        checkpoints.prune(train.output, train.keep_checkpoints, unfinished=True, keep_best=train.keep_best)
    choice = communicator.broadcast(choice)
    for candidate in checkpoints.committed(train.output):
        if candidate.uri == choice:
            return checkpoints.Reader(candidate)
    return None
