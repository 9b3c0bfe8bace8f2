"""The task and initial state of each episode, as jobs/record_demos.py writes them beside a dataset.

Datasets of one recording share episodes under other numbers (video/ has all of them, labelled/ the first of each task), and
episodes from one initial state resemble each other.
"""

from __future__ import annotations

import json

from defi_platform import storage
from defi_platform.data.sources.records import Files

RECORDING = "meta/recording.json"


def initial_states(root: str, files: Files) -> dict[int, str]:
    """Number of an episode -> key of what it starts from; {} for datasets that no recording of ours made.

    Args:
        root: of the dataset.
        files: below it.
    """
    if RECORDING not in files:
        return {}
    try:
        recording = json.loads(storage.read_bytes(storage.join(root, RECORDING)))
        return {
            number: f"{recording['benchmark']} {episode['task']} seed {int(episode['seed'])}"
            for number, episode in enumerate(recording["episodes"])
        }
    except (ValueError, KeyError, TypeError):
        return {}  # somebody else's file of that name: it says nothing about episodes
