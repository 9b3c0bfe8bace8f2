"""The page of one evaluation."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from made_evaluations import Apart, Chained, episode, evaluated

from defi_platform.evaluate.fleet.stop_rule import Decision, StopRule
from defi_platform.evaluate.html.evaluation_figures import _coordinates
from defi_platform.evaluate.html.evaluation_page import write_page
from defi_platform.evaluate.html.report_figures import broken, success_bars
from defi_platform.evaluate.results.evaluation import read_evaluation


@pytest.fixture
def page(tmp_path: Path) -> str:
    """Of two tasks: failures of both, one episode left out, filmed as named in their bytes."""
    rows = []
    for task, marks in (("cube", (True, False, False)), ("ball", (False, None, True))):
        for seed, success in enumerate(marks):
            video = None if success is None else f"{task}{seed}.mp4"
            if video:
                (tmp_path / video).write_bytes(b"film")
            rows.append(episode(task, seed, success, video=video))
            rows.append(episode(task, seed, False, arm="random", latency_ms=[]))
    evaluated(tmp_path, rows)
    return Path(write_page(read_evaluation(str(tmp_path)), ("x", "y"))).read_text()


def section(page: str, anchor: str) -> str:
    return page.split(f'<section id="{anchor}">')[1].split("</section>")[0]


def test_failures_come_first_those_of_different_tasks_before_more_of_one(page: str) -> None:
    assert page.index('id="failures"') < page.index('id="success"') < page.index('id="solved-episodes"')
    captions = re.findall(r"<figcaption>(\w+), seed (\d)", section(page, "failures"))
    assert captions == [("cube", "1"), ("ball", "0"), ("cube", "2")]
    assert "3 failed episodes of the arm policy; 3 of them are shown" in page
    assert section(page, "failures").count("data:video/mp4;base64,ZmlsbQ==") == 3


def test_what_has_no_outcome_is_shown_and_counted(page: str) -> None:
    assert "50 % (9-91), 1 left out" in section(page, "success")
    errors = section(page, "simulator-errors")
    assert re.sub(r"<[^>]+>|\s+", " ", errors).split("last error")[1].split() == [
        "policy", "ball", "1", "2", "abort:", "signal", "6",
    ]  # fmt: skip


def test_maps_latencies_and_the_protocol_are_on_the_page(page: str) -> None:
    assert 'aria-label="Success by initial state: cube, ball"' in section(page, "success-by-initial-state")
    assert "<svg" in section(page, "latency")
    text = re.sub(r"<[^>]+>|\s+", " ", section(page, "protocol"))
    assert re.search(r"horizons\.cube +50", text) and re.search(r"simulator\.version +3\.1", text)
    assert "<script" not in page and 'src="http' not in page


def test_an_early_end_is_on_the_page(tmp_path: Path) -> None:
    rule = StopRule(0.2, 0.6, 0.05, 0.05)
    stopped = Decision(4, 1, 8, "at most 0.2").as_mapping(rule)
    evaluated(tmp_path, [episode("cube", 0, False)], more={"stopped": stopped})
    text = Path(write_page(read_evaluation(str(tmp_path)), ("x", "y"))).read_text()
    assert (
        "Ended by its rule: sequential test after 8 episodes: the policy&#39;s rate is at most 0.2 (errors 0.05"
        in text
    )


def test_chains_and_groups_have_their_tables(tmp_path: Path) -> None:
    rows = [episode("cube", seed, seed == 3, solved=seed) for seed in range(4)]
    far = {"tested": 4, "recorded": 9, "median": 0.0312, "largest": 0.5, "same": 1, "recorded_median": None}
    seen = {"seeds_of_training": {"cube": [2, 3]}, "distances_to_training": {"cube": far}}
    evaluated(tmp_path / "chained", rows, Chained, seen)
    made = Path(write_page(read_evaluation(str(tmp_path / "chained")), ())).read_text()
    assert "1.50 (" in section(made, "chains-of-tasks") and "this evaluation" in made
    assert "No videos were written" in made
    assert "trained on recordings of 2 of these initial states" in section(made, "success")
    cells = re.sub(r"<[^>]+>|\s+", " ", section(made, "distance-from-training")).split("the same")[1].split()
    assert cells == ["cube", "4", "9", "0.0312", "0.5", "-", "1"]
    evaluated(tmp_path / "apart", [*rows, episode("ball", 0, True)], Apart)
    made = Path(write_page(read_evaluation(str(tmp_path / "apart")), ())).read_text()
    assert "variants" in section(made, "success") and "all tasks" not in made


def test_maps_show_where_objects_were_and_long_names_are_broken(tmp_path: Path) -> None:
    def place(seed: int) -> list[dict[str, object]]:
        return [
            {"name": f"cube_{axis}", "value": seed * width}
            for axis, width in (("x", 0.1), ("y", 0.2), ("z", 0))
        ]

    rows = [
        episode("cube", seed, seed > 1, initial_state=[0.0, 0.0], initial_positions=place(seed))
        for seed in range(4)
    ]
    (_, y, labels) = _coordinates(rows, ("hand_x", "hand_y"))
    assert labels == ("cube_x", "cube_y") and y.tolist() == pytest.approx([0, 0.2, 0.4, 0.6])
    alike = [{**row, "initial_positions": []} for row in rows]
    assert _coordinates(alike, ("hand_x", "hand_y"))[2][0].startswith("seed")
    assert broken("suite/pick_up_the_bowl", 12) == "suite/pick_\nup_the_bowl"
    lost = {"policy": {"a_task_with_a_long_name": None, "b": {"rate": 0.5, "low": 0.1, "high": 0.9}}}
    assert "<svg" in success_bars(lost)
