"""An evaluation in the JSON layouts of vla-eval: its results file, and an entry of its leaderboard."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from typing import Any

from defi_platform.errors import ConfigError
from defi_platform.evaluate.benchmarks.registry import benchmark_class
from defi_platform.evaluate.benchmarks.simplerenv.trials import CANS, DRAWERS, MATCHING, NEAR, VARIANTS
from defi_platform.evaluate.results.episodes import left_out
from defi_platform.evaluate.results.evaluation import Evaluation

BOARD = {"calvin": "calvin", "libero": "libero", "simplerenv": "simpler_env"}
"""Benchmark -> its key on the leaderboard."""
_LIBERO = ("libero_spatial", "libero_object", "libero_goal", "libero_10")
"""The suites whose mean is LIBERO's overall score there."""
_PROTOCOLS = {MATCHING: "vm", VARIANTS: "va"}
_SUITE = (CANS, NEAR, DRAWERS)
"""The families of SimplerEnv's tasks whose mean is a protocol's score there; the fourth is a score of its own."""


def results_file(evaluation: Evaluation, arm: str = "policy") -> dict[str, Any]:
    """The content of a results file of vla-eval.

    There an episode that ended in an error counts as failed. So episodes without an outcome are not among the
    `episodes` here; `left_out` has them.

    Args:
        evaluation: the results.
        arm: policy under test.

    Raises:
        ConfigError: it has no outcome of that arm.
    """
    protocol = evaluation.protocol
    rows = [row for row in evaluation.rows if row["arm"] == arm and not left_out(row)]
    if not rows:
        raise ConfigError(
            f"{evaluation.output} has no outcome of '{arm}'; arms: {', '.join(evaluation.summary['arms'])}."
        )
    keys = {"success": "mean", "reward": "mean"}
    if evaluation.summary.get("chains"):
        keys["completed_subtasks"] = "mean"
    tasks = []
    for task in protocol["horizons"]:
        episodes = [_episode(row, keys) for row in rows if row["task"] == task]
        if episodes:
            steps = sum(one["steps"] for one in episodes) / len(episodes)
            tasks.append(
                {"task": task, "episodes": episodes, "num_episodes": len(episodes), "avg_steps": steps}
                | _means(episodes, keys)
            )
    everything = [episode for task in tasks for episode in task["episodes"]]
    return {
        "benchmark": protocol["benchmark"],
        "mode": "sync",
        "harness_version": f"defi-platform {protocol['versions']['defi-platform']}",
        "created_at": datetime.datetime.now(datetime.UTC).isoformat(),
        "tasks": tasks,
        "config": {"params": {"seed": protocol["seeds"]["first"]}, "protocol": protocol},
        "seed": protocol["seeds"]["first"],
        "num_errors": 0,
        "metric_keys": keys,
        **_means(everything, keys),
        "left_out": [one for one in evaluation.summary["left_out"] if one["arm"] == arm],
    }


def leaderboard_entry(
    evaluation: Evaluation, *, model: str, display_name: str, curated_by: str, finetuned: bool
) -> dict[str, Any]:
    """One entry of `results` in vla-eval's leaderboard.json: scores in percent, CALVIN's in tasks in a row.

    The overall score is null where the board's standard protocol was not run in full (all 50 initial states of LIBERO's 40
    tasks, at their own horizons), and always for SimplerEnv, whose visual matching and variant aggregation are never
    averaged.

    Args:
        evaluation: the results of the arm "policy".
        model: key, such as a BibTeX key.
        display_name: of the method.
        curated_by: "@" and the name on GitHub of who stands for it.
        finetuned: trained on this benchmark's data; False: one checkpoint for all benchmarks.

    Raises:
        ConfigError: the leaderboard does not have the benchmark, or the evaluation no outcome of a policy.
    """
    name, protocol = evaluation.protocol["benchmark"], evaluation.protocol
    if name not in BOARD:
        raise ConfigError(f"vla-eval's leaderboard has no {name}; it has {', '.join(BOARD)} of ours.")
    if not any(row["arm"] == "policy" and not left_out(row) for row in evaluation.rows):
        raise ConfigError(f"{evaluation.output} has no outcome of the arm 'policy'.")
    scores = evaluation.summary["arms"]["policy"]
    entry: dict[str, Any] = {
        "model": model,
        "display_name": display_name,
        "name_in_paper": None,
        "benchmark": BOARD[name],
        "overall_score": None,
        "suite_scores": {},
        "task_scores": {},
        "reported_paper": None,
        "reported_table": None,
        "curated_by": curated_by,
        "notes": _notes(evaluation),
        "date_added": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "weight_type": "finetuned" if finetuned else "shared",
    }
    if name == "calvin":
        table = evaluation.summary["chains"]["policy"]
        entry["suite_scores"] = {
            f"{k}_task{'s' if int(k) > 1 else ''}": _percent(rate) for k, rate in table["in_a_row"].items()
        }
        whole = table["in_a_row"]["1"]["episodes"] == 1000 and set(protocol["horizons"].values()) == {360}
        entry["overall_score"] = round(table["average_length"]["mean"], 3) if whole else None
        return entry
    complete = _complete_tasks(evaluation, scores["tasks"])
    if name == "simplerenv":
        return entry | _simplerenv(evaluation, scores, complete)
    suites = {suite: _mean(scores["tasks"], suite) for suite in _LIBERO}
    entry["suite_scores"] = {suite: score for suite, score in suites.items() if score is not None}
    whole = sum(task.partition("/")[0] in _LIBERO for task in complete) == 10 * len(_LIBERO)
    if whole:
        entry["overall_score"] = round(sum(entry["suite_scores"].values()) / len(_LIBERO), 2)
    return entry


def _complete_tasks(evaluation: Evaluation, rates: Mapping[str, Mapping[str, Any] | None]) -> set[str]:
    """Tasks with an outcome of each of their official initial states, at the benchmark's own horizon."""
    protocol = evaluation.protocol
    benchmark = benchmark_class(protocol["benchmark"])
    horizons = {task.name: task.horizon for task in benchmark.tasks(protocol["options"])}
    return {
        task
        for task, rate in rates.items()
        if rate
        and rate["episodes"] == benchmark.initial_states(task, protocol["options"])
        and protocol["horizons"][task] == horizons[task]
    }


def _simplerenv(evaluation: Evaluation, scores: Mapping[str, Any], complete: set[str]) -> dict[str, Any]:
    """Scores of the Google robot: of families of tasks, and the board's mean over three of them under each protocol.

    The mean is there where every trial of the three is, with the official shading.
    """
    groups, found = evaluation.protocol["groups"], dict[str, Any]()
    official = evaluation.protocol["options"]["shading"] == "official"
    found["task_scores"] = {
        f"{family}_{_PROTOCOLS[protocol]}": _percent(rate)
        for group, rate in scores["groups"].items()
        for protocol, _, family in (group.partition("/"),)
        if rate
    }
    found["suite_scores"] = {}
    for protocol, short in _PROTOCOLS.items():
        three = [f"{protocol}/{family}" for family in _SUITE]
        if official and all(set(groups[group]) <= complete for group in three):
            mean = sum(float(scores["groups"][group]["rate"]) for group in three) / len(three)
            found["suite_scores"][f"google_robot_{short}"] = round(100 * mean, 2)
    return found


def _episode(row: Mapping[str, Any], keys: Mapping[str, str]) -> dict[str, Any]:
    metrics = {"success": row["success"], "reward": row["reward"], "completed_subtasks": row["solved"]}
    return {
        "episode_id": row["seed"],
        "metrics": {key: metrics[key] for key in keys},
        "steps": row["steps"],
        "elapsed_sec": row["wall_s"],
    }


def _means(episodes: Sequence[Mapping[str, Any]], keys: Mapping[str, str]) -> dict[str, float]:
    return {
        f"mean_{key}": round(sum(one["metrics"][key] for one in episodes) / len(episodes), 4) for key in keys
    }


def _percent(rate: Mapping[str, Any]) -> float:
    return round(100 * float(rate["rate"]), 2)


def _mean(tasks: Mapping[str, Mapping[str, Any] | None], suite: str) -> float | None:
    """Mean of a suite's ten tasks in percent; None where they were not all evaluated."""
    rates = [rate["rate"] for name, rate in tasks.items() if name.startswith(f"{suite}/") and rate]
    return round(100 * sum(rates) / len(rates), 2) if len(rates) == 10 else None


def _notes(evaluation: Evaluation) -> str:
    protocol, episodes = evaluation.protocol, evaluation.summary["arms"]["policy"]["tasks"]
    counts = sorted({rate["episodes"] if rate else 0 for rate in episodes.values()})
    left = sum(one["arm"] == "policy" for one in evaluation.summary["left_out"])
    horizons = sorted(set(protocol["horizons"].values()))
    usual = benchmark_class(protocol["benchmark"]).resolved_options({})
    changed = [f"{key}={value}, " for key, value in protocol["options"].items() if value != usual.get(key)]
    return (
        f"Evaluated with defi-platform {protocol['versions']['defi-platform']}: {'-'.join(map(str, counts))} episodes per "
        f"task, horizons {', '.join(map(str, horizons))}, {''.join(changed)}{protocol['execute_steps']} actions executed of a chunk, "
        f"{left} left out for simulator errors."
    )
