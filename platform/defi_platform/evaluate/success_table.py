"""The table of success rates, policies under test by task, for the terminal and for the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from defi_platform.evaluate.statistics.intervals import Rate


def success_rows(arms: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """One row per task, the pooled rate last: the task, then each policy's rate and 95 % interval.

    Args:
        arms: policy under test -> {"tasks": {task: rate}, "pooled": rate}, as in an evaluation's summary.json;
            a rate holds the fields of `intervals.Rate`.
    """
    tasks = next(iter(arms.values()))["tasks"]
    rows = [[task, *(str(Rate(**arm["tasks"][task])) for arm in arms.values())] for task in tasks]
    return [*rows, ["all tasks", *(str(Rate(**arm["pooled"])) for arm in arms.values())]]


def success_lines(arms: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """`success_rows` under a head, as lines for the terminal."""
    return aligned([["success (95 % interval)", *arms], *success_rows(arms)])


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of text in which the columns of `rows` start below each other."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
