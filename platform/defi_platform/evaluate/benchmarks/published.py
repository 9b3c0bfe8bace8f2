"""Figures that papers report for a benchmark, for a table in which an evaluation stands beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class PublishedChains:
    """A policy's figures for chains of tasks."""

    name: str
    average_length: float
    """Mean number of tasks solved in a row."""
    in_a_row: tuple[float, ...] | None = None
    """Rates in [0, 1] of solving 1, 2, ... tasks in a row; None where the source gives the average alone."""
    horizon: int | None = None
    """Control steps per task; None where the source does not say."""
    source: str = ""


def beside_published(
    table: Mapping[str, Any], horizon: int, published: Sequence[PublishedChains]
) -> list[dict[str, Any]]:
    """Rows of the table: the evaluation first, then the published figures.

    Args:
        table: as `statistics.chains.chain_table` gives it.
        horizon: control steps per task of the evaluation.
        published: in the order of the rows.

    Returns:
        Mappings of PublishedChains' fields and `comparable`: whether the horizon is the evaluation's own, None where
        it is not known. Figures of different horizons do not belong into one ranking.
    """
    rates = tuple(float(table["in_a_row"][str(k)]["rate"]) for k in range(1, table["length"] + 1))
    own = PublishedChains("this evaluation", float(table["average_length"]["mean"]), rates, horizon)
    rows = [own, *published]
    return [
        asdict(row) | {"comparable": None if row.horizon is None else row.horizon == horizon} for row in rows
    ]
