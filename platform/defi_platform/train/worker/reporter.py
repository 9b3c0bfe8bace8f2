"""Reports of the training loop: rows of metrics.jsonl, status.json, Weights & Biases and Prometheus."""

from __future__ import annotations

import time
from typing import Any

import torch

from defi_platform import storage
from defi_platform.config.loader import to_mapping
from defi_platform.train.engine.determinism import arithmetic
from defi_platform.train.observability.code_version import code_version
from defi_platform.train.observability.metrics_log import MetricsLog
from defi_platform.train.observability.peak_flops import known_peak_tflops
from defi_platform.train.observability.phase_timer import PhaseTimer
from defi_platform.train.observability.run_metrics import RunMetrics
from defi_platform.train.observability.status import StatusWriter
from defi_platform.train.observability.wandb_tracker import Tracker
from defi_platform.train.recipe import Recipe
from defi_platform.train.worker.run_clock import RunClock
from defi_platform.train.worker.run_results import METRICS


class Reporter:
    """One rank's reports; only rank 0 writes any, the others measure their phases alone.

    Args:
        recipe: of the run.
        is_rank_zero: whether this rank writes.
        world_size: ranks of the run.
    """

    def __init__(self, recipe: Recipe, is_rank_zero: bool, world_size: int):
        self._recipe, self._train = recipe, recipe.config.train
        self._is_rank_zero, self._world_size = is_rank_zero, world_size
        self._status = (
            StatusWriter(self._train.output, recipe.kind, self._train.steps) if is_rank_zero else None
        )
        self._metrics = (
            RunMetrics(self._train.output, recipe.kind, self._train.steps) if is_rank_zero else None
        )
        self._log: MetricsLog | None = None
        self._tracker: Tracker | None = None
        self._clock = RunClock(time.time())
        self._logged_step = 0
        self._peak_tflops: float | None = None
        self._flops_per_sample: float | None = None
        self.timer = PhaseTimer(self._train.use_gpu)

    def start(self, step: int, clock: RunClock, fingerprint: str, accumulation: int) -> None:
        """Opens the log and the tracker, and logs the attempt.

        Args:
            step: that the attempt starts from.
            clock: of the run.
            fingerprint: of the plan.
            accumulation: micro-batches of one update on each rank.
        """
        self._clock, self._logged_step = clock, step
        self._peak_tflops = self._train.peak_tflops or known_peak_tflops(self._train)
        # Counting them takes a few seconds at the paper's size: only where there is a peak to compare with.
        cost = self._recipe.cost() if self._is_rank_zero and self._peak_tflops else None
        self._flops_per_sample = cost.training_flops if cost else None
        self.timer.start()
        if not self._is_rank_zero:
            return
        config, code = self._recipe.config, code_version()
        self._log = MetricsLog(storage.join(self._train.output, METRICS), step)
        origin = {**to_mapping(config), "code": code, "data_fingerprint": fingerprint}
        self._tracker = Tracker(config.tracking, self._train.output, self._recipe.kind, origin)
        self.log_event(
            step,
            "attempt",
            workers=self._world_size,
            zero_stage=self._train.zero_stage,
            accumulation=accumulation,
            source=code["source"],
            time=time.time(),
            **arithmetic(self._train),
        )

    def update_status(self, force: bool = False, **values: Any) -> None:
        """Merges values into status.json, which is written now and then, or now if forced."""
        if self._status:
            self._status.update(force, **values)

    def log_event(self, step: int, split: str, **values: Any) -> None:
        """Logs what happened at a step, such as a skipped update, as a row of that split."""
        if self._log:
            self._log.append({"step": step, "split": split, **values})
        if self._metrics:
            self._metrics.event(split)
            if split == "attempt":
                self._metrics.attempt(self._world_size)

    def log_metrics(self, row: dict[str, Any]) -> None:
        """Logs and tracks a row of figures, with the wall time."""
        if self._log:
            row = {**row, "wall_s": self._clock.wall_s()}
            self._log.append(row)
            if self._tracker:
                self._tracker.log(row)
            if self._metrics and row["split"] == "validation":
                self._metrics.loss("validation", row["loss"])

    def log_validation(self, step: int, row: dict[str, Any]) -> None:
        """Logs a validation, and prints the recipe's alarm where its metrics hold one; nothing has gone wrong at step 0."""
        if step == 0:
            row = {name: value for name, value in row.items() if name != "alarm"}
        self.log_metrics({"step": step, "split": "validation", **row})
        if self._is_rank_zero and "alarm" in row:
            print(f"{self._recipe.kind}: step {step}: {row['alarm']}", flush=True)

    def log_step(self, step: int, row: dict[str, float], checkpoint_step: int | None) -> None:
        """Logs an update when `log_every` says so, with the phases since the last one, and updates the status.

        Args:
            step: number of the update, from 1.
            row: loss and other figures, means over the ranks.
            checkpoint_step: of the newest checkpoint in the run folder.
        """
        samples = step * self._train.global_batch
        if step % self._train.log_every == 0 or step in (1, self._train.steps):
            self.timer.end("other")
            seconds, steps = self.timer.take(), step - self._logged_step
            self._logged_step = step
            phases = {f"{phase}_s": round(spent / steps, 6) for phase, spent in seconds.items()}
            entry = {"step": step, "split": "train", **row, **phases, "samples": samples}
            if self._train.use_gpu:
                entry["gpu_peak_bytes"] = torch.cuda.max_memory_allocated()
            busy_s = sum(seconds.values()) - seconds["validation"]
            if self._flops_per_sample and self._peak_tflops:
                flops = self._flops_per_sample * self._train.global_batch * steps / self._world_size
                entry["mfu"] = flops / (busy_s * self._peak_tflops * 1e12)
            self.log_metrics(entry)
            if self._metrics:
                self._metrics.updates(step, steps * self._train.global_batch, entry, seconds)
                self._metrics.checkpoint(checkpoint_step)
            self.update_status(data_wait=seconds["data"] / busy_s if busy_s else 0.0)
        self.update_status(step=step, samples=samples, loss=row["loss"], checkpoint_step=checkpoint_step)

    def track_media(self, names: list[str], step: int) -> None:
        """Sends files of the run folder to the tracker."""
        if self._tracker:
            for name in names:
                self._tracker.media(name, storage.join(self._train.output, name), step)

    def rows(self) -> list[dict[str, Any]]:
        """All rows of metrics.jsonl, on rank 0."""
        return self._log.rows() if self._log else []

    def flush(self) -> None:
        """Starts to bring a remote metrics.jsonl up to date."""
        if self._log:
            self._log.flush()

    def wait_for_flush(self) -> None:
        """Waits for the last flush. Raises: StorageError when that takes longer than storage_patience_s."""
        if self._log:
            self._log.wait_for_flush(self._train.storage_patience_s)

    def close(self, phase: str, checkpoint_step: int | None) -> None:
        """Ends the attempt's reports.

        Args:
            phase: shown by the status from now on.
            checkpoint_step: of the newest checkpoint in the run folder.

        Raises: StorageError when metrics.jsonl cannot be written in time.
        """
        if self._tracker:
            self._tracker.finish()
        if self._log:
            self._log.close(self._train.storage_patience_s)
        self.update_status(phase=phase, force=True, checkpoint_step=checkpoint_step)
        if self._status:
            self._status.flush()
