"""Export of a run's newest checkpoint as a model folder, by one process without the other ranks."""

from __future__ import annotations

import itertools
import shutil

import torch
from torch import nn

from defi_platform import storage
from defi_platform.errors import CheckpointError
from defi_platform.storage.scratch import scratch
from defi_platform.train.checkpoint import format as checkpoints
from defi_platform.train.checkpoint.pieces import DamagedCheckpoint
from defi_platform.train.checkpoint.read import Reader, read_buffers
from defi_platform.train.engine.seeds import seed_of
from defi_platform.train.recipe import Recipe

ATTEMPTS = 5
"""Checkpoints that an export begins to read while the run goes on and deletes them."""


def export_model(recipe: Recipe, target: str) -> nn.Module:
    """Saves the model of the newest checkpoint with `save_pretrained`.

    Args:
        recipe: of the run.
        target: model folder, local or remote; an existing one is replaced as a whole.

    Returns: the model, as `load_model` gives it.
    Raises: CheckpointError when the run has no checkpoint, or the newest cannot be used.
    """
    run = recipe.config.train.output
    for attempt in itertools.count(1):
        found = checkpoints.committed(run)
        if not found:
            raise CheckpointError(
                f"{run} has no checkpoint to export from. Train first, or check train.output."
            )
        newest = found[0]
        try:
            model = load_model(recipe, newest)
            break
        except DamagedCheckpoint as error:
            # A run that goes on meanwhile deletes its older ones: then another is the newest now.
            if attempt == ATTEMPTS or newest.uri in [one.uri for one in checkpoints.committed(run)]:
                raise DamagedCheckpoint(
                    f"{error} To export the one before, where there is one, make a file "
                    f"{storage.join(newest.uri, checkpoints.PASSED_OVER)}."
                ) from error
    save_model(model, target)
    return model


def load_model(recipe: Recipe, checkpoint: checkpoints.Checkpoint) -> nn.Module:
    """Builds the model on CPU with the fp32 weights of a checkpoint, raw or averaged as `train.export_weights` says.

    Returns: the model, in evaluation mode.
    Raises: CheckpointError when the checkpoint is damaged, of another model or without the average that is asked for.
    """
    torch.manual_seed(seed_of(recipe.config.train.seed, "weights"))
    model = recipe.build()
    reader = Reader(checkpoint)
    kind = "ema" if recipe.config.train.export_weights == "average" else "param"
    if kind == "ema" and not reader.names("ema"):
        raise CheckpointError(
            f"{checkpoint.uri} has no average of the weights, which train.export_weights=average asks for. "
            "Export the raw ones (weights=raw), or train with train.ema_decay."
        )
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    with torch.no_grad():
        for name, value in reader.whole(kind, {name: one.shape for name, one in trained.items()}):
            trained[name].copy_(value)
        read_buffers(reader, model)
    return model.eval()


def save_model(model: nn.Module, target: str) -> None:
    """`save_pretrained` to a local or remote folder."""
    if not storage.is_remote(target):
        model.save_pretrained(storage.local_path(target))  # type: ignore[operator]
        return
    with scratch("export") as staging, storage.committed_folder(target) as folder:
        model.save_pretrained(staging / "model")  # type: ignore[operator]
        shutil.copytree(staging / "model", folder, dirs_exist_ok=True)
