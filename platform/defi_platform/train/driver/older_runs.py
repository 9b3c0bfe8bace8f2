"""Runs that were begun by an earlier version: what their settings meant then."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

DEFAULTS: Final[dict[tuple[str, str], dict[str, Any]]] = {
    ("gidm", preset): {"encoder.dropout": 0.1, "decoder.dropout": 0.1} for preset in ("small", "paper")
}
"""Kind and preset -> fields of the model that had another default before checkpoints held its whole configuration."""


def with_meaning(values: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of a run, with what it did not say and meant.

    An average that was kept was also what was validated and exported, before `train.export_weights` was there. The size
    of a validation was counted in micro-batches, `train.validation_batches`.
    """
    train = dict(values.get("train") or {})
    train.setdefault("export_weights", "average" if train.get("ema_decay") else "raw")
    batches = train.pop("validation_batches", None)
    if batches is not None:
        train.setdefault("validation_samples", batches * train["micro_batch"])
    return {**values, "train": train}


def model_as_begun(
    kind: str, preset: str, overrides: Mapping[str, Any], config: Mapping[str, Any]
) -> dict[str, Any]:
    """The model of a run whose checkpoints name its preset and overrides alone, as flat fields.

    Args:
        kind: of the recipe.
        preset: of the model.
        overrides: of its fields.
        config: what preset and overrides mean now, flat.
    """
    older = {
        key: value for key, value in DEFAULTS.get((kind, preset), {}).items() if key not in flat(overrides)
    }
    return {**config, **older}


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted keys."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found
