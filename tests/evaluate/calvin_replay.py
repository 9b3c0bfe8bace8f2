"""Replays CALVIN's recorded validation episodes in its simulator; run by the simulator's own Python.

Usage: python calvin_replay.py RECORDED SEGMENTS, where RECORDED is the dataset's validation folder and SEGMENTS is JSON:
[[first frame, last frame, task], ...]. Prints one JSON object.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np

from defi_platform.evaluate.benchmarks.calvin.benchmark import Calvin
from defi_platform.evaluate.benchmarks.calvin.clones import clones
from defi_platform.evaluate.benchmarks.calvin.table import PlayTable


def decibels(one: np.ndarray, other: np.ndarray) -> float:
    """Peak signal-to-noise ratio of two pictures; 100 where they are alike."""
    error = float(np.mean((one.astype(np.float64) - other) ** 2))
    return 100.0 if error == 0 else 10 * math.log10(255**2 / error)


def replay(table: PlayTable, recorded: Path, first: int, last: int, task: str) -> dict[str, Any]:
    """Starts in a segment's first state and executes its actions."""
    frames = [np.load(recorded / f"episode_{number:07d}.npz") for number in range(first, last + 1)]
    state = table.reset(frames[0]["robot_obs"], frames[0]["scene_obs"])
    pictures = table.pictures()
    table.begin()
    solved_at = None
    for number, frame in enumerate(frames):
        if number:
            drift = float(np.abs(state[:3] - frame["robot_obs"][:3]).max())
        state = table.step(Calvin.action.prepared(frame["rel_actions"][None])[0])
        if solved_at is None and table.solved(task):
            solved_at = number
    return {
        "decibels": {name: decibels(picture, frames[0][f"rgb_{name}"]) for name, picture in pictures.items()},
        "hand_drift": drift,
        "solved_at": solved_at,
        "other_task": table.solved("open_drawer"),
    }


if __name__ == "__main__":
    simulator = PlayTable(clones(), Calvin.default_view, egl=False)
    folder, segments = Path(sys.argv[1]), json.loads(sys.argv[2])
    answer = [replay(simulator, folder, *segment) for segment in segments]
    simulator.close()
    print("\n" + json.dumps(answer))
