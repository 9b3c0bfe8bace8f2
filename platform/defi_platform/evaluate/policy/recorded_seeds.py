"""Initial states that a policy has learned from: an evaluation on them measures memory.

What is known is on disk: a policy folder lies in its run's folder, whose config names the corpora, and a corpus that
jobs/record_demos.py made lists the seeds of its episodes. A policy by url, or one that was moved, says nothing of it.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from defi_platform import storage
from defi_platform.config.loader import read_yaml
from defi_platform.errors import ConfigError, UserError

RECORDING = "recording.json"
_RUN_CONFIG = "config.yaml"


def recorded_seeds(policy: str, benchmark: str) -> dict[str, set[int]]:
    """Seeds by task of a benchmark that are in the corpora of a policy's training, as far as its folder tells.

    Args:
        policy: its folder.
        benchmark: name.
    """
    found: dict[str, set[int]] = defaultdict(set)
    for recording in _recordings(policy):
        if recording.get("benchmark") == benchmark:
            for episode in recording.get("episodes", ()):
                found[str(episode["task"])].add(int(episode["seed"]))
    return dict(found)


def check_seeds(policy: str, benchmark: str, tasks: list[str], first: int, count: int) -> None:
    """Checks that no initial state of an evaluation was recorded for the policy's training.

    Args:
        policy: its folder.
        benchmark: name.
        tasks: of the evaluation.
        first: seed of the evaluation.
        count: seeds of each task.

    Raises:
        ConfigError: there are such; names another first seed.
    """
    known = recorded_seeds(policy, benchmark)
    shared = {task: known.get(task, set()) & set(range(first, first + count)) for task in tasks}
    worst = max(shared, key=lambda task: len(shared[task]))
    if shared[worst]:
        free = 1 + max(seed for task in tasks for seed in known.get(task, ()))
        raise ConfigError(
            f"the policy in {policy} was trained on recordings of {len(shared[worst])} of the {count} initial states "
            f"of {worst} (seeds from {min(shared[worst])}); they do not show what it can do elsewhere. Set seed={free} or more."
        )


def _recordings(policy: str) -> Iterator[dict[str, Any]]:
    run = storage.absolute(policy).rstrip("/").rpartition("/")[0]
    config = storage.join(run, _RUN_CONFIG)
    if not storage.exists(config):
        return
    try:
        with storage.local_copy(config) as local:
            corpora = (read_yaml(local).get("data") or {}).get("corpora") or {}
    except UserError:
        return  # of something else than a training: it says nothing about corpora
    for corpus in corpora.values():
        path = corpus.get("path") if isinstance(corpus, dict) else None
        if path and storage.exists(storage.join(path, "meta", RECORDING)):
            yield json.loads(storage.read_text(storage.join(path, "meta", RECORDING)))
