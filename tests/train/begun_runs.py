"""Run folders as runs leave them, as far as the driver reads them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from defi_platform.config.loader import to_mapping
from defi_platform.train.checkpoint import format as checkpoints
from defi_platform.train.checkpoint.format import Position
from defi_platform.train.recipe import Recipe


def reached(recipe: Recipe, *steps: int, complete: bool = False, older: bool = False) -> Path:
    """Gives a run folder what a run of this recipe leaves at these steps, as far as the driver reads it.

    Args:
        recipe: of the run.
        steps: with a checkpoint.
        complete: the last of them is the end of the run.
        older: leave out what checkpoints did not hold before.
    """
    run = Path(recipe.config.train.output)
    run.mkdir(parents=True, exist_ok=True)
    (run / "config.yaml").write_text(yaml.safe_dump(to_mapping(recipe.config)))
    model = recipe.identity()
    if older:
        model = {key: model[key] for key in model if key not in ("config", "built_from")}
    for step in steps:
        folder = run / "checkpoints" / checkpoints.folder_name(step, "abcdef")
        folder.mkdir(parents=True)
        segments = [] if older else [asdict(one) for one in recipe.segments]
        position = asdict(Position(step, step * 8, model, {}, segments=segments))
        if older:
            del position["segments"]
        (folder / "shard_00000_of_00001.json").write_text(json.dumps({"file": "x", "position": position}))
    if complete:
        (run / "summary.json").write_text(json.dumps({"model": model, "steps": steps[-1]}))
    return run


def change_config(run: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Changes config.yaml to what an older version would have written."""
    values = yaml.safe_load((run / "config.yaml").read_text())
    change(values)
    (run / "config.yaml").write_text(yaml.safe_dump(values))
