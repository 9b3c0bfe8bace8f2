"""Success in chains of tasks, as CALVIN reports it: how many are solved in a row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from defi_platform.evaluate.statistics.intervals import Rate, wilson


def chain_table(rows: Sequence[Mapping[str, Any]], length: int) -> dict[str, Any]:
    """Rates of solving 1, 2, ... subtasks in a row, the mean number of them, and rates by subtask.

    Args:
        rows: episodes of one arm, at least one, each with `solved` and `subtasks` (one entry per subtask that was begun).
        length: subtasks of a chain.

    Returns:
        "in_a_row" {k: Rate fields}, "average_length" {mean, low, high} (95 % bootstrap interval), "length",
        "subtasks" {name: Rate fields} over the times that each was begun.
    """
    solved = [int(row["solved"]) for row in rows]
    tries: dict[str, list[bool]] = {}
    for row in rows:
        for subtask in row["subtasks"]:
            tries.setdefault(subtask["name"], []).append(bool(subtask["success"]))
    in_a_row = {str(k): _rate([one >= k for one in solved]) for k in range(1, length + 1)}
    low, high = _mean_interval(solved, list(in_a_row.values()))
    return {
        "length": length,
        "in_a_row": in_a_row,
        "average_length": {"mean": float(np.mean(solved)), "low": low, "high": high},
        "subtasks": {name: _rate(tries[name]) for name in sorted(tries)},
    }


def _rate(outcomes: Sequence[bool]) -> dict[str, Any]:
    found: Rate = wilson(sum(outcomes), len(outcomes))
    return found.as_mapping()


def _mean_interval(solved: Sequence[int], rates: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
    """Percentile bootstrap of the mean, through the counts of each length: 1000 sequences cost milliseconds.

    Episodes that are all of one length say nothing to a bootstrap, whose interval would be a point. The mean is the
    sum of the rates of 1, 2, ... in a row, so the sums of their bounds take its place there.
    """
    values, counts = np.unique(solved, return_counts=True)
    if len(values) == 1:
        return float(sum(rate["low"] for rate in rates)), float(sum(rate["high"] for rate in rates))
    draws = np.random.default_rng(0).multinomial(len(solved), counts / len(solved), size=9999) @ values
    low, high = np.quantile(draws / len(solved), [0.025, 0.975])
    return float(low), float(high)
