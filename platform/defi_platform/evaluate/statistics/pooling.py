"""Rates over several tasks, pooled as a benchmark's rule says, and kept apart where it says so."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from defi_platform.errors import ConfigError
from defi_platform.evaluate.statistics.intervals import Rate, wilson

RULES = ("episodes", "tasks")
"""Values of `Benchmark.pooled_by`."""
ALL_TASKS = "all tasks"
"""Name of the one group of a benchmark whose tasks are all pooled."""


def pooled(tasks: Sequence[Rate], rule: str, confidence: float = 0.95) -> Rate:
    """The rate over tasks and its interval.

    "episodes" counts all episodes alike (Wilson's interval). "tasks" is the mean of the tasks' rates; its interval
    joins those of the tasks, which are independent: the squares of their distances from the rates add up.

    Args:
        tasks: the tasks' rates, at the same confidence.
        rule: one of `RULES`.
        confidence: level of the intervals, in (0, 1).

    Raises:
        ValueError: the rule is unknown or there is no task.
    """
    if rule not in RULES or not tasks:
        raise ValueError(f"{len(tasks)} tasks cannot be pooled by '{rule}'; rules: {', '.join(RULES)}")
    successes, episodes = sum(one.successes for one in tasks), sum(one.episodes for one in tasks)
    if rule == "episodes":
        return wilson(successes, episodes, confidence)
    rate, low, high = joined([(one.rate, one.low, one.high) for one in tasks])
    return Rate(successes, episodes, rate, low, high)


def joined(parts: Sequence[tuple[float, float, float]]) -> tuple[float, float, float]:
    """The mean of independent estimates and its interval, from (estimate, low, high) of each.

    Source: Zou and Donner, Statistics in Medicine 27 (2008), 1693: limits of sums from the limits of their parts.
    """
    count = len(parts)
    mean = sum(one for one, _, _ in parts) / count
    below = math.sqrt(sum((one - low) ** 2 for one, low, _ in parts)) / count
    above = math.sqrt(sum((high - one) ** 2 for one, _, high in parts)) / count
    return mean, mean - below, mean + above


@dataclass(frozen=True)
class Grouping:
    """The rule by which the rates of an evaluation's tasks are pooled."""

    rule: str = "episodes"
    """One of `RULES`."""
    groups: Mapping[str, Sequence[str]] | None = None
    """Group -> tasks; rates are pooled within a group and never over two. None: all tasks are one group."""

    def of(self, tasks: Iterable[str]) -> dict[str, list[str]]:
        """The groups that hold any of `tasks`, each with those, in their order.

        Raises:
            ConfigError: a task is in no group; it would be in no rate.
        """
        asked = list(tasks)
        if not self.groups:
            return {ALL_TASKS: asked}
        alone = [task for task in asked if not any(task in members for members in self.groups.values())]
        if alone:
            raise ConfigError(
                f"{', '.join(alone)}: in none of the groups of tasks whose rates are pooled "
                f"({', '.join(self.groups)}); name it in the benchmark's `groups`."
            )
        found = {name: [task for task in asked if task in members] for name, members in self.groups.items()}
        return {name: members for name, members in found.items() if members}
