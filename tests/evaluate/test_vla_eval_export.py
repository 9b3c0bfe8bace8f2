"""Exports in vla-eval's layouts, checked with its own code where it has some."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from made_evaluations import Chained, episode, evaluated
from vla_eval.results.collector import ResultCollector
from vla_eval.results.export import print_export_summary

from defi_platform.errors import ConfigError, exit_code
from defi_platform.evaluate.benchmarks.registry import benchmark_class
from defi_platform.evaluate.benchmarks.simplerenv.trials import APPLE, CANS, DRAWERS, NEAR, TRIALS
from defi_platform.evaluate.results.evaluation import Evaluation, read_evaluation
from defi_platform.evaluate.results.protocol import protocol_of
from defi_platform.evaluate.results.summary import summarise
from defi_platform.evaluate.results.vla_eval import leaderboard_entry, results_file
from defi_platform.jobs.export_evaluation import main

WHO: dict[str, Any] = {
    "model": "chen26defi", "display_name": "DeFI", "curated_by": "@someone", "finetuned": True,
}  # fmt: skip


def of(folder: Path, rows: list[dict[str, Any]], *arguments: Any, **changes: Any) -> Evaluation:
    evaluated(folder, rows, *arguments, **changes)
    return read_evaluation(str(folder))


def test_vla_evals_own_collector_makes_the_same_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [episode("cube", seed, seed < 2) for seed in range(3)]
    rows += [episode("ball", 0, True), episode("ball", 1, None)]
    made = json.loads(json.dumps(results_file(of(tmp_path, rows))))
    collector = ResultCollector("pushing", metric_keys={"success": "mean", "reward": "mean"})
    for task in made["tasks"]:
        for one in task["episodes"]:
            collector.record(task["task"], one)
    theirs = collector.get_benchmark_result(made["config"])
    ours = {key: made[key] for key in theirs}
    for changing in ("harness_version", "created_at"):
        theirs.pop(changing), ours.pop(changing)  # type: ignore[misc]
    assert ours == theirs and made["mean_success"] == 0.75
    assert [one["seed"] for one in made["left_out"]] == [1], "no failure of the policy"
    print_export_summary([made])
    assert "75.0%" in capsys.readouterr().out


def test_calvins_entry_has_its_length_as_overall_score_only_where_the_protocol_is_the_boards(
    tmp_path: Path,
) -> None:
    class Calvin(Chained):
        name = "calvin"

    rows = [episode("cube", seed, seed == 3, solved=seed) for seed in range(4)]
    entry = leaderboard_entry(of(tmp_path / "few", rows, Calvin), **WHO)
    assert entry["suite_scores"] == {"1_task": 75.0, "2_tasks": 50.0, "3_tasks": 25.0}
    assert entry["overall_score"] is None and "horizons 50, 60" in entry["notes"]
    many = [episode("cube", seed, False, solved=seed % 4) for seed in range(1000)]
    entry = leaderboard_entry(of(tmp_path / "all", many, Calvin, horizons={"cube": 360}), **WHO)
    assert entry["overall_score"] == 1.5 and entry["weight_type"] == "finetuned"


def of_benchmark(name: str, rows: list[dict[str, Any]], **changes: Any) -> Evaluation:
    """Results of a benchmark of ours, at its own horizons where `changes` of its protocol say nothing."""
    benchmark = benchmark_class(name)
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    protocol = {
        **protocol_of(
            benchmark, options=benchmark.resolved_options(changes.pop("options", {})), view=benchmark.default_view,
            tasks=tasks, max_steps=None, execute_steps=1, seeds={task: [0] for task in tasks}, simulator={},
            policy={"digest": "d"}, rows=rows,
        ),
        **changes,
    }  # fmt: skip
    summary = summarise(rows, arms=["policy"], protocol=protocol, benchmark=benchmark)
    return Evaluation("", {**summary, "protocol": protocol}, rows)


def test_simplerenvs_protocols_are_never_averaged() -> None:
    """Whole: visual matching. A trial of variant aggregation is missing."""
    solved = {CANS: 1.0, NEAR: 0.5, DRAWERS: 0.0, APPLE: 0.25}
    rows = [
        episode(name, seed, seed < solved[trials.family] * trials.count)
        for name, trials in TRIALS.items()
        for seed in range(trials.count - (name == "variant_aggregation/move_near"))
    ]
    entry = leaderboard_entry(of_benchmark("simplerenv", rows), **WHO)
    assert entry["benchmark"] == "simpler_env" and entry["overall_score"] is None
    assert entry["suite_scores"] == {"google_robot_vm": 50.0}, "of cans, moving near and drawers"
    assert entry["task_scores"]["place_apple_in_drawer_vm"] == 25.0
    assert set(entry["task_scores"]) == {f"{family}_{short}" for family in solved for short in ("vm", "va")}
    assert entry["task_scores"]["drawer_va"] == 0.0 and entry["task_scores"]["pick_coke_can_va"] == 100.0
    raster = of_benchmark("simplerenv", rows, options={"shading": "raster"})
    entry = leaderboard_entry(raster, **WHO)
    assert entry["suite_scores"] == {} and ", shading=raster, " in entry["notes"]


def test_liberos_score_needs_every_episode_of_its_four_suites() -> None:
    names = benchmark_class("libero").splits()["libero"]
    rows = [episode(name, seed, not name.startswith("libero_10/")) for name in names for seed in range(50)]
    entry = leaderboard_entry(of_benchmark("libero", rows), **WHO)
    assert entry["overall_score"] == 75.0 and entry["suite_scores"]["libero_10"] == 0.0
    short = dict.fromkeys(names, 200)
    for case, fewer, changes in (
        ("fewer", rows[:-1], {}),
        ("lost", [*rows[:-1], episode(names[-1], 49, None)], {}),
        ("shorter", rows, {"horizons": short}),
    ):
        entry = leaderboard_entry(of_benchmark("libero", fewer, **changes), **WHO)
        assert entry["overall_score"] is None and len(entry["suite_scores"]) == 4, case
    part = [row for row in rows if row["task"].startswith("libero_spatial/")]
    entry = leaderboard_entry(of_benchmark("libero", part), **WHO)
    assert entry["overall_score"] is None and entry["suite_scores"] == {"libero_spatial": 100.0}
    lost = [episode(names[0], 0, None), episode(names[0], 0, True, arm="random")]
    with pytest.raises(ConfigError, match="no outcome of the arm 'policy'"):
        leaderboard_entry(of_benchmark("libero", lost), **WHO)


def test_what_the_board_does_not_have_is_refused(tmp_path: Path) -> None:
    evaluation = of(tmp_path, [episode("cube", 0, True, arm="random")])
    with pytest.raises(ConfigError, match=r"leaderboard has no pushing; it has calvin"):
        leaderboard_entry(evaluation, **WHO)
    with pytest.raises(ConfigError, match=r"no outcome of 'policy'; arms: random"):
        results_file(evaluation)


def test_the_job_writes_a_file_and_asks_for_what_an_entry_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluated(tmp_path / "e", [episode("cube", 0, True)])
    given = [f"evaluation={tmp_path}/e", f"output={tmp_path}/out.json"]
    monkeypatch.setattr(sys, "argv", ["export_evaluation.py", *given])
    assert main() == 0 and json.loads((tmp_path / "out.json").read_text())["mean_success"] == 1.0
    monkeypatch.setattr(sys, "argv", ["export_evaluation.py", *given, "layout=leaderboard"])
    assert exit_code(main) == 2 and "needs model=KEY and curated_by" in capsys.readouterr().err
