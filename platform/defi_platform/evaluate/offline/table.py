"""The offline errors as lines for the terminal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

_HORIZONS = 4
"""Steps of the horizon that are shown, spread evenly; all are in the summary's file."""


def error_lines(details: dict[str, Any]) -> Iterator[str]:
    """A table of normalised errors by horizon step, and the policy's raw errors by dimension.

    Args:
        details: of an offline evaluation, see `offline.evaluate`.
    """
    errors = details["errors"]
    policy = errors["policy"]
    horizon = len(policy["normalised"]["by_horizon"])
    shown = sorted({round(n * (horizon - 1) / max(1, _HORIZONS - 1)) for n in range(_HORIZONS)})
    yield (
        f"mean absolute error in standard deviations of the recorded actions, 95 % intervals over "
        f"{policy['episodes']} episodes ({policy['observations']} observations):"
    )
    yield f"{'':14}{'all steps':>22}" + "".join(f"{f'step {step + 1}':>22}" for step in shown)
    for arm, error in errors.items():
        cells = [error["normalised"]["overall"], *(error["normalised"]["by_horizon"][n] for n in shown)]
        yield f"{arm:14}" + "".join(f"{_cell(cell):>22}" for cell in cells)
    yield "the policy's by dimension, in raw units:"
    names = details["action_names"] or [f"action {n}" for n in range(len(policy["raw"]["by_dimension"]))]
    for name, cell in zip(names, policy["raw"]["by_dimension"], strict=True):
        yield f"  {name:20}{_cell(cell):>24}"
    if details["left_out"]:
        named, why = next(iter(details["left_out"].items()))
        yield f"left out: {len(details['left_out'])}, e.g. {named}: {why}"


def _cell(value: dict[str, float] | None) -> str:
    if value is None:
        return "-"
    return f"{value['mean']:.3g} ({value['low']:.3g}-{value['high']:.3g})"
