"""How an attempt begins: the newest whole checkpoint, put into the model and the engine."""

from __future__ import annotations

from torch import nn

from defi_platform import storage
from defi_platform.errors import CheckpointError
from defi_platform.train.checkpoint import format as checkpoints
from defi_platform.train.checkpoint.format import Position
from defi_platform.train.engine.collectives import Ranks
from defi_platform.train.engine.deepspeed_engine import TrainingEngine
from defi_platform.train.recipe import Recipe


def restored(
    recipe: Recipe, model: nn.Module, plan_fingerprint: str, ranks: Ranks
) -> tuple[TrainingEngine, Position | None]:
    """The engine around the model, both as the newest whole checkpoint left them (collective).

    Returns: the engine, and where the run stands; None at its start.
    Raises: CheckpointError for a checkpoint of another model or of other data.
    """
    train = recipe.config.train
    reader = _newest(recipe, ranks)
    if reader is None:
        return TrainingEngine(model, train, ranks.world_size), None
    with reader:
        _check_plan(train.output, reader.position, plan_fingerprint)
        shapes = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                shapes[name] = parameter.shape
                parameter.data.copy_(reader.read("param", name, parameter.shape))
        for name, buffer in model.named_buffers():
            if name in reader.names("buffer"):
                buffer.copy_(reader.read("buffer", name, buffer.shape))
            if name in recipe.summed_buffers and not ranks.first:
                # The sum over the ranks lives on in rank 0's count alone.
                buffer.zero_()
        extra = sorted(set(reader.names("param")) - set(shapes))
        if extra:
            raise CheckpointError(
                f"the checkpoint in {train.output} also holds '{extra[0]}', which this model has not. "
                "Choose another train.output, or the settings that it was written with."
            )
        engine = TrainingEngine(model, train, ranks.world_size)
        engine.restore(reader.position.scalars, lambda name, kind: reader.read(kind, name, shapes[name]))
    if ranks.first:
        print(f"{recipe.kind}: goes on from step {reader.position.step}", flush=True)
    return engine, reader.position


def _check_plan(run: str, position: Position, fingerprint: str) -> None:
    if position.plan != fingerprint:
        raise CheckpointError(
            f"the videos or how they are sampled have changed since {run} reached step "
            f"{position.step}: its sample numbers would mean other samples. Restore the corpora and "
            "data settings, or choose another train.output."
        )


def _newest(recipe: Recipe, ranks: Ranks) -> checkpoints.Reader | None:
    """Opens the newest checkpoint that is whole; rank 0 chooses, so that all take the same."""
    train = recipe.config.train
    choice: str | None = None
    if ranks.first:
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
    choice = ranks.from_first(choice)
    for candidate in checkpoints.committed(train.output):
        if candidate.uri == choice:
            return checkpoints.Reader(candidate)
    return None
