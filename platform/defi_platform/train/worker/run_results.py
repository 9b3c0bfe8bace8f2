"""Results of a complete run: the exported model, pictures, loss curves, the run card and the summary."""

from __future__ import annotations

from typing import Any

import torch

from defi_platform import storage
from defi_platform.train.checkpoint.export import export_model
from defi_platform.train.observability.loss_curves import write_curves
from defi_platform.train.observability.run_card import write_run_card
from defi_platform.train.recipe import Recipe

METRICS, CURVES, SUMMARY, MODEL = "metrics.jsonl", "curves.png", "summary.json", "model"


def write_results(
    recipe: Recipe,
    rows: list[dict[str, Any]],
    facts: dict[str, Any],
    batch: dict[str, Any],
    device: torch.device,
    fingerprint: str,
) -> dict[str, Any]:
    """Writes all results but the summary, which marks a run as complete. Writing them again changes nothing.

    Args:
        recipe: of the run.
        rows: of metrics.jsonl.
        facts: the loop's figures of the run: `steps`, `samples`, `wall_s`, `workers` and so on.
        batch: of the validation split, see `evaluation_batch`.
        device: to evaluate the model on.
        fingerprint: of the plan.

    Returns: the summary.
    """
    run = recipe.config.train.output
    model = export_model(recipe, storage.join(run, MODEL)).to(device)
    recipe.read_texts(model)
    report = recipe.evaluate(model, batch, run, facts["steps"])
    write_curves(rows, storage.join(run, CURVES), f"{recipe.kind} ({recipe.config.model.preset})")
    validations = [row for row in rows if row["split"] == "validation"]
    summary = {
        "kind": recipe.kind,
        "model": recipe.identity(),
        **facts,
        "samples_per_s": facts["samples"] / max(facts["wall_s"], 1e-9),
        "skipped_updates": sum(row["split"] == "skipped" for row in rows),
        "checkpoints_left_out": sum(row["split"] == "checkpoint_left_out" for row in rows),
        "validation": {"first": validations[0], "last": validations[-1]},
        "skipped": recipe.skipped(),
        "media": report.media,
        **report.figures,
        **recipe.summary(validations[-1]),
    }
    write_run_card(recipe, fingerprint, summary, rows)
    return summary
