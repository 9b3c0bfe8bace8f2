"""The summary of an evaluation: rates with intervals, what was left out, latencies, chains."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from defi_platform.evaluate.benchmarks.interface import Benchmark
from defi_platform.evaluate.benchmarks.published import beside_published
from defi_platform.evaluate.results.episodes import left_out
from defi_platform.evaluate.statistics.chains import chain_table
from defi_platform.evaluate.statistics.intervals import Rate, latency_quantiles, wilson
from defi_platform.evaluate.statistics.pooling import Grouping, pooled

_EXAMPLE = ("arm", "task", "seed", "success", "steps", "video")


def grouping_of(protocol: Mapping[str, Any]) -> Grouping:
    """The rule by which the rates of an evaluation are pooled, from its protocol."""
    return Grouping(protocol["pooled_by"], protocol["groups"] or None)


def summarise(
    rows: Sequence[Mapping[str, Any]],
    *,
    arms: Sequence[str],
    protocol: Mapping[str, Any],
    benchmark: type[Benchmark],
) -> dict[str, Any]:
    """The part of summary.json that follows from the episodes.

    Args:
        rows: of all episodes, those left out included.
        arms: policies under test, in the order of the tables.
        protocol: of the evaluation; its horizons name the tasks.
        benchmark: class of the benchmark.

    Returns:
        "arms" {arm: see `arm_scores`}, "latency_ms", "example_episodes" (of the first seed, with a video),
        "simulator_errors" {kind: count}, "left_out" [{arm, task, seed, tries, kind, message}], "chains" {arm: chain_table} and
        "published" where an episode is a chain of tasks.
    """
    tasks = list(protocol["horizons"])
    grouping = grouping_of(protocol)
    counted = [row for row in rows if not left_out(row)]
    first = min((row["seed"] for row in rows), default=None)
    found: dict[str, Any] = {
        "arms": {arm: arm_scores([r for r in rows if r["arm"] == arm], tasks, grouping) for arm in arms},
        "latency_ms": latency_quantiles([ms for row in counted for ms in row["latency_ms"]]),
        "example_episodes": [
            {key: row[key] for key in _EXAMPLE} for row in counted if row["seed"] == first and row["video"]
        ],
        "simulator_errors": dict(
            Counter(error["kind"] for row in rows for error in row["simulator_errors"]).most_common()
        ),
        "left_out": [_left_out(row) for row in rows if left_out(row)],
    }
    if benchmark.chain_length > 1:
        of_arm = {arm: [row for row in counted if row["arm"] == arm] for arm in arms}
        found["chains"] = {
            arm: chain_table(some, benchmark.chain_length) for arm, some in of_arm.items() if some
        }
        if "policy" in found["chains"]:
            horizon = max(protocol["horizons"].values())
            found["published"] = beside_published(found["chains"]["policy"], horizon, benchmark.published)
    return found


def _left_out(row: Mapping[str, Any]) -> dict[str, Any]:
    last = row["simulator_errors"][-1]
    return {
        **{key: row[key] for key in ("arm", "task", "seed")},
        "tries": len(row["simulator_errors"]),
        "kind": last["kind"],
        "message": last["message"],
    }


def arm_scores(rows: Sequence[Mapping[str, Any]], tasks: Sequence[str], grouping: Grouping) -> dict[str, Any]:
    """The rates of one policy under test.

    Args:
        rows: its episodes, those left out included.
        tasks: in the order of the table.
        grouping: how they are pooled.

    Returns:
        "tasks" {task: Rate fields, None without an outcome}, "groups" {group: the same}, "pooled": that of the only
        group, None where there are several, and "left_out" {task: episodes without an outcome} of those that have any, and
        "groups_left_out" {group: the same}.
    """
    rates: dict[str, Rate | None] = {}
    for task in tasks:
        outcomes = [row["success"] for row in rows if row["task"] == task and not left_out(row)]
        rates[task] = wilson(sum(outcomes), len(outcomes)) if outcomes else None
    lost = Counter(row["task"] for row in rows if left_out(row))
    groups: dict[str, Any] = {}
    lost_of_groups: dict[str, int] = {}
    for name, members in grouping.of(tasks).items():
        known = [rate for task in members if (rate := rates[task])]
        groups[name] = pooled(known, grouping.rule).as_mapping() if known else None
        if missing := sum(lost[task] for task in members):
            lost_of_groups[name] = missing
    return {
        "tasks": {task: rate.as_mapping() if rate else None for task, rate in rates.items()},
        "groups": groups,
        "pooled": next(iter(groups.values())) if len(groups) == 1 else None,
        "left_out": dict(lost),
        "groups_left_out": lost_of_groups,
    }
