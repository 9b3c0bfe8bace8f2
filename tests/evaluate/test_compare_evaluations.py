"""jobs/compare_evaluations.py: evaluations of several policies on the same initial states."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from made_evaluations import Apart, Chained, episode, evaluated

from defi_platform.config import CompareConfig
from defi_platform.config.loader import parse_arguments
from defi_platform.errors import ConfigError, exit_code
from defi_platform.evaluate.results.comparison import compare
from defi_platform.evaluate.statistics.paired import PairedCounts, difference_interval
from defi_platform.jobs.compare_evaluations import main


def outcomes(solved: dict[str, str], **other: Any) -> list[dict[str, Any]]:
    """Episodes from texts such as {"cube": "10-"}: one character per seed, "-" left out."""
    meaning = {"1": True, "0": False, "-": None}
    return [
        episode(task, seed, meaning[mark], **other)
        for task, marks in solved.items()
        for seed, mark in enumerate(marks)
    ]


@pytest.fixture
def folders(tmp_path: Path) -> list[str]:
    """A baseline, a better policy, and one that is like the baseline."""
    evaluated(tmp_path / "base", outcomes({"cube": "1100000000", "ball": "11111000-0"}))
    evaluated(tmp_path / "better", outcomes({"cube": "1011111111", "ball": "111110000011"}))
    evaluated(tmp_path / "like", outcomes({"cube": "1100000001", "ball": "1111000000"}))
    return [str(tmp_path / name) for name in ("base", "better", "like")]


def test_differences_come_with_intervals_tests_and_what_could_be_seen(folders: list[str]) -> None:
    better, like = compare(CompareConfig(outputs=folders)).comparisons
    cube = better.tasks[0]
    assert (cube.first["successes"], cube.second["successes"], cube.pairs) == (2, 9, 10)
    assert (cube.only_first, cube.only_second, cube.difference) == (1, 8, 0.7)
    assert (cube.low, cube.high) == difference_interval(PairedCounts(1, 1, 8, 0))
    assert cube.p == pytest.approx(2 * (1 + 9) / 2**9), "at most one of nine tosses"
    group = better.groups[0]
    assert group.name == "all tasks" and group.pairs == 19 and group.smallest_visible is not None
    # Holm over the two comparisons: the smaller p counts twice.
    assert group.p_corrected == pytest.approx(2 * group.p) and like.groups[0].p_corrected == 1.0


def test_what_has_no_pair_is_named_and_not_compared(folders: list[str]) -> None:
    result = compare(CompareConfig(outputs=folders[:2]))
    assert result.comparisons[0].without_pair == {
        "base": ["ball 8"],
        "better": ["ball 8", "ball 10", "ball 11"],
    }
    assert result.comparisons[0].tasks[1].pairs == 9
    assert "not compared: 3 of better (ball 8, ball 10, ball 11)" in result.summary()


def test_other_protocols_are_refused_by_name_unless_the_difference_is_meant(
    folders: list[str], tmp_path: Path
) -> None:
    rows = outcomes({"cube": "11", "ball": "10"})
    evaluated(tmp_path / "other", rows, execute_steps=8, simulator={"version": "3.2"})
    outputs = [folders[0], str(tmp_path / "other")]
    with pytest.raises(ConfigError) as refused:
        compare(CompareConfig(outputs=outputs))
    assert "execute_steps: 2 in base, 8 in other; simulator.version: 3.1 in base, 3.2 in other" in str(
        refused.value
    )
    assert "ignore='[execute_steps, simulator.version]'" in str(refused.value)
    result = compare(CompareConfig(outputs=outputs, ignore=["execute_steps", "simulator"]))
    assert "ignored as asked: execute_steps: 2 in base, 8 in other" in result.summary()


def test_arms_of_one_evaluation_can_be_compared(tmp_path: Path) -> None:
    rows = outcomes({"cube": "1111111"}) + outcomes({"cube": "0000000"}, arm="random")
    evaluated(tmp_path / "e", rows)
    config = CompareConfig(outputs=[str(tmp_path / "e")] * 2, arms=["random", "policy"])
    one = compare(config).comparisons[0]
    assert (one.first, one.second) == ("e:random", "e")
    assert one.groups[0].difference == 1.0 and one.groups[0].p == 2 / 2**7
    with pytest.raises(ConfigError, match=r"no episode of the arm 'rendom'; .*Did you mean 'random'"):
        compare(CompareConfig(outputs=config.outputs, arms=["rendom", "policy"]))


def test_groups_are_compared_each_by_itself(tmp_path: Path) -> None:
    for name, cube in (("a", "000000"), ("b", "111111")):
        evaluated(tmp_path / name, outcomes({"cube": cube, "ball": "101010"}), Apart)
    groups = compare(CompareConfig(outputs=[str(tmp_path / "a"), str(tmp_path / "b")])).comparisons[0].groups
    assert [(group.name, group.difference) for group in groups] == [("matching", 1.0), ("variants", 0.0)]


def test_a_benchmark_that_pools_by_tasks_is_compared_by_tasks(tmp_path: Path) -> None:
    for name, cube in (("a", "00"), ("b", "11")):
        rows = outcomes({"cube": cube, "ball": "10101010"})
        evaluated(tmp_path / name, rows, pooled_by="tasks")
    group = (
        compare(CompareConfig(outputs=[str(tmp_path / "a"), str(tmp_path / "b")])).comparisons[0].groups[0]
    )
    assert (group.first["rate"], group.second["rate"], group.difference) == (0.25, 0.75, 0.5)
    assert group.low < 0.5 < group.high


def test_chains_are_compared_by_how_many_are_solved_in_a_row(tmp_path: Path) -> None:
    for name, solved in (("a", [0, 1, 2, 1, 0]), ("b", [1, 3, 3, 2, 1])):
        rows = [episode("cube", seed, n == 3, solved=n) for seed, n in enumerate(solved)]
        evaluated(tmp_path / name, rows, Chained)
    lengths = (
        compare(CompareConfig(outputs=[str(tmp_path / "a"), str(tmp_path / "b")])).comparisons[0].lengths
    )
    found = lengths["subtasks solved in a row"]
    assert (found["mean"], found["pairs"], found["p"]) == (pytest.approx(1.2), 5, 2 / 2**5)
    assert found["low"] >= 1.0 and "steps where both solved it" not in lengths


def test_a_mean_over_tasks_is_tested_in_its_own_direction(tmp_path: Path) -> None:
    evaluated(tmp_path / "a", outcomes({"cube": "0" * 20, "ball": "11"}), pooled_by="tasks")
    evaluated(tmp_path / "b", outcomes({"cube": "1" * 10 + "0" * 10, "ball": "00"}), pooled_by="tasks")
    result = compare(CompareConfig(outputs=[str(tmp_path / "a"), str(tmp_path / "b")]))
    group = result.comparisons[0].groups[0]
    assert group.difference == -0.25 and group.p > 0.05, "ten more of one task's pairs do not make it worse"
    assert result.significantly_worse == []


def test_pairs_that_start_differently_are_none(folders: list[str], tmp_path: Path) -> None:
    moved = [{"name": "cube_x", "value": 0.2}]
    evaluated(tmp_path / "p", outcomes({"cube": "11"}, initial_positions=[{"name": "cube_x", "value": 0.1}]))
    evaluated(tmp_path / "q", outcomes({"cube": "11"}, initial_positions=moved), execute_steps=8)
    outputs = [str(tmp_path / "p"), str(tmp_path / "q")]
    result = compare(CompareConfig(outputs=outputs, ignore=["execute_steps"]))
    assert "2 pairs of p and q (the first is cube 0) did not start from the same state" in result.summary()
    evaluated(tmp_path / "q", outcomes({"cube": "11"}, initial_positions=moved))
    with pytest.raises(ConfigError, match="did not start from the same state"):
        compare(CompareConfig(outputs=outputs))
    with pytest.raises(ConfigError, match="Did you mean 'execute_steps'"):
        compare(CompareConfig(outputs=folders, ignore=["exectue_steps"]))


def test_an_evaluation_that_ended_early_is_named_and_other_results_are_none(
    folders: list[str], tmp_path: Path
) -> None:
    evaluated(tmp_path / "early", outcomes({"cube": "11", "ball": "10"}), more={"stopped": {"episodes": 4}})
    result = compare(CompareConfig(outputs=[folders[0], str(tmp_path / "early")]))
    assert "early was ended early by its stop rule" in result.summary()
    (tmp_path / "early" / "summary.json").write_text('{"loss": 1}')
    with pytest.raises(ConfigError, match="holds no evaluation but other results"):
        compare(CompareConfig(outputs=[folders[0], str(tmp_path / "early")]))


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["compare_evaluations.py", *arguments])
    return exit_code(main)


def test_the_job_prints_tables_or_json_and_exits_by_what_it_found(
    folders: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base, better, _ = folders
    assert run(monkeypatch, base, better, "--fail-if-worse") == 0
    out = capsys.readouterr().out
    assert re.search(r"cube +20 % \(6-51\) +90 % \(60-98\) +\+70 \(", out) and "all tasks" in out
    assert run(monkeypatch, better, base, "--fail-if-worse", "--json") == 1, "the other way round"
    found = json.loads(capsys.readouterr().out)
    assert found["comparisons"][0]["groups"][0]["difference"] < 0
    assert run(monkeypatch, better, base) == 0, "being worse is no error unless asked for"
    assert run(monkeypatch, base) == 2 and run(monkeypatch, base, "nowhere") == 2
    assert "holds no finished evaluation" in capsys.readouterr().err


def test_paths_are_distinguished_from_overrides() -> None:
    config = parse_arguments(CompareConfig, ["./a=1/b", "power=0.9", "s3://c/d=e"], positional="outputs")
    assert (config.outputs, config.power) == (["./a=1/b", "s3://c/d=e"], 0.9)
    with pytest.raises(ConfigError, match="power"):
        compare(CompareConfig(outputs=["a", "b"], power=1.5))
