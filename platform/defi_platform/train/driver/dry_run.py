"""Dry run: data, storage, memory, steps and hours of a run, without starting it."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

from defi_models.describe import Cost
from defi_platform import storage
from defi_platform.config import TrainConfig
from defi_platform.storage.writable import check_writable
from defi_platform.train.config_checks import min_world_size, worker_resources, world_sizes
from defi_platform.train.driver.memory_estimate import footprint
from defi_platform.train.engine.deepspeed_config import accumulation_steps
from defi_platform.train.observability.metrics_log import read_metrics
from defi_platform.train.observability.peak_flops import known_peak_tflops
from defi_platform.train.observability.phase_timer import PHASES
from defi_platform.train.recipe import Recipe
from defi_platform.train.worker.run_results import METRICS

GIB = 2**30
ASSUMED_MFU = 0.35
"""Model FLOP utilisation where nothing was measured: typical of well-configured training on recent GPUs."""


@dataclass(frozen=True)
class DryRun:
    """The findings about one run."""

    kind: str
    lines: list[str]

    def text(self) -> str:
        """The findings as lines for the console."""
        return "\n".join(
            [f"{self.kind}: dry run, nothing was started", *(f"  {line}" for line in self.lines)]
        )


def dry_run(recipes: Sequence[Recipe]) -> list[DryRun]:
    """Finds what runs need, and checks that they could start.

    Raises: UserError for what would stop them: data that is absent, a run folder that cannot be written.
    """
    results = []
    for recipe in recipes:
        train = recipe.config.train
        check_writable(train.output, "train.output")
        lines = [f"run folder {train.output}: can be written"]
        lines += [f"data: {line}" for line in recipe.describe_data()]
        lines += _workers(train)
        cost = recipe.cost()
        if cost:
            lines += memory_plan(cost, train)
        lines += _length(train, cost)
        results.append(DryRun(recipe.kind, lines))
    return results


def memory_plan(cost: Cost, train: TrainConfig) -> list[str]:
    """GiB on each worker, by ZeRO stage and number of workers; the configured stage is marked."""
    lines = [
        f"model: {cost.parameters:,} parameters, {cost.trained:,} trained, "
        f"{cost.training_flops / 1e9:,.1f} GFLOP per sample (forward and backward)",
        f"memory per worker, GiB ({train.precision}, micro-batch {train.micro_batch}"
        + (", recompute" if train.recompute else "")
        + "): weights + gradients + optimiser + average + activations",
    ]
    for workers in sorted({min_world_size(train), train.num_workers}):
        for stage in range(4):
            if train.precision != "fp32" and stage == 0:
                continue
            memory = footprint(
                cost.parameters, cost.trained, cost.activation_bytes, _at_stage(train, stage), workers
            )
            parts = " + ".join(
                f"{part / GIB:.2f}"
                for part in (
                    memory.weights,
                    memory.gradients,
                    memory.optimizer,
                    memory.average,
                    memory.activations,
                )
            )
            host = " (optimiser on the host)" if memory.offloaded and stage else ""
            chosen = " <- chosen" if stage == train.zero_stage else ""
            lines.append(
                f"  {workers} workers, ZeRO {stage}: {parts} = {memory.device / GIB:.2f} on the device{host}{chosen}"
            )
    lines.append("  workspaces, fragmentation and frozen encoders' own activations come on top")
    return lines


def _at_stage(train: TrainConfig, stage: int) -> TrainConfig:
    return replace(train, zero_stage=stage, offload_optimizer=train.offload_optimizer and stage > 0)


def _workers(train: TrainConfig) -> list[str]:
    asked = ", ".join(f"{amount:g} {name}" for name, amount in worker_resources(train).items())
    sizes = world_sizes(train)
    elastic = f", elastic between {', '.join(map(str, sizes))}" if train.min_workers is not None else ""
    each = [f"{workers} x {train.micro_batch} x {accumulation_steps(train, workers)}" for workers in sizes]
    return [
        f"workers: {train.num_workers} of {asked}{elastic}",
        f"global batch {train.global_batch} = workers x micro-batch x accumulation = {' or '.join(each)}",
    ]


def _length(train: TrainConfig, cost: Cost | None) -> list[str]:
    lines = [f"steps: {train.steps:,}, samples: {train.steps * train.global_batch:,}"]
    if train.ema_decay:
        averaged = train.export_weights == "average"
        lines.append(
            "weights to validate and export: "
            + ("their average" if averaged else "raw; an average is kept too (train.export_weights=average)")
        )
    seconds, how = step_seconds(train, cost)
    if seconds is None:
        lines.append(f"hours: not known, {how}")
    else:
        lines.append(f"hours: {train.steps * seconds / 3600:,.2f} at {seconds:.3f} s per step ({how})")
    return lines


def step_seconds(train: TrainConfig, cost: Cost | None) -> tuple[float | None, str]:
    """Expected seconds of a step (None where nothing is known), and the source of the number."""
    if train.expected_step_s:
        return train.expected_step_s, "train.expected_step_s"
    measured = [
        sum(row[f"{phase}_s"] for phase in PHASES)
        for row in read_metrics(storage.join(train.output, METRICS))
        if row["split"] == "train" and "optimizer_s" in row
    ]
    if measured:
        return statistics.median(measured), f"median of {len(measured)} rows that this run has logged before"
    peak = train.peak_tflops or known_peak_tflops(train)
    if not cost or not peak:
        return None, (
            "nothing was measured: run a few steps of it, or set train.expected_step_s, or train.peak_tflops for an "
            f"estimate at {ASSUMED_MFU:.0%} of the peak"
        )
    flops = cost.training_flops * train.global_batch / train.num_workers
    return flops / (peak * 1e12 * ASSUMED_MFU), (
        f"a guess, not a measurement: {flops / 1e12:,.1f} TFLOP per worker and step at an assumed "
        f"{ASSUMED_MFU:.0%} of {peak:g} TFLOP/s, data and network not counted"
    )
