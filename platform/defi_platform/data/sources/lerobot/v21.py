"""LeRobot datasets v2.1: one episode per video and parquet file, episodes and tasks as JSON lines.

Source of the layout: docs/formats.md, "LeRobot v2.1".
"""

from __future__ import annotations

import json
from typing import Any

from defi_platform import storage
from defi_platform.data.sources.lerobot.signals import read_signals
from defi_platform.data.sources.lerobot.v3 import is_v3, read_info
from defi_platform.data.sources.records import (
    Listing,
    RejectedRecord,
    VideoRecord,
    files_below,
    record_or_missing,
)

__all__ = ["TITLE", "detect", "listing", "read_signals"]

TITLE = "LeRobot v2.1"


def detect(root: str, top: set[str]) -> bool:
    """True when `root` is a LeRobot dataset of version 2."""
    return "meta" in top and storage.exists(storage.join(root, "meta", "info.json")) and not is_v3(root)


def listing(root: str, fps: float | None = None) -> Listing:
    """Yields one record per episode and camera that `meta/episodes.jsonl` names, whether its file exists or not."""
    info = read_info(root)
    files = yield from files_below(root)
    tasks = _tasks(root)
    for number, line in enumerate(_lines(root, "episodes.jsonl")):
        try:
            episode = json.loads(line)
            index, length = int(episode["episode_index"]), int(episode["length"])
        except (ValueError, KeyError, TypeError) as error:
            yield RejectedRecord(
                video_id=f"meta/episodes.jsonl line {number + 1}",
                uri=storage.join(root, "meta", "episodes.jsonl"),
                reason="bad_source",
                message=f"{type(error).__name__}: {error}",
            )
            continue
        numbers = {"episode_chunk": index // info.chunk_size, "episode_index": index}
        data = files.get(info.data_path.format(**numbers)) if "action" in info.features else None
        for camera in info.cameras:
            record = VideoRecord(
                video_id=f"episode_{index:06d}/{camera}",
                uri="",
                text=_text(episode.get("tasks"), tasks),
                camera=camera.rsplit(".", 1)[-1],
                episode_id=f"episode_{index:06d}",
                num_frames=length,
                fps=fps or info.fps,
                num_actions=length if data else 0,
                signals_uri=data.uri if data else "",
            )
            yield record_or_missing(files, info.video_path.format(video_key=camera, **numbers), root, record)


def _lines(root: str, name: str) -> list[str]:
    try:
        content = storage.read_text(storage.join(root, "meta", name))
    except FileNotFoundError:
        return []
    return [line for line in content.splitlines() if line.strip()]


def _tasks(root: str) -> dict[int, str]:
    tasks = {}
    for line in _lines(root, "tasks.jsonl"):
        try:
            task = json.loads(line)
            tasks[int(task["task_index"])] = str(task["task"])
        except (ValueError, KeyError, TypeError):
            continue  # an episode usually carries its text itself; one that does not goes without
    return tasks


def _text(found: Any, tasks: dict[int, str]) -> str:
    """The instruction, from the shapes seen in the wild: a list of texts or numbers, one text, one mapping."""
    first = found[0] if isinstance(found, list) and found else found
    if isinstance(first, dict):
        first = first.get("task", first.get("task_index"))
    if isinstance(first, int):
        return tasks.get(first, "")
    return first if isinstance(first, str) else ""
