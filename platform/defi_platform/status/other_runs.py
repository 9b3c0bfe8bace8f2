"""State of ingests, latent caches, evaluations and recordings, read from their folders."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from defi_platform import storage
from defi_platform.data.manifest.commit_marker import marker_of
from defi_platform.status.run_status import RunStatus

CORPORA, PROBED = "corpora", "probed"
ENCODER, SHARDS = "encoder.json", "shards"
EPISODES, RECORDING, ATTEMPTS, SUMMARY = "episodes", "recording.json", ".attempts", "summary.json"


def ingest_status(manifest: str) -> list[RunStatus]:
    """The state of each corpus of a manifest.

    Args:
        manifest: its folder.

    Raises: StorageError.
    """
    found = []
    for name in storage.folders(storage.join(manifest, CORPORA)):
        folder = storage.join(manifest, CORPORA, name)
        marker = marker_of(manifest, name)
        # Blocks of results are deleted at the commit, so they are there while files are opened, or after a kill.
        blocks = sum(block.endswith(".parquet") for block in storage.names(storage.join(folder, PROBED)))
        counts = dict((marker or {}).get("counts") or {})
        rejected = {reason: count for reason, count in counts.items() if reason != "videos" and count}
        done = "complete" if marker else "listing, or cut short"
        found.append(
            RunStatus(
                kind="ingest",
                folder=folder,
                state="ingesting, or cut short" if blocks else done,
                progress=f"{blocks:,} blocks of files opened"
                if blocks
                else f"{counts.get('videos', 0):,} videos",
                remarks=tuple(f"{count:,} {reason}" for reason, count in sorted(rejected.items())),
            )
        )
    return found


def latents_status(folder: str) -> RunStatus:
    """The state of a latent cache: it counts shards, since which videos are missing depends on the corpora of now."""
    names = storage.names(storage.join(folder, SHARDS))
    about = json.loads(storage.read_text(storage.join(folder, ENCODER)))
    shards = sum(name.endswith(".parquet") for name in names)
    return RunStatus(
        kind="latents",
        folder=folder,
        state="filled as far as asked for, or being filled",
        progress=f"{shards:,} shards",
        remarks=(str(about.get("describes", "")),) if about.get("describes") else (),
    )


def evaluation_status(folder: str) -> RunStatus:
    """The state of an evaluation: episodes that are done, and the success rates of a complete one."""
    episodes = sum(name.endswith(".json") for name in storage.names(storage.join(folder, EPISODES)))
    summary = _json(storage.join(folder, SUMMARY))
    rates = dict(_rates(summary.get("arms") or {}))
    return RunStatus(
        kind="evaluation",
        folder=folder,
        state="complete" if summary else "evaluating, or cut short",
        progress=f"{episodes:,} episodes",
        remarks=tuple(f"{arm} {rate['successes']}/{rate['episodes']}" for arm, rate in rates.items()),
    )


def _rates(arms: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Name -> pooled rate of every arm; one per group where tasks are not all pooled."""
    for arm, result in arms.items():
        if result["pooled"] is not None:
            yield arm, result["pooled"]
            continue
        for group, rate in result["groups"].items():
            if rate is not None:
                yield f"{arm}, {group}", rate


def recording_status(folder: str) -> RunStatus:
    """The state of a recording: its summary, or the attempts so far."""
    summary = _json(storage.join(folder, RECORDING)).get("summary") or {}
    if summary:
        progress = f"{summary.get('episodes', 0):,} episodes"
    else:
        attempts = [name for name in storage.names(storage.join(folder, ATTEMPTS)) if name != "settings.json"]
        progress = f"{len(attempts):,} attempts"
    failed = sum((summary.get("failures") or {}).values())
    return RunStatus(
        kind="recording",
        folder=folder,
        state="complete" if summary else "recording, or cut short",
        progress=progress,
        remarks=(f"{failed:,} failed attempts replaced",) if failed else (),
    )


def _json(uri: str) -> dict[str, Any]:
    try:
        return dict(json.loads(storage.read_text(uri)))
    except FileNotFoundError:
        return {}
