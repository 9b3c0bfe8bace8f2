"""The table of success rates, policies under test by task, for the terminal and for the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from defi_platform.evaluate.statistics.intervals import Rate
from defi_platform.evaluate.statistics.pooling import ALL_TASKS


def success_rows(arms: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """One row per task, then one per group of tasks that is pooled: the name, each policy's rate and 95 % interval.

    Args:
        arms: policy under test -> its scores, as in an evaluation's summary.json (`results.summary.arm_scores`);
            episodes that were left out are named in the cells that lack them.
    """
    scores = list(arms.values())
    rows = [
        [task, *(_cell(one["tasks"][task], one.get("left_out", {}).get(task, 0)) for one in scores)]
        for task in scores[0]["tasks"]
    ]
    # Evaluations of earlier versions have one pooled rate.
    groups = [one.get("groups") or {ALL_TASKS: one["pooled"]} for one in scores]
    for name in groups[0]:
        lost = [one.get("groups_left_out", {}).get(name, 0) for one in scores]
        rows.append([name, *(_cell(one[name], count) for one, count in zip(groups, lost, strict=True))])
    return rows


def _cell(rate: Mapping[str, Any] | None, left_out: int) -> str:
    text = str(Rate(**rate)) if rate else "no outcome"
    return f"{text}, {left_out} left out" if left_out else text


def success_lines(arms: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """`success_rows` under a head, as lines for the terminal."""
    return aligned([["success (95 % interval)", *arms], *success_rows(arms)])


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of text in which the columns of `rows` start below each other."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
