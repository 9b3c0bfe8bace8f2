"""What an evaluation leaves: tables of episodes and steps, the summary and its protocol."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from made_evaluations import Apart, Chained, Pushing, episode, evaluated

from defi_platform.errors import ConfigError
from defi_platform.evaluate.results.episodes import write_episodes
from defi_platform.evaluate.results.evaluation import read_evaluation
from defi_platform.evaluate.results.protocol import differences
from defi_platform.evaluate.success_table import success_lines

ROWS = [
    *(episode("cube", seed, seed < 3) for seed in range(4)),
    *(episode("ball", seed, None if seed == 3 else seed == 0) for seed in range(4)),
    *(episode("cube", seed, False, arm="random", latency_ms=[]) for seed in range(4)),
    *(episode("ball", seed, False, arm="random", latency_ms=[]) for seed in range(4)),
]


def test_episodes_come_back_as_they_were_given(tmp_path: Path) -> None:
    evaluated(tmp_path / "e", ROWS)
    found = read_evaluation(str(tmp_path / "e"))
    assert found.rows == ROWS
    metadata = pq.read_schema(tmp_path / "e" / "episodes.parquet").metadata
    assert json.loads(metadata[b"defi.protocol"]) == found.protocol, "the table alone says how it came about"


def test_steps_have_the_latency_where_a_request_was_sent(tmp_path: Path) -> None:
    summary = evaluated(tmp_path, ROWS[:1])
    table = pq.read_table(tmp_path / "steps.parquet").to_pydict()
    assert table["latency_ms"] == [10.0, None, 30.0, None]
    assert table["observation_sha256"] == ["aa", None, "bb", None]
    assert table["executed"][0] == [0.5, 1.0] and table["action"][0] == [0.5, 2.0]
    assert table["success"] == [False, False, False, True] and set(table["task"]) == {"cube"}
    assert summary["steps"] == 4


def test_an_episode_whose_simulator_failed_is_no_failure_of_the_policy(tmp_path: Path) -> None:
    summary = evaluated(tmp_path, ROWS)
    policy = summary["arms"]["policy"]
    assert (policy["tasks"]["ball"]["successes"], policy["tasks"]["ball"]["episodes"]) == (1, 3)
    assert (policy["pooled"]["successes"], policy["pooled"]["episodes"]) == (4, 7)
    assert summary["simulator_errors"] == {"abort": 2}
    assert summary["left_out"] == [
        {"arm": "policy", "task": "ball", "seed": 3, "tries": 2, "kind": "abort", "message": "signal 6"}
    ]
    lines = success_lines(summary["arms"])
    assert "33 % (6-79), 1 left out" in lines[2]
    assert summary["latency_ms"]["count"] == 14, "of the episodes that count"


def test_a_task_without_any_outcome_is_in_the_table_and_in_no_rate(tmp_path: Path) -> None:
    rows = [episode("cube", 0, True), episode("ball", 0, None)]
    summary = evaluated(tmp_path, rows)
    assert success_lines(summary["arms"])[2].endswith("no outcome, 1 left out")
    assert summary["arms"]["policy"]["pooled"]["episodes"] == 1


def test_groups_of_tasks_have_rates_of_their_own_and_none_together(tmp_path: Path) -> None:
    summary = evaluated(tmp_path, ROWS, Apart)
    policy = summary["arms"]["policy"]
    assert policy["pooled"] is None
    assert [policy["groups"][name]["rate"] for name in ("matching", "variants")] == [
        0.75,
        pytest.approx(1 / 3),
    ]
    lines = "\n".join(success_lines(summary["arms"]))
    assert "matching" in lines and "variants" in lines and "all tasks" not in lines


def test_chains_are_in_the_summary(tmp_path: Path) -> None:
    rows = [episode("cube", seed, seed == 3, solved=seed) for seed in range(4)]
    chains = evaluated(tmp_path, rows, Chained)["chains"]["policy"]
    assert [chains["in_a_row"][str(k)]["successes"] for k in (1, 2, 3)] == [3, 2, 1]
    assert "chains" not in evaluated(tmp_path, rows, Pushing)


def test_the_protocol_names_what_decides_and_what_it_ran_on(tmp_path: Path) -> None:
    protocol = evaluated(tmp_path, ROWS, execute_steps=2)["protocol"]
    assert protocol["horizons"] == {"cube": 50, "ball": 60}
    assert protocol["seeds"] == {"first": 0, "last": 3, "per_task": 4}
    assert protocol["hardware"]["hosts"] == ["one"] and protocol["hardware"]["cores"] >= 1
    assert protocol["versions"]["numpy"].count(".") == 2
    other = {**protocol, "horizons": {"cube": 360, "other": 1}, "hardware": {}, "policy": {"digest": "d2"}}
    assert differences(protocol, protocol) == {}
    assert differences(protocol, other) == {"horizons.cube": (50, 360)}, "of tasks that both have"
    nested = {**protocol, "simulator": {"version": "3.2", "renderer": "egl"}}
    assert differences(protocol, nested) == {
        "simulator.renderer": (None, "egl"),
        "simulator.version": ("3.1", "3.2"),
    }
    with pytest.raises(ConfigError, match="says nothing about view"):
        differences(protocol, {key: value for key, value in protocol.items() if key != "view"})


def test_what_is_no_finished_evaluation_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no finished evaluation"):
        read_evaluation(str(tmp_path))
    (tmp_path / "summary.json").write_text(json.dumps({"arms": {}, "settings": {}}))
    with pytest.raises(ConfigError, match="earlier version"):
        read_evaluation(str(tmp_path))


def test_tables_of_two_runs_are_not_read_as_one(tmp_path: Path) -> None:
    """Of two drivers with different extents one was killed between its table and its summary."""
    output = str(tmp_path)
    evaluated(tmp_path, [episode("cube", 0, True), episode("cube", 1, False)])
    assert len(read_evaluation(output).rows) == 2
    write_episodes(output, [episode("cube", 0, True)], {})
    with pytest.raises(ConfigError, match=r"are of two runs .* run the command whose table you want again"):
        read_evaluation(output)


def test_a_table_of_steps_of_another_run_is_not_read(tmp_path: Path) -> None:
    output = str(tmp_path)
    summary = evaluated(tmp_path, [episode("cube", 0, True), episode("cube", 1, False)])
    assert hashlib.sha256((tmp_path / "steps.parquet").read_bytes()).hexdigest() == summary["steps_sha256"]
    evaluated(tmp_path / "other", [episode("cube", 0, True)])
    (tmp_path / "steps.parquet").write_bytes((tmp_path / "other" / "steps.parquet").read_bytes())
    with pytest.raises(ConfigError, match=r"steps\.parquet and summary\.json are of two runs"):
        read_evaluation(output)
    del summary["steps_sha256"]  # as versions before wrote it
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    assert len(read_evaluation(output).rows) == 2
    del summary["episodes_sha256"]
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    with pytest.raises(ConfigError, match=r"an earlier version wrote summary\.json"):
        read_evaluation(output)
