"""CALVIN as a benchmark: its sequences and initial states, what it says of itself, and the real simulator."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from defi_platform.evaluate.benchmarks.calvin import sequences

OFFICIAL: list[dict[str, Any]] = json.loads((Path(__file__).parent / "calvin_sequences_20.json").read_text())
"""The first twenty sequences: start condition, tasks, and the scene's state by CALVIN's own function."""

QUICKLY_DRAWN = (5, 6, 9)
"""Of the twenty; the rule draws at random until five tasks fit, which takes longer for others."""


@pytest.mark.parametrize("number", QUICKLY_DRAWN)
def test_the_rule_draws_the_official_sequences(number: int) -> None:
    assert list(sequences.sequence(number)) == OFFICIAL[number]["tasks"]


def test_sequences_start_and_continue_as_the_official_ones_do() -> None:
    for number, official in enumerate(OFFICIAL):
        start = sequences.start_condition(number)
        assert list(start.items()) == list(official["start"].items())
        assert sequences.follows(start, official["tasks"])
        robot, scene = sequences.initial_state(start)
        assert scene.tolist() == official["scene_obs"]
        assert robot.tolist() == list(sequences.ROBOT)


def test_tasks_that_cannot_follow_one_another_make_no_sequence() -> None:
    start = sequences.start_condition(0)  # the drawer is open
    assert sequences.follows(start, ["close_drawer", "open_drawer"]) is False  # of one group
    assert sequences.follows(start, ["open_drawer"]) is False
    assert sequences.follows(start, ["place_in_slider"]) is False  # nothing is grasped
    assert sequences.follows(start, ["close_drawer", "turn_off_led"]) is True


def test_the_hash_is_that_of_the_package_that_the_protocol_uses() -> None:
    assert sequences.fnv1_32(b"hello ") == 406904344  # both from that package's own description
    assert sequences.fnv1_32(b"hello world") == 2805756500


def test_there_are_a_thousand_sequences() -> None:
    for number in (-1, 1000):
        with pytest.raises(IndexError, match="CALVIN has 1000"):
            sequences.sequence(number)
    assert len(sequences.start_conditions()) == 192
