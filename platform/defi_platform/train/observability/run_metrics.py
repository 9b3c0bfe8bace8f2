"""Metrics of a training run for Ray's Prometheus endpoint, emitted by rank 0 as often as it logs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from defi_platform.metrics import catalogue


class RunMetrics:
    """Emits what a run logs.

    Args:
        run: run folder.
        kind: of the recipe.
        steps: of the whole run.
    """

    def __init__(self, run: str, kind: str, steps: int) -> None:
        self._labels = {"run": run, "kind": kind}
        self._steps = steps

    def attempt(self, workers: int) -> None:
        """Emits the ranks of an attempt that begins."""
        catalogue.TRAIN_WORKERS.set(workers, **self._labels)

    def event(self, event: str) -> None:
        """Counts an event, such as a skipped update."""
        catalogue.TRAIN_EVENTS.add(1, event=event, **self._labels)

    def updates(self, step: int, samples: int, row: Mapping[str, Any], phases: Mapping[str, float]) -> None:
        """Emits the updates since the last call.

        Args:
            step: number of the last of them.
            samples: of these updates.
            row: figures of the last of them, as logged.
            phases: seconds of these updates by phase.
        """
        catalogue.TRAIN_SAMPLES.add(samples, **self._labels)
        for phase, seconds in phases.items():
            catalogue.TRAIN_PHASE_SECONDS.add(seconds, phase=phase, **self._labels)
        catalogue.TRAIN_STEP.set(step, **self._labels)
        catalogue.TRAIN_PROGRESS.set(step / self._steps, **self._labels)
        self.loss("train", row["loss"])
        if "gpu_peak_bytes" in row:
            catalogue.TRAIN_GPU_BYTES.set(row["gpu_peak_bytes"], **self._labels)
        if "mfu" in row:
            catalogue.TRAIN_MFU.set(row["mfu"], **self._labels)

    def loss(self, split: str, loss: float) -> None:
        """Emits the loss of a split."""
        catalogue.TRAIN_LOSS.set(loss, split=split, **self._labels)

    def checkpoint(self, step: int | None) -> None:
        """Emits the step of the newest checkpoint in the run folder; nothing before the first."""
        if step is not None:
            catalogue.TRAIN_CHECKPOINT_STEP.set(step, **self._labels)
