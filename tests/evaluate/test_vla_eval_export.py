"""Exports in vla-eval's layouts, checked with its own code where it has some."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, ClassVar

import pytest
from made_evaluations import Apart, Chained, episode, evaluated
from vla_eval.results.collector import ResultCollector
from vla_eval.results.export import print_export_summary

from defi_platform.errors import ConfigError, exit_code
from defi_platform.evaluate.results.evaluation import Evaluation, read_evaluation
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


def test_simplerenvs_groups_are_not_averaged(tmp_path: Path) -> None:
    class Simpler(Apart):
        name = "simplerenv"

    rows = [episode("cube", 0, True), episode("ball", 0, False)]
    entry = leaderboard_entry(of(tmp_path, rows, Simpler), **WHO)
    assert entry["suite_scores"] == {"matching": 100.0, "variants": 0.0}
    assert entry["overall_score"] is None and entry["benchmark"] == "simpler_env"


def test_liberos_score_is_the_mean_of_its_four_suites_when_all_were_run(tmp_path: Path) -> None:
    names = [f"libero_{kind}/{n}" for kind in ("spatial", "object", "goal", "10") for n in range(10)]
    horizons = dict.fromkeys(names, 300)
    rows = [episode(name, 0, not name.startswith("libero_10/")) for name in names]
    evaluation = of(tmp_path / "all", rows, benchmark_named("libero"), horizons=horizons)
    entry = leaderboard_entry(evaluation, **WHO)
    assert entry["overall_score"] == 75.0 and entry["suite_scores"]["libero_10"] == 0.0
    part = of(
        tmp_path / "part", rows[:15], benchmark_named("libero"), horizons=dict(list(horizons.items())[:15])
    )
    entry = leaderboard_entry(part, **WHO)
    assert entry["overall_score"] is None and entry["suite_scores"] == {"libero_spatial": 100.0}


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


def benchmark_named(text: str) -> Any:
    class Named(Chained):
        name: ClassVar[str] = text
        chain_length = 1

    return Named
