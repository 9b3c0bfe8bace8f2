"""Validation loss on held-out samples: the same ones with the same noise each time, whatever the world size."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from defi_platform.train.engine.collectives import Communicator
from defi_platform.train.engine.deepspeed_engine import TrainingEngine
from defi_platform.train.engine.seeds import sample_generators, seed_of
from defi_platform.train.recipe import Recipe

Forward = Callable[[dict[str, Any], list[int], str], dict[str, Tensor]]


def forward_pass(
    engine: TrainingEngine, seed: int, batch: dict[str, Any], samples: list[int], purpose: str
) -> dict[str, Tensor]:
    """Outputs of the model for one micro-batch; their randomness depends on the sample numbers alone.

    Args:
        engine: around the model.
        seed: of the run.
        batch: on the engine's device.
        samples: sample numbers of the batch.
        purpose: of the noise, "noise" or "validation".

    Returns: the outputs by name, among them the scalar "loss".
    """
    # Dropout uses torch's global generator: seeded by the micro-batch's first sample number, it does not depend on
    # which rank computes it, nor on what was computed before.
    torch.manual_seed(seed_of(seed, "dropout", samples[0]))
    device = engine.device if engine.noise == "device" else torch.device("cpu")
    return engine.forward(batch, sample_generators(seed, purpose, samples, device))


def to_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """The batch with its tensors on `device`; text and the numbers of the samples, which the host reads, stay."""
    return {
        name: value.to(device, non_blocking=True) if isinstance(value, Tensor) and name != "sample" else value
        for name, value in batch.items()
    }


def scalars(outputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The scalar floating-point outputs of a model, detached."""
    return {
        name: value.detach()
        for name, value in outputs.items()
        if isinstance(value, Tensor) and value.ndim == 0 and value.is_floating_point()
    }


def evaluation_batch(recipe: Recipe) -> dict[str, Any]:
    """The held-out samples that `Recipe.evaluate` gets, as one batch on CPU; {} where it takes none."""
    number = recipe.evaluated_samples
    if not number:
        return {}
    return next(iter(recipe.validation_stream(recipe.plan("validation"), 0, number, number)))


class Validator:
    """Computes the validation loss over all ranks, with the weights that are exported.

    Args:
        recipe: of the run.
        engine: around its model.
        communicator: of this rank.
    """

    def __init__(self, recipe: Recipe, engine: TrainingEngine, communicator: Communicator):
        self._recipe, self._engine, self._communicator = recipe, engine, communicator
        self._train = recipe.config.train
        self._batches: list[dict[str, Any]] | None = None

    @torch.no_grad()
    def run(self) -> dict[str, Any]:
        """The mean of every scalar output, and the recipe's own metrics (collective)."""
        batches = self._own_batches()
        size, shares = self._train.micro_batch, self._shares()
        passes = [-(-len(share) // size) for share in shares]
        own = passes[self._communicator.rank]
        sums: dict[str, Tensor] = {}
        counts: Tensor | None = None
        averaged = self._train.export_weights == "average"
        with self._engine.ema_weights() if averaged else nullcontext():
            self._engine.module.eval()
            for number in range(max(passes)):
                # Under ZeRO 3 every rank has to take part in every forward pass, so a rank that has run out
                # repeats its last batch and leaves it out of the sums.
                batch = to_device(batches[min(number, len(batches) - 1)], self._engine.device)
                samples = batch["sample"].tolist()
                outputs = forward_pass(self._engine, self._train.seed, batch, samples, "validation")
                taken = number < own
                # Batches differ in size, so each counts by its samples.
                for name, value in scalars(outputs).items():
                    term = taken * len(samples) * value.double().cpu()
                    sums[name] = sums.get(name, torch.zeros((), dtype=torch.float64)) + term
                batch_counts = self._recipe.validation_counts(outputs)
                if batch_counts is not None:
                    batch_counts = taken * batch_counts.double().cpu()
                    counts = batch_counts if counts is None else counts + batch_counts
        share = self._communicator.world_size / self._train.validation_samples
        row: dict[str, Any] = dict(
            self._communicator.mean({name: value * share for name, value in sums.items()})
        )
        if counts is not None:
            row.update(self._recipe.validation_metrics(self._communicator.sum(counts)))
        return row

    def _own_batches(self) -> list[dict[str, Any]]:
        """This rank's share of the held-out samples in micro-batches, read once."""
        if self._batches is None:
            # A rank without a share still needs a batch to take part with.
            share = self._shares()[self._communicator.rank] or range(1)
            plan, size = self._recipe.plan("validation"), self._train.micro_batch
            self._batches = list(self._recipe.validation_stream(plan, share.start, share.stop, size))
        return self._batches

    def _shares(self) -> list[range]:
        """Sample numbers of each rank."""
        number, world_size = self._train.validation_samples, self._communicator.world_size
        bounds = [number * rank // world_size for rank in range(world_size + 1)]
        return [range(first, last) for first, last in itertools.pairwise(bounds)]
