"""Search for runs in a folder tree, local or remote: level by level, without listing corpora, checkpoints or caches."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice

from defi_platform import storage
from defi_platform.data.manifest.commit_marker import COMMITTED
from defi_platform.errors import one_line
from defi_platform.status.other_runs import (
    ATTEMPTS,
    CORPORA,
    ENCODER,
    EPISODES,
    PROBED,
    RECORDING,
    SHARDS,
    evaluation_status,
    ingest_status,
    latents_status,
    recording_status,
)
from defi_platform.status.run_status import RunStatus
from defi_platform.status.training import CONFIG, METRICS, SUMMARY, training_status

DEPTH = 6
"""Levels of folders below the one that is searched."""
MOST_NAMES = 1000
"""Names of a folder beyond which it is taken for data and not searched."""
THREADS = 16
TRAINING_SIGNS = frozenset({METRICS, "status.json", "checkpoints", SUMMARY})
DATA = frozenset({"checkpoints", SHARDS, "videos", "media", "wandb", "model"})
"""Folders of runs in which there is no run."""


@dataclass
class Found:
    """Runs of a folder tree, and what could not be searched."""

    runs: list[RunStatus] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    """One line per folder that was not searched or read, with the reason."""


def find_runs(roots: Sequence[str], now: float | None = None, depth: int = DEPTH) -> Found:
    """Finds runs and reads their state.

    Args:
        roots: folders to search, local or remote; a run folder itself will do.
        now: Unix time; None: of this machine's clock.
        depth: levels below each root that are searched.

    Returns: runs in the order of their folders.
    Raises: StorageError when a root cannot be listed.
    """
    found = Found()
    level = [storage.absolute(root) for root in roots]
    for root in list(level):
        try:
            if not storage.is_folder(root):
                found.skipped.append(f"{root} does not exist")
        except (OSError, storage.StorageError) as error:  # a cluster's list names runs of anybody's storage
            level.remove(root)
            found.skipped.append(f"{root} cannot be read: {one_line(error)}")
    with ThreadPoolExecutor(THREADS, thread_name_prefix="status") as threads:
        for distance in range(depth + 1):
            below: list[str] = []
            for runs, folders, skipped in threads.map(lambda folder: _search(folder, now), level):
                found.runs += runs
                found.skipped += skipped
                below += folders
            level = below
            if not level:
                break
            if distance == depth:
                found.skipped.append(
                    f"{len(level):,} folders more than {depth} levels down, such as {level[0]}"
                )
    found.runs.sort(key=lambda run: run.folder)
    return found


def _search(folder: str, now: float | None) -> tuple[list[RunStatus], list[str], list[str]]:
    """Returns: runs in a folder, folders below it that may hold more, and what was skipped."""
    try:
        names = set(storage.names(folder, MOST_NAMES + 1))
        if len(names) > MOST_NAMES:
            return [], [], [f"{folder} has more than {MOST_NAMES:,} entries: taken for data"]
        below = [name for name in storage.folders(folder) if not name.startswith(".")]
        runs = _runs_in(folder, names, below, now)
    except (OSError, storage.StorageError, ValueError) as error:
        return [], [], [f"{folder} cannot be read: {one_line(error)}"]
    except (AttributeError, KeyError, TypeError) as error:  # JSON and YAML of another form than a run writes
        return [], [], [f"{folder} holds files of another form than a run's: {one_line(error)}"]
    if runs is None:
        return [], [storage.join(folder, name) for name in below if name not in DATA], []
    return runs, [], []


def _runs_in(folder: str, names: set[str], below: Sequence[str], now: float | None) -> list[RunStatus] | None:
    """The runs that a folder is; None where it is none."""
    if CONFIG in names and TRAINING_SIGNS & names:
        return [training_status(folder, now)]
    if EPISODES in below:
        return [evaluation_status(folder)]
    if RECORDING in names or ATTEMPTS in names:
        return [recording_status(folder)]
    if ENCODER in names:
        return [latents_status(folder)]
    if CORPORA in below and _is_manifest(folder):
        return ingest_status(folder)
    return None


def _is_manifest(folder: str) -> bool:
    corpora = storage.join(folder, CORPORA)
    return any(
        {COMMITTED, PROBED} & set(storage.names(storage.join(corpora, name), MOST_NAMES))
        for name in islice(storage.folders(corpora), 10)
    )
